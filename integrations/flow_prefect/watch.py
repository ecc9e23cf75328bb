"""One question per tick for all bodies of a runner, however many there are; each body's thread sleeps until its end.

Owns the thread that asks. Knows nothing of Prefect.
"""

from __future__ import annotations

import logging
import threading
import time

from flow_core import Flow, ProviderUnavailable

log = logging.getLogger(__name__)

#: The longest and the shortest time between two questions; a body's end is noticed 5 % late, within these.
_SELDOM_S = 0.5
_OFTEN_S = 0.02

#: Asking takes at most this share of the time, also for a provider that answers slowly.
_SHARE = 0.1


class Watch:
    """Wakes whoever waits for a task when it has ended. Thread-safe; its thread lives while somebody waits."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[threading.Event, float]] = {}
        self._asking = False
        self._new = threading.Event()

    def add(self, task_id: str, wake: threading.Event) -> None:
        """Set `wake` when the task has ended, or when it cannot be watched any more, until `remove`."""
        with self._lock:
            self._waiting[task_id] = wake, time.monotonic()
            self._new.set()
            if not self._asking:
                self._asking = True
                threading.Thread(target=self._run, name="flow-watch", daemon=True).start()

    def remove(self, task_id: str) -> None:
        """Leave a task alone; unknown ones too."""
        with self._lock:
            self._waiting.pop(task_id, None)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._new.clear()
                waiting = dict(self._waiting)
                if not waiting:
                    self._asking = False
                    return
            began = time.monotonic()
            for task_id in self._ended(waiting):
                waiting[task_id][0].set()
            now = time.monotonic()
            youngest = now - max(since for _, since in waiting.values())
            least = max(_OFTEN_S, self._flow.provider.poll_interval_s, (now - began) / _SHARE)
            time.sleep(least)
            self._new.wait(min(0.05 * youngest, _SELDOM_S) - least)  # a new one ends this

    def _ended(self, waiting: dict[str, tuple[threading.Event, float]]) -> list[str]:
        """Return the tasks whose threads must look: ended ones, and all when asking fails for good."""
        try:
            return [task_id for task_id, seen in self._flow.poll(list(waiting)).items() if seen.status.final]
        except ProviderUnavailable as error:
            log.warning("the provider does not answer, asking again: %s", error.message)
            return []
        except Exception:
            log.exception("cannot watch %d GPU tasks", len(waiting))
            return list(waiting)
