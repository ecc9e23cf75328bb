"""What a step holds of a task that it has started: wait for it, read it, stop it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from flow_core import TaskStatus
from flow_core.errors import FlowError, FlowTimeoutError
from flow_dagster.call import Call
from flow_dagster.failures import as_failure
from flow_dagster.metadata import Seen, describe
from flow_dagster.watch import cancel, interruptible, wait


@dataclass(frozen=True)
class FlowResult:
    """How a command ended. `metadata` holds the `flow/*` values that Dagster shows as well."""

    task_id: str
    status: TaskStatus
    exit_code: int | None
    metadata: dict[str, Any]
    log_tail: str


class FlowHandle:
    """A task started by `FlowResource.submit` or `invoke_async`. Used by one thread: the one that runs the step."""

    def __init__(self, call: Call, *, returns_value: bool) -> None:
        self._call, self._returns_value = call, returns_value
        self._end: Seen | None = None

    def __repr__(self) -> str:
        return f"<FlowHandle {self.task_id}>"

    @property
    def task_id(self) -> str:
        """The id, with which any other process finds the task again."""
        return self._call.task.task_id

    @property
    def status(self) -> TaskStatus:
        """What is known of the task now."""
        return self._call.task.status if self._end is None else self._end.snapshot.status

    def logs(self, tail: int = 100) -> str:
        """Return the last `tail` lines that the task has printed so far."""
        return self._call.task.logs(tail=tail)

    def cancel(self) -> None:
        """Stop the task; after return its last process is gone. A task that has ended is left alone."""
        cancel(self._call.flow, [self.task_id])
        self._call.task.refresh()  # what it last saw may be younger than its poll interval, and is no longer true

    def wait(self, timeout: float | None = None) -> FlowResult:
        """Block until the task has succeeded, and show what it prints as the step's own output.

        Its metadata is then on the step's outputs. Raises dg.Failure, with the same metadata, when the task ended
        without success; FlowTimeoutError after `timeout` seconds: the task goes on. If the user ends the run meanwhile,
        the task is cancelled; if only this process is interrupted, it goes on and a retry of the step gets it again.
        """
        if self._end is None:
            self._end = self._wait(timeout)
            self._call.step.attach(describe(self._call.step.ends()))
        metadata = describe([self._end])
        if self._end.error is not None:
            raise as_failure(self._end.error, metadata) from self._end.error
        seen = self._end.snapshot
        return FlowResult(seen.task_id, seen.status, seen.exit_code, metadata, self.logs(20))

    def result(self, timeout: float | None = None) -> Any:
        """Wait like `wait`; return the function's value, or the FlowResult of a command."""
        ended = self.wait(timeout)
        if not self._returns_value:
            return ended
        try:
            return self._call.value()
        except FlowError as error:
            raise as_failure(error, ended.metadata) from error

    def _wait(self, timeout: float | None) -> Seen:
        call, deadline = self._call, None if timeout is None else time.monotonic() + timeout
        with interruptible(call.flow, call.step, lambda: [self.task_id]):
            while True:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise FlowTimeoutError(
                        f"waited {timeout:g} s and task {self.task_id} is {self.status.value}",
                        suggestions=["The work goes on: wait again, or stop it with cancel()."],
                    )
                ended = wait(call.flow, {self.task_id: call.echo}, timeout=left)
                if ended:
                    return call.end(ended[self.task_id])
