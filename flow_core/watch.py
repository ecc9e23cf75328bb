"""One question for all who wait: which tasks the threads of this process wait for, and what was last said of each.

Never sleeps and starts no thread: whoever finds an answer too old asks for everybody, the others take what it brings.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import Counter
from collections.abc import Collection
from typing import Protocol

from flow_core.errors import ProviderUnavailable
from flow_core.models import Snapshot
from flow_core.providers.spi import Bell, Provider

log = logging.getLogger("flow_core")


class Clock(Protocol):
    """Time, as far as the engine needs it."""

    def now(self) -> float:
        """Return seconds on a clock that only goes forward."""

    def sleep(self, seconds: float, bell: Bell | None = None) -> bool:
        """Wait, at most until the bell rings; return whether it did."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()

    def sleep(self, seconds: float, bell: Bell | None = None) -> bool:
        """Call `time.sleep`, or poll(2) where there is a bell."""
        if bell is None:
            time.sleep(seconds)
            return False
        ears = select.poll()
        ears.register(bell, select.POLLIN)
        end = self.now() + seconds
        while ears.poll(max(0.0, end - self.now()) * 1000):
            if bell.heard():
                return True
        return False


class Watch:
    """The tasks that are waited for, and the latest snapshot of each. Thread-safe."""

    def __init__(self, provider: Provider, clock: Clock) -> None:
        self.provider = provider
        self.clock = clock
        self._wanted: Counter[str] = Counter()
        self._seen: dict[str, tuple[float, Snapshot]] = {}
        self._table = threading.Lock()
        self._asking: object | None = None
        self._silent_at: float | None = None  # when the provider last failed to answer, None once it has

    def ask(self, task_ids: Collection[str]) -> dict[str, Snapshot]:
        """Ask the provider now, and remember its answer for those who wait."""
        unique = list(dict.fromkeys(task_ids))
        answer = dict(self.provider.poll(unique)) if unique else {}
        now = self.clock.now()
        with self._table:
            self._seen.update(
                (task_id, (now, seen)) for task_id, seen in answer.items() if task_id in self._wanted
            )
        return answer

    def answers(self, task_ids: Collection[str]) -> bool:
        """Ask now, whoever else is asking; return whether the provider has answered."""
        try:
            self.ask(task_ids)
        except ProviderUnavailable:
            return False
        return True

    def interest(self, task_ids: Collection[str]) -> Interest:
        """Return a context in which these tasks are among those that are asked for."""
        return Interest(self, list(task_ids))

    def add(self, task_ids: Collection[str]) -> None:
        """Count one more who waits for these tasks."""
        with self._table:
            self._wanted.update(task_ids)

    def drop(self, task_ids: Collection[str]) -> None:
        """Count one less, and forget what nobody waits for any more."""
        with self._table:
            self._wanted.subtract(task_ids)
            for task_id in set(task_ids):
                if self._wanted[task_id] <= 0:
                    del self._wanted[task_id]
                    self._seen.pop(task_id, None)

    def look(self, task_ids: Collection[str], *, max_age_s: float) -> dict[str, Snapshot]:
        """Return what is known, asking the provider only if our answers are old and nobody else is asking already."""
        if self._stale(task_ids, max_age_s):
            turn = object()
            try:
                with self._table:
                    self._asking = self._asking or turn
                if self._asking is turn:
                    self._ask_for_all(max_age_s)
            finally:  # a lock would stay taken for ever after an interrupt between its acquire and the try
                if self._asking is turn:
                    self._asking = None
        with self._table:
            return {task_id: self._seen[task_id][1] for task_id in task_ids if task_id in self._seen}

    def _ask_for_all(self, max_age_s: float) -> None:
        """Ask for all that anybody waits for, but not at once again after no answer."""
        if self._silent_at is not None and self.clock.now() - self._silent_at < max_age_s:
            return
        with self._table:
            wanted = [
                one for one in self._wanted if one not in self._seen or not self._seen[one][1].status.final
            ]
        try:
            self.ask(wanted)
        except ProviderUnavailable as error:
            if self._silent_at is None:
                log.warning(
                    "the %s provider does not answer, asking again: %s", self.provider.name, error.message
                )
            self._silent_at = self.clock.now()
        else:
            if self._silent_at is not None:
                log.warning("the %s provider answers again", self.provider.name)
            self._silent_at = None

    def _stale(self, task_ids: Collection[str], max_age_s: float) -> bool:
        now = self.clock.now()
        with self._table:
            known = [self._seen.get(task_id) for task_id in task_ids]
        return any(one is None or (not one[1].status.final and now - one[0] >= max_age_s) for one in known)


class Interest:
    """Keeps tasks on the list while somebody waits for them. A class, since an interrupt may come at any line."""

    def __init__(self, watch: Watch, task_ids: list[str]) -> None:
        self.watch, self.task_ids = watch, task_ids

    def __enter__(self) -> None:
        self.watch.add(self.task_ids)

    def __exit__(self, *_exc: object) -> None:
        self.watch.drop(self.task_ids)
