"""One task's body on its machine: submitted, watched, and stopped whatever happens.

All of it is done by the task run's own thread, so whatever ends that thread's work (a time-out, a cancelled flow, an
error of ours) also ends the work on the machine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from prefect.client.schemas import TaskRun
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from flow_core import (
    Flow,
    FlowTimeoutError,
    InvokeTask,
    ProviderUnavailable,
    RemoteExecutionError,
    TaskCancelledError,
    TaskNotFoundError,
)
from flow_core.errors import FlowError
from flow_prefect.arguments import plain
from flow_prefect.bodies import RUN_LABEL, Bodies
from flow_prefect.logs import LogPump, stand_ins

log = logging.getLogger(__name__)

#: A body's log is looked at this often while it talks, and less and less often while it is silent.
_OFTEN_S = 0.1
_SELDOM_S = 1.0

#: How much later than Prefect's own time-out the machine stops a body that nobody watches any more.
_BACKSTOP_S = 30.0
_LONGEST_H = 168.0

#: What ends a Python program, raised by a body.
_INTERRUPTIONS = ("SystemExit", "KeyboardInterrupt")


class BodyStopped(BaseException):
    """The body was stopped on purpose, so its task run ends Crashed, and no retry starts it again."""


class Body:
    """The function of one task run, called on its machine: once per try, under one key."""

    def __init__(
        self,
        bodies: Bodies,
        function: Callable[..., Any],
        options: Mapping[str, Any],
        *,
        source: str | None,
        timeout_s: float | None,
    ) -> None:
        self._bodies = bodies
        self._function = function
        self._options = dict(options)
        self._source = source
        self._timeout_s = timeout_s
        self._key: str | None = None
        self._stop_reason: str | None = None
        self._wake = threading.Event()
        self.task: InvokeTask | None = None
        self.task_run: TaskRun | None = None

    def stop(self, reason: str) -> None:
        """Stop this body, or keep it from starting; its own thread sees to it. Returns at once."""
        self._stop_reason = self._stop_reason or reason
        self._wake.set()

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the function there and return its value, or raise what says how it ended. Called by Prefect's engine.

        Raises TimeoutError when the task's `timeout_seconds` are over, BodyStopped when it was stopped; then, and
        whatever else is raised, the machine has been told to stop.
        """
        self.task_run = _task_run()
        flow = self._bodies.flow
        args, kwargs = plain(args), plain(dict(kwargs))
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        key = self._key = self._key or self._bodies.key(self.task_run, self._source, args, kwargs)
        succeeded = False
        try:
            self._check(deadline)
            self._submit(flow, key, args, kwargs)
            value = self._watch(deadline)
            succeeded = True
        finally:
            if not succeeded:
                self._stop_there(flow, key)
            self._bodies.ended(self, succeeded=succeeded)
        return value

    def _submit(self, flow: Flow, key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        before = self.task
        self.task = None
        self.task = flow.call_async(
            self._function,
            args,
            kwargs,
            replace=stand_ins(),
            idempotency_key=key,
            **self._asked(),
        )
        self._bodies.started(self, self.task.task_id)
        again = "" if before is None else f", after {before.task_id}"
        get_run_logger().info("GPU task %s at provider %r%s", self.task.task_id, flow.provider.name, again)

    def _asked(self) -> dict[str, Any]:
        asked = dict(self._options)
        run = self.task_run
        if run is not None:
            mine = {"prefect/task_run_id": str(run.id), "prefect/task": run.task_key}
            if run.flow_run_id is not None:
                mine[RUN_LABEL] = str(run.flow_run_id)
            asked["labels"] = {**mine, **asked.get("labels", {})}
        if self._timeout_s is not None:
            limit = min((self._timeout_s + _BACKSTOP_S) / 3600, _LONGEST_H)
            asked["max_run_time_hours"] = min(limit, asked.get("max_run_time_hours") or limit)
        return asked

    def _watch(self, deadline: float | None) -> Any:
        """Sleep, carry the log over and look at the time until the task has ended and all of its log is read."""
        assert self.task is not None
        pump, interval = LogPump(get_run_logger()), _OFTEN_S
        self._bodies.watch.add(self.task.task_id, self._wake)
        try:
            while True:
                self._check(deadline)
                self._wake.wait(interval if deadline is None else min(interval, deadline - time.monotonic()))
                self._wake.clear()
                try:
                    anything, complete = self._pump(pump, self.task)
                    if complete:
                        return self._value(self.task)
                    interval = _OFTEN_S if anything else min(interval * 1.5, _SELDOM_S)
                except FlowTimeoutError:  # its log is complete, and the provider has not told of its end yet
                    continue
                except ProviderUnavailable as error:
                    log.warning("%s cannot be read now, asking again: %s", self.task.task_id, error.message)
                    time.sleep(_OFTEN_S)
        finally:
            self._bodies.watch.remove(self.task.task_id)

    @staticmethod
    def _pump(pump: LogPump, task: InvokeTask) -> tuple[bool, bool]:
        try:
            return pump.pump(task)
        except TaskNotFoundError:  # the machine has forgotten it: `_value` says so
            return False, True

    def _value(self, task: InvokeTask) -> Any:
        """Return the value of a task that has ended. Raises FlowTimeoutError, ProviderUnavailable: ask again."""
        try:
            value = task.result(_OFTEN_S)
        except (FlowTimeoutError, ProviderUnavailable):
            raise
        except TaskCancelledError as error:
            raise BodyStopped(f"GPU task {task.task_id} was cancelled") from error
        except RemoteExecutionError as error:
            self._say_how_it_ended(task)
            if error.exception_module == "builtins" and error.exception_type in _INTERRUPTIONS:
                raise _interruption(error) from error
            raise
        self._say_how_it_ended(task)
        return value

    @staticmethod
    def _say_how_it_ended(task: InvokeTask) -> None:
        seen = task.snapshot
        where, ran = ", ".join(seen.hosts) or "its machine", _seconds(seen.started_at, seen.ended_at)
        get_run_logger().info("GPU task %s %s on %s%s", task.task_id, seen.status.value, where, ran)

    def _check(self, deadline: float | None) -> None:
        reason = self._stop_reason or self._bodies.stop_reason
        if reason is not None:
            raise BodyStopped(reason)
        if deadline is not None and time.monotonic() >= deadline:
            where = "" if self.task is None else f" ({self.task.task_id}, {self.task.status.value})"
            raise TimeoutError(
                f"timeout_seconds={self._timeout_s:g} are over; the GPU task{where} is being stopped"
            )

    def _stop_there(self, flow: Flow, key: str) -> None:
        """Tell the machine to stop, also when we never learned whether it has started."""
        task = self.task
        try:
            if task is None:
                found = flow.find(key)
                task = found if isinstance(found, InvokeTask) else None
            if task is not None and not task.snapshot.status.final:
                task.cancel()
        except TaskNotFoundError:
            return
        except FlowError:
            name = key if task is None else task.task_id
            get_run_logger().error(
                "could not stop GPU task %s: stop it by hand if it is running", name, exc_info=True
            )


def _task_run() -> TaskRun:
    context = TaskRunContext.get()
    if context is None:
        raise RuntimeError("a task's body was called outside of Prefect's engine")
    return context.task_run


def _seconds(start: datetime | None, end: datetime | None) -> str:
    return "" if start is None or end is None else f" after {(end - start).total_seconds():.1f} s"


def _interruption(error: RemoteExecutionError) -> BaseException:
    """What ends a Python program ends the task run as Prefect has it: Crashed, without a retry."""
    if error.exception_type == "SystemExit":
        return SystemExit(error.exit_code)
    return KeyboardInterrupt(error.exception_message)
