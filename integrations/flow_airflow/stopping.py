"""Cancels a node's work from wherever Airflow asks: a signal handler, a timeout, another thread."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from flow_airflow.compat import AirflowException, supervisor_answers_threads
from flow_airflow.nodes import will_retry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flow_core import Flow, Task

logger = logging.getLogger(__name__)

#: A task that Airflow shows in one of these while it ends the try has not been ended by anybody: its worker
#: shuts down, or was given up although it lives, and a later try runs already or comes.
_NOBODYS_WISH = ("running", "queued", "scheduled", "up_for_retry", None)


def next_try_takes_over(context: Mapping[str, Any]) -> bool:
    """Whether the try that Airflow ends right now is followed by one that adopts its work.

    Airflow ends a try by the same signal when a user marks or clears the task and when the worker shuts down,
    or has not reached the API for long. Only the state that the API shows tells. Where it does not answer,
    no user's wish can be known, and the next try finds the work.
    """
    if not will_retry(context) or not supervisor_answers_threads():
        return False
    ti = context["ti"]
    try:
        found = ti.get_task_states(
            dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
        )
    except Exception:
        logger.exception("Airflow does not say why it ends this try; its work is left to the next one.")
        return True
    states = found.get(ti.run_id, {})
    return next(iter(states.values()), None) in _NOBODYS_WISH


class Stop:
    """A request to end the work under `key`, at most once, unless somebody `takes_over`.

    A thread of its own with a Flow of its own does it: the handler of a signal runs in the middle of whatever
    the main thread is doing, which may hold a lock that an engine call, or a question to Airflow, needs.
    """

    def __init__(self, connect: Callable[[], Flow], key: str, takes_over: Callable[[], bool]) -> None:
        self._connect = connect
        self._key = key
        self._takes_over = takes_over
        self._thread: threading.Thread | None = None
        self._left = False

    def request(self, *, ask: bool) -> None:
        """Begin to cancel and return at once. With `ask` the work is left to whoever takes it over."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._end, args=(ask,), name="flow-cancel", daemon=True)
            self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Return when what was requested is done, or after `timeout_s`."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def check(self) -> None:
        """Do nothing unless a stop was requested; then finish it and raise."""
        if self._thread is None:
            return
        self._thread.join(30.0)
        if self._left:
            raise AirflowException(
                "Airflow ended this try. Its work goes on, and the next try takes it over."
            )
        # Once more: a submit that was under way during the first time has come to its end by now.
        self._cancel()
        raise AirflowException("Airflow ended this task, and its work was cancelled.")

    def _end(self, ask: bool) -> None:
        self._left = ask and self._takes_over()
        if not self._left:
            self._cancel()

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
