"""Calls that another process has made: their outcome lies in the folder of the session's task, whoever asks."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from flow_core import payload
from flow_core.engine import Engine
from flow_core.errors import (
    FlowError,
    ResourceNotFoundError,
    TimeoutError,
    ValidationError,
    WorkerDiedError,
)
from flow_core.flow import Flow
from flow_core.futures import DONE, FAILED, SENT, Future, call_back, ending
from flow_core.ids import TaskId, is_task_id
from flow_core.object_ref import Codec, ObjectRef, task_uri
from flow_core.runner import wire
from flow_core.runner.parcels import Parcel
from flow_core.task_futures import of_task

_ID = re.compile(r"(?P<task>[^:]+):(?P<name>[0-9a-f]{1,32}-[0-9]{1,20})")
_ASK_EVERY_S = 0.1


def future_of(call_id: str, *, serialization: str = "json", **settings: Any) -> Future:
    """Return the future of a call by its id; see `Future.from_id`."""
    found = _ID.fullmatch(call_id)
    if found is None and is_task_id(call_id):
        return of_task(Flow(**settings), call_id, serialization)
    if found is None:
        raise ValidationError(
            f"{call_id!r} is not the id of a call",
            suggestions=["Pass what future.id returned: '<task>:<call>'."],
        )
    flow = Flow(**settings)
    task_id = found["task"]
    flow.engine.get(task_id)
    future = KeptFuture(KeptCalls(flow, task_id, found["name"], serialization))
    future.runs.look(future)
    return future


class KeptFuture(Future):
    """The outcome of a call that another process has made."""

    __slots__ = ()
    runs: KeptCalls

    def __init__(self, runs: KeptCalls) -> None:
        super().__init__(runs)
        self.state, self.kept = SENT, True

    def done(self) -> bool:
        """Whether the call has ended, however it ended."""
        return self.runs.look(self)

    def runs_later(self, function: Callable[[Future], object]) -> bool:
        """Add a callback unless the call has ended. Return whether it will be called."""
        added = super().runs_later(function)
        if added:
            _watcher.add(self)
        return added


class _Watcher:
    """A thread that looks for the outcomes that somebody waits to be called back for, while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: list[KeptFuture] = []

    def add(self, future: KeptFuture) -> None:
        with self._lock:
            self._futures.append(future)
            if len(self._futures) == 1:
                threading.Thread(target=self._run, name="flow-kept", daemon=True).start()

    def _run(self) -> None:
        while True:
            for future in list(self._futures):
                with contextlib.suppress(FlowError):  # the provider cannot answer now
                    future.runs.look(future)
            with self._lock:
                self._futures = [one for one in self._futures if one.state < DONE]
                if not self._futures:
                    return
            time.sleep(_ASK_EVERY_S)


_watcher = _Watcher()


def ref_of(engine: Engine, task_id: str, name: str, timeout: float | None) -> ObjectRef:
    """Return the reference to the value of a kept call that has succeeded, once it is written down.

    Raises TimeoutError; WorkerDiedError where the session has ended without writing it.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    file, attempt = f"{wire.CALLS_FOLDER}/{name}", 0
    while True:
        ended = engine.poll([task_id])[task_id].status.final  # looked at first
        with contextlib.suppress(ResourceNotFoundError):
            data = engine.collect(task_id, file)
            # Of an attempt that failed before the one that succeeded there may be an account for a moment.
            if ended or payload.decode_error(data, task_id=task_id) is None:
                about = payload.describe_result(data, task_id=task_id)
                codec: Codec = "json" if about.codec == "json" else "pickle"
                uri = task_uri(engine.provider.name, task_id, file)
                return ObjectRef(uri=uri, size_bytes=about.size, sha256=about.sha256, codec=codec)
        if ended:
            raise WorkerDiedError(
                f"session {task_id} has ended before the value was written down",
                suggestions=["Ask for object_ref() while the session is open."],
                task_id=task_id,
            )
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"waited {timeout:g} s and the value is not written down yet")
        engine.clock.sleep(min(_ASK_EVERY_S, 0.002 * 2**attempt))
        attempt = min(attempt + 1, 10)


class KeptCalls:
    """Watches one call through the files that its session leaves."""

    def __init__(self, flow: Flow, task_id: str, name: str, serialization: str) -> None:
        self.flow = flow
        self.lock: AbstractContextManager[Any] = threading.RLock()
        self.task_id = task_id
        self._name = name
        self._serialization = serialization

    def drive(self, future: Future, deadline: float | None) -> None:
        """Look until the outcome is there, or the deadline is over."""
        clock = self.flow.engine.clock
        while not self.look(future):
            left = _ASK_EVERY_S if deadline is None else min(_ASK_EVERY_S, deadline - time.monotonic())
            if left <= 0:
                return
            clock.sleep(left)

    def look(self, future: Future) -> bool:
        """Take the outcome in if it is there. Return whether the call has ended."""
        if future.state >= DONE:
            return True
        ended = self.flow.engine.poll([self.task_id])[self.task_id].status.final  # looked at first
        try:
            data = self.flow.engine.collect(self.task_id, f"{wire.CALLS_FOLDER}/{self._name}")
        except ResourceNotFoundError:
            if not ended or self._follow():
                return False
            self._end(
                future,
                WorkerDiedError(
                    f"session {self.task_id} has ended, and left no outcome of this call",
                    suggestions=["Whoever made the call has ended before it, or has closed the session."],
                    task_id=self.task_id,
                ),
            )
            return True
        error: FlowError | None = payload.decode_error(data, task_id=self.task_id)
        if error is None:
            try:
                value = payload.decode_result(
                    data, allow_pickle=self._serialization == "pickle", task_id=self.task_id
                )
            except FlowError as unreadable:
                error = unreadable
            else:
                future.outcome = (value,)
        self._end(future, error)
        return True

    def _follow(self) -> bool:
        """Go on to the attempt in which the session was begun anew; return whether there is one."""
        latest = self.flow.engine.provider.find(TaskId.parse(self.task_id).digest)
        if latest in (None, self.task_id):
            return False
        self.task_id = str(latest)
        return True

    @staticmethod
    def _end(future: Future, error: FlowError | None) -> None:
        with future.runs.lock:
            if future.state >= DONE:
                return
            future.error = error
            due = [(function, future) for function in ending(future, DONE if error is None else FAILED)]
        call_back(due)

    def cancel(self, _: Future) -> bool:
        """A call can only be cancelled by who made it."""
        raise FlowError(
            "this call was made by another process, which alone can cancel it",
            suggestions=[f"End its whole session: flow.cancel([{self.task_id!r}])."],
        )

    def keep(self, _: Future) -> str:
        """Return the id: the outcome is kept already."""
        return f"{self.task_id}:{self._name}"

    def let_stay(self, _: Future) -> None:
        """It is where it is."""

    def refer(self, _: Future, timeout: float | None) -> ObjectRef:
        """Return the reference to the value."""
        return ref_of(self.flow.engine, self.task_id, self._name, timeout)

    def logs(self, future: Future) -> str:
        """Return the end of what the call printed, where it failed."""
        return str(getattr(future.error, "log_tail", ""))

    def decode(self, _: Future, parcel: Parcel) -> Any:
        """Nothing arrives in parcels here."""
        raise AssertionError(parcel)
