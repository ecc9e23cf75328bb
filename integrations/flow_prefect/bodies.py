"""Runs the bodies of one flow run's tasks on machines with GPUs, through flow_core.

Owns the keys, the watch over each body, and the end of all of them. A body is submitted, watched and stopped from its
task run's own thread, in slices of a tenth of a second; nothing else touches it, so whatever ends that thread's work
(a time-out, a cancelled flow, an error of ours) also ends the work on the machine.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from prefect.client.schemas import TaskRun
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from prefect.utilities.hashing import hash_objects

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
from flow_prefect.logs import LogPump, stand_ins

log = logging.getLogger(__name__)

#: How long a body's thread may be away from the questions whether it must stop and whether its time is up.
SLICE_S = 0.1

#: A silent body's log is looked at less and less often, down to this.
_SELDOM_S = 1.0

#: How much later than Prefect's own time-out the machine stops a body that nobody watches any more.
_BACKSTOP_S = 30.0
_LONGEST_H = 168.0

_RUN_LABEL = "prefect/flow_run_id"


class BodyStopped(BaseException):
    """The body was stopped on purpose, so its task run ends Crashed, and no retry starts it again."""


class Bodies:
    """All bodies that one running task runner is responsible for."""

    def __init__(self, flow: Callable[[], Flow]) -> None:
        self._make_flow = flow
        self._flow: Flow | None = None
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._running: dict[str, str] = {}  # task id by key
        self._ended: list[str] = []
        self._flow_run_id: str | None = None
        self._again = False
        self.stop_reason: str | None = None

    @property
    def flow(self) -> Flow:
        """The connection to the provider, made when it is first needed. Raises what `Flow()` raises."""
        with self._lock:
            if self._flow is None:
                self._flow = self._make_flow()
            return self._flow

    def belongs_to(self, flow_run_id: uuid.UUID | None, run_count: int) -> None:
        """Learn whose bodies these are, and whether an earlier process has executed the same flow run."""
        self._flow_run_id = None if flow_run_id is None else str(flow_run_id)
        self._again = run_count > 1

    def key(
        self, task_run: TaskRun, source: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> str:
        """Return what makes a body the same one when its flow run is executed again.

        It is made of the flow run, the task, its source and arguments, and a number among calls that are
        equal in all of that (they are interchangeable, so their order does not matter). Not of the try: a try
        that follows a failure, in whatever process, is the next attempt at the same key. Outside of a flow,
        or when the arguments have no stable hash, no later run can be the same.
        """
        inputs = hash_objects(args, dict(kwargs), source or "")
        if task_run.flow_run_id is None or inputs is None:
            return f"prefect/{task_run.id}"
        same = f"prefect/{task_run.flow_run_id}/{task_run.task_key}/{inputs}"
        with self._lock:
            self._calls[same] += 1
            return f"{same}/{self._calls[same]}"

    def started(self, key: str, task_id: str) -> None:
        """Note a body that may be running."""
        with self._lock:
            self._running[key] = task_id

    def ended(self, key: str, *, succeeded: bool) -> None:
        """Note that a body is over, or was asked to stop."""
        with self._lock:
            task_id = self._running.pop(key, None)
            if succeeded and task_id is not None:
                self._ended.append(task_id)

    def count(self) -> int:
        """Return how many bodies may be running."""
        with self._lock:
            return len(self._running)

    def stop(self, reason: str) -> None:
        """Stop all bodies, now and in time to come. After return none will go on. Idempotent."""
        self.stop_reason = self.stop_reason or reason
        with self._lock:
            running = list(self._running.values())
        if running:
            try:
                self.flow.cancel(running)
            except FlowError:  # each body's own thread tries again
                log.warning("could not stop %d GPU tasks at once", len(running), exc_info=True)

    def close(self, *, succeeded: bool) -> None:
        """End what an earlier process left running and nobody asked for again; free the results of a success."""
        try:
            if self._again and self._flow is not None:
                self._flow.cancel(self._left_over(self._flow))
            if succeeded and self._flow is not None and self._ended:
                self._flow.release(self._ended)
        except FlowError:
            log.warning("could not clean up after flow run %s", self._flow_run_id, exc_info=True)

    def _left_over(self, flow: Flow) -> list[str]:
        with self._lock:
            ours = {*self._running.values(), *self._ended}
        tasks = [task.snapshot for task in flow.list_tasks(limit=1000)]
        mine = [
            seen
            for seen in tasks
            if seen.labels.get(_RUN_LABEL) == self._flow_run_id and not seen.status.final
        ]
        return [seen.task_id for seen in mine if seen.task_id not in ours]


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
        self.task: InvokeTask | None = None
        self.task_run: TaskRun | None = None

    def stop(self, reason: str) -> None:
        """Stop this body, or keep it from starting; its own thread sees to it within a slice."""
        self._stop_reason = self._stop_reason or reason

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the function there and return its value, or raise what says how it ended. Called by Prefect's engine.

        Raises TimeoutError when the task's `timeout_seconds` are over, BodyStopped when it was stopped; then, and
        whatever else is raised, the machine has been told to stop.
        """
        self.task_run = _task_run()
        args, kwargs = plain(args), plain(dict(kwargs))
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        key = self._key = self._key or self._bodies.key(self.task_run, self._source, args, kwargs)
        succeeded = False
        try:
            self._check(deadline)
            self._submit(key, args, kwargs)
            value = self._watch(deadline)
            succeeded = True
        finally:
            if not succeeded:
                self._stop_there(key)
            self._bodies.ended(key, succeeded=succeeded)
        return value

    def _submit(self, key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        before = self.task
        self.task = None
        self.task = self._bodies.flow.call_async(
            self._function,
            args,
            kwargs,
            replace=stand_ins(),
            idempotency_key=key,
            **self._asked(),
        )
        self._bodies.started(key, self.task.task_id)
        again = "" if before is None else f", after {before.task_id}"
        provider = self._bodies.flow.provider.name
        get_run_logger().info("GPU task %s submitted to provider %r%s", self.task.task_id, provider, again)

    def _asked(self) -> dict[str, Any]:
        asked = dict(self._options)
        run = self.task_run
        if run is not None:
            mine = {"prefect/task_run_id": str(run.id), "prefect/task": run.task_key}
            if run.flow_run_id is not None:
                mine[_RUN_LABEL] = str(run.flow_run_id)
            asked["labels"] = {**mine, **asked.get("labels", {})}
        if self._timeout_s is not None:
            limit = min((self._timeout_s + _BACKSTOP_S) / 3600, _LONGEST_H)
            asked["max_run_time_hours"] = min(limit, asked.get("max_run_time_hours") or limit)
        return asked

    def _watch(self, deadline: float | None) -> Any:
        """Carry the log over and look at the time until the task has ended and all of its log is read."""
        assert self.task is not None
        pump = LogPump(get_run_logger())
        look, interval = 0.0, SLICE_S
        while True:
            ended = self._wait(self.task)
            try:
                if ended or time.monotonic() >= look:
                    anything, complete = self._pump(pump, self.task, ended=ended)
                    if complete:
                        return self._value(self.task)
                    interval = SLICE_S if anything else min(interval * 1.5, _SELDOM_S)
                    look = time.monotonic() + interval
            except ProviderUnavailable as error:
                log.warning("%s cannot be read now, asking again: %s", self.task.task_id, error.message)
                time.sleep(SLICE_S)
            self._check(deadline)

    @staticmethod
    def _wait(task: InvokeTask) -> bool:
        with suppress(FlowTimeoutError):
            task.wait(SLICE_S)
            return True
        return False

    @staticmethod
    def _pump(pump: LogPump, task: InvokeTask, *, ended: bool) -> tuple[bool, bool]:
        try:
            return pump.pump(task)
        except TaskNotFoundError:  # the machine has forgotten it: `_value` says so
            return False, ended

    def _value(self, task: InvokeTask) -> Any:
        seen = task.snapshot
        where, ran = ", ".join(seen.hosts) or "its machine", _seconds(seen.started_at, seen.ended_at)
        get_run_logger().info("GPU task %s %s on %s%s", task.task_id, seen.status.value, where, ran)
        try:
            return task.result(SLICE_S)
        except TaskCancelledError as error:
            raise BodyStopped(f"GPU task {task.task_id} was cancelled") from error
        except RemoteExecutionError as error:
            if error.exception_module == "builtins" and error.exception_type in (
                "SystemExit",
                "KeyboardInterrupt",
            ):
                raise _interruption(error) from error
            raise

    def _check(self, deadline: float | None) -> None:
        reason = self._stop_reason or self._bodies.stop_reason
        if reason is not None:
            raise BodyStopped(reason)
        if deadline is not None and time.monotonic() >= deadline:
            where = "" if self.task is None else f" ({self.task.task_id}, {self.task.status.value})"
            raise TimeoutError(
                f"timeout_seconds={self._timeout_s:g} are over; the GPU task{where} is being stopped"
            )

    def _stop_there(self, key: str) -> None:
        """Tell the machine to stop, also when we never learned whether it has started."""
        task = self.task
        try:
            if task is None:
                found = self._bodies.flow.find(key)
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
