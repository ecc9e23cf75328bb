"""How a worker's death, or the end of a call's time, reads to the one who waits for the call. Pure."""

from __future__ import annotations

import signal as signals
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flow_core.errors import (
    CallTimeoutError,
    FlowError,
    TaskExecutionError,
    TaskOutOfMemoryError,
    WorkerDiedError,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flow_core.errors import TaskErrorFields


#: Ends of a task whose usual advice is to submit it again, which is not for those who call a session.
_REASONS_OF_TASKS = ("runner-died", "reboot", "node-failed", "preempted")


def death(what: str, report: Mapping[str, Any], task_id: str) -> FlowError:
    """Return the error for a worker that is gone; `report` is the supervisor's word about it, or empty."""
    number, code, reason = report.get("signal"), report.get("code"), str(report.get("reason", "runner-died"))
    fields: TaskErrorFields = {
        "task_id": task_id,
        "log_tail": str(report.get("tail", "")),
        "reason": reason,
        "signal": number,
        "exit_code": code,
    }
    if reason == "out-of-memory":
        advice = "Use smaller batches, or an instance with more memory."
        text = f"{what}: the kernel killed it because memory ran out"
        fields["suggestions"] = [advice]
        return TaskOutOfMemoryError(text, **fields)
    if number is not None:
        name = signals.Signals(number).name if number in list(signals.Signals) else str(number)
        how = f"killed by {name}"
    else:
        how = "the connection to it was lost" if code is None else f"it ended with exit code {code}"
    advice = "Other calls are not affected. Ask for retries= if the call may be made again."
    fields["suggestions"] = [advice]
    return WorkerDiedError(f"{what}: {how}", **fields)


def death_with_session(error: TaskExecutionError, state_of: str = "") -> TaskExecutionError:
    """Return what the end of a session's task is for its calls: their worker's death, unless more is known.

    `state_of` is the object whose state was there, if there was one.
    """
    kind = type(error)
    if kind not in (TaskExecutionError, WorkerDiedError, TaskOutOfMemoryError):
        return error
    advice = [] if error.reason in _REASONS_OF_TASKS else error.suggestions
    what, further = (
        "the session is gone",
        "Call again: workers are started anew. With retries= a session does that by itself.",
    )
    if state_of:
        what = f"the session that held the state of {state_of!r} is gone, and the state with it"
        further = "Make a new service, or let it begin anew by itself with max_restarts=1."
    return (kind if kind is TaskOutOfMemoryError else WorkerDiedError)(
        f"{what}: {error.message}",
        suggestions=[*advice, further],
        task_id=error.task_id,
        exit_code=error.exit_code,
        signal=error.signal,
        reason=error.reason,
        log_tail=error.log_tail,
    )


def timed_out(name: str, limit_s: float | None, **fields: Unpack[TaskErrorFields]) -> CallTimeoutError:
    """Return the error for a call that was stopped at its limit."""
    return CallTimeoutError(f"the call {name!r} was stopped at its limit of {limit_s or 0:g} s", **fields)
