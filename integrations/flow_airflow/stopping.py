"""Cancels a node's work from wherever Airflow asks: a signal handler, a timeout, another thread."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from flow_airflow.compat import AirflowException

if TYPE_CHECKING:
    from collections.abc import Callable

    from flow_core import Flow, Task

logger = logging.getLogger(__name__)


class Stop:
    """A request to end the work under `key`, at most once.

    A thread of its own with a Flow of its own does the cancelling: the handler of a signal runs in the middle
    of whatever the main thread is doing, which may hold a lock that an engine call needs.
    """

    def __init__(self, connect: Callable[[], Flow], key: str) -> None:
        self._connect = connect
        self._key = key
        self._requested = False
        self._thread = threading.Thread(target=self._cancel, name="flow-cancel", daemon=True)

    def request(self) -> None:
        """Begin to cancel and return at once."""
        if not self._requested:
            self._requested = True
            self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Return when the cancelling that was requested is done, or after `timeout_s`."""
        if self._requested:
            self._thread.join(timeout_s)

    def check(self) -> None:
        """Do nothing unless a stop was requested; then finish it and raise."""
        if self._requested:
            self._thread.join(30.0)
            # Once more: a submit that was under way during the first time has come to its end by now.
            self._cancel()
            raise AirflowException("Airflow ended this task, and its work was cancelled.")

    def _cancel(self) -> None:
        try:
            cancel_key(self._connect(), self._key)
        except Exception:
            logger.exception("The work could not be cancelled.")


def cancel_key(flow: Flow, key: str) -> Task | None:
    """Cancel the work under `key`; return its task if that had not ended, None when there is nothing to end."""
    task = flow.find(key)
    if task is None or task.is_terminal:
        return None
    task.cancel()
    return task
