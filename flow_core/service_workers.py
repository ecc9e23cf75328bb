"""The workers behind services: one for a live object, several for a pool, all of them in one session.

Knows nothing of how a service looks to its user.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flow_core.definitions import CallOptions, Definition
from flow_core.dispatch import Pool
from flow_core.errors import FlowError, SessionClosedError, ValidationError, WorkerDiedError
from flow_core.futures import Future
from flow_core.live_objects import LiveObject
from flow_core.runner.crew import MAX_WORKERS

log = logging.getLogger("flow_core")

#: The values of services are passed on more often than looked at.
_BY_REFERENCE = CallOptions(stays=True)


class SharedSession:
    """A session whose own pool runs plain functions; services have workers of their own in it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._lock = threading.Lock()
        self._unused = pool.spec.workers  # the numbers of workers, from here on
        self._returned: deque[tuple[int, int]] = deque()

    def guest(self, name: str, *, workers: int, min_workers: int, ordered: bool) -> Pool:
        """Return a pool with workers of its own. Raises ValidationError when there are too many already."""
        spec = replace(self.pool.spec, name=name, workers=workers, min_workers=min_workers)
        first = self._take(workers)
        return Pool(self.pool.flow, self.pool.task, spec, ordered=ordered, host=self.pool, first=first)

    def dismiss(self, guest: Pool) -> None:
        """End a guest and its workers."""
        guest.close()
        with self._lock:
            if guest.host is self.pool:
                self._returned.append((guest.first, guest.spec.workers))

    def renew(self) -> None:
        """Put another session in the place of one that is lost with its machine; one that is there stays.

        Raises what `Pool.open` raises.
        """
        with self._lock:
            pool = self.pool
            if not pool.flow.engine.poll([pool.task_id])[pool.task_id].status.final:
                return
            while pool.over is None:  # its keeper learns of it presently
                pool.keeper.rest(0.005)
            if pool.gone:
                log.warning("the session %s is begun anew: %s", pool.task_id, pool.over)
                self.pool = Pool.open(pool.flow, pool.spec)
                self._unused = pool.spec.workers
                self._returned.clear()

    def _take(self, count: int) -> int:
        """Return the first of `count` numbers in a row that nobody has.

        One is used again only when all others have been: the process that had it may take a moment to end.
        """
        with self._lock:
            if self._unused + count <= MAX_WORKERS:
                self._unused += count
                return self._unused - count
            for first, length in self._returned:
                if length >= count:
                    self._returned.remove((first, length))
                    if length > count:
                        self._returned.append((first + count, length - count))
                    return first
        raise ValidationError(
            f"a session has at most {MAX_WORKERS} workers at a time, and {count} more are asked for",
            suggestions=["Close services that are not needed any more."],
        )


@dataclass(frozen=True)
class Shape:
    """How many workers a service has, and whether it is one live object. Raises ValidationError for what cannot be."""

    autoscale: bool | None
    warmup: int
    max_restarts: int
    is_function: bool

    def __post_init__(self) -> None:
        for option in ("warmup", "max_restarts"):
            if getattr(self, option) < 0:
                raise ValidationError(f"{option}={getattr(self, option)} must be at least 0")
        if self.max_restarts and not self.single:
            raise ValidationError(
                f"max_restarts={self.max_restarts} is for one live object; workers of a pool are replaced anyway",
                suggestions=["Leave it out."],
            )

    @property
    def single(self) -> bool:
        """Whether the service is one live object."""
        return not self.is_function and self.autoscale is not True and self.warmup <= 1

    @property
    def shared(self) -> bool:
        """Whether the session's own pool will do."""
        return self.is_function and self.autoscale is None and not self.warmup

    def bounds(self, usual: int) -> tuple[int, int]:
        """Return the least and the most workers of a pool that may usually grow to `usual`."""
        if self.autoscale is False:
            return max(1, self.warmup), max(1, self.warmup)
        return self.warmup, max(usual, self.warmup)


class ServiceWorkers:
    """The workers of one service."""

    def __init__(self, session: SharedSession, live: LiveObject, shape: Shape) -> None:
        self.maker = _maker(live, shape)
        self._session = session
        self._live = live
        self._shape = shape
        self._restarts_left = shape.max_restarts
        self._lock = threading.Lock()
        self._closed = False
        self._made: Future | None = None
        self._pool = self._make_object() if shape.single else self._open(shape)

    def _open(self, shape: Shape) -> Pool:
        if shape.shared:
            return self._session.pool
        least, most = shape.bounds(self._session.pool.spec.workers)
        pool = self._session.guest(self._live.name, workers=most, min_workers=least, ordered=False)
        if not self._live.is_function:
            touch = Definition(b"", self._live.name, codec="pickle", kind="touch", of=self.maker)
            for _ in range(least):
                pool.submit(touch)
        return pool

    def _make_object(self) -> Pool:
        """Start a worker and have it make the object. A failure ends what waits for the object, and the worker."""
        pool = self._session.guest(self._live.name, workers=1, min_workers=1, ordered=True)
        self._made = pool.submit(self.maker, self._live.args, self._live.kwargs)
        self._made.add_done_callback(lambda made: pool.end(made.error) if made.error is not None else None)
        return pool

    def call(self, definition: Definition, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Future:
        """Start a call; return its future. Raises SerializationError, SessionClosedError, WorkerDiedError.

        Of an object that could not be made: raises what making it has raised.
        """
        while not self._closed:
            pool = self._pool
            try:
                return pool.submit(definition, args, kwargs, _BY_REFERENCE)
            except SessionClosedError as refusal:
                self._revive(pool, refusal)
        raise SessionClosedError(
            f"the service {self._live.name!r} is closed", suggestions=["Make a new one with Runner.service."]
        )

    def _revive(self, pool: Pool, refusal: SessionClosedError) -> None:
        """Put a new object in the place of a lost one. Raises the error that says why there is none."""
        name, cause = self._live.name, refusal.__cause__
        with self._lock:
            if self._pool is not pool or self._closed:
                return  # another thread has
            if self._made is not None and self._made.done() and self._made.error is not None:
                raise copy.copy(self._made.error) from cause
            if not isinstance(cause, FlowError) or isinstance(cause, SessionClosedError):
                raise refusal
            if not self._shape.single:
                self._session.renew()
                if not pool.gone:
                    raise refusal
                self._pool = self._open(self._shape)
                return
            if self._restarts_left <= 0:
                raise WorkerDiedError(
                    f"the state of the service {name!r} is lost: {cause.message}",
                    suggestions=["Make a new service, or let it begin anew by itself with max_restarts=1."],
                    task_id=pool.task_id,
                ) from cause
            self._restarts_left -= 1
            log.warning("the object of the service %r is made anew: %s", name, cause.message)
            self._session.dismiss(pool)
            self._session.renew()
            self._pool = self._make_object()

    @property
    def closed(self) -> bool:
        """Whether the service was closed."""
        return self._closed

    def close(self) -> None:
        """End the workers that are this service's alone. Calls that have not ended are cancelled. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._pool is not self._session.pool:
                self._session.dismiss(self._pool)


def _maker(live: LiveObject, shape: Shape) -> Definition:
    if live.is_function:
        return live.function()
    return live.made_once() if shape.single else live.made_on_each()
