"""One wait for the tasks of one step: their output as it comes, and the right end when the step is interrupted."""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping

import dagster as dg

from flow_core import Flow, Task
from flow_core.errors import FlowTimeoutError, ProviderUnavailable, ResourceNotFoundError
from flow_core.models import Snapshot
from flow_dagster.step import Step

#: Output is shown at least this often; an end is noticed as soon as the engine knows.
TICK_S = 0.25

#: How long a cancelled task may take to be gone before the step goes without having seen it.
CANCEL_WAIT_S = 60.0


class Echo:
    """Copies what a task prints to our stdout, which Dagster keeps as the step's compute log. Whole lines only."""

    def __init__(self, task: Task, prefix: str = "") -> None:
        self._task, self._prefix = task, prefix
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._offset, self._rest, self._end = 0, "", False

    def show(self) -> None:
        """Print what has come since the last time. Output that cannot be read now is not lost: the next call has it."""
        with contextlib.suppress(ProviderUnavailable, ResourceNotFoundError):
            while not self._end:
                chunk = self._task.read_log(self._offset)
                self._offset, self._end = chunk.next_offset, chunk.end
                *lines, self._rest = (self._rest + self._decode(chunk.data, chunk.end)).split("\n")
                if chunk.end and self._rest:
                    lines.append(self._rest)
                sys.stdout.writelines(f"{self._prefix}{line}\n" for line in lines)
                if not chunk.data:
                    break
        sys.stdout.flush()


def wait(flow: Flow, echoes: Mapping[str, Echo], *, timeout: float | None = None) -> dict[str, Snapshot]:
    """Show the output of the tasks until one or more have ended; return those.

    Returns after TICK_S with nothing when none has ended, so that the caller can do something else in between.
    """
    for echo in echoes.values():
        echo.show()
    try:
        seen = flow.engine.wait(
            list(echoes), timeout=TICK_S if timeout is None else min(TICK_S, timeout), any_of=True
        )
    except FlowTimeoutError:
        return {}
    ended = {task_id: one for task_id, one in seen.items() if one.status.final}
    for task_id in ended:
        echoes[task_id].show()
    return ended


@contextlib.contextmanager
def interruptible(flow: Flow, step: Step, live: Callable[[], list[str]]) -> Iterator[None]:
    """Cancel the `live` tasks if the user ends the run; if only this process is to go, leave them running.

    Dagster raises the same exception for both, and it passes on. A process that goes because its machine does is
    followed by a retry, which gets the same tasks again.
    """
    try:
        yield
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        tasks = live()
        if tasks and step.ended_by_user():
            step.log.info("The run is being terminated: cancelling %s.", ", ".join(tasks))
            cancel(flow, tasks)
        elif tasks:
            step.log.warning(
                "Interrupted, not terminated by a user: %s left running for a retry.", ", ".join(tasks)
            )
        raise


def cancel(flow: Flow, tasks: list[str]) -> None:
    """Cancel tasks and wait until their last process is gone."""
    flow.cancel(tasks)
    with contextlib.suppress(FlowTimeoutError):
        flow.engine.wait(tasks, timeout=CANCEL_WAIT_S)
