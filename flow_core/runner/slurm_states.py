"""What Slurm's word for a job means for its task. Pure: one table, and what the records add to it. Stdlib, Python 3.8+.

The exit record of our own runner has the last word and never comes here. A job that has ended without one gets its
record from `verdict`; for one that has not, `standing` says where it is. A state that is in neither table is no end.
"""

from __future__ import annotations

import signal
from typing import Any, NamedTuple

from .slurm_text import Job
from .task import exit_record

#: Native states of jobs that go on: the status of the task (a value of flow_core.status.TaskStatus).
_LIVE = {
    "PENDING": "pending",
    "CONFIGURING": "provisioning",
    "POWER_UP_NODE": "provisioning",
    "RUNNING": "running",
    "COMPLETING": "running",
    "STAGE_OUT": "running",
    "SIGNALING": "running",
    "RESIZING": "running",
    "UPDATE_DB": "running",
    "REQUEUED": "preempted",
    "REQUEUE_FED": "preempted",
    "EXPEDITING": "preempted",
    "SUSPENDED": "paused",
    "STOPPED": "paused",
    "REQUEUE_HOLD": "paused",
    "SPECIAL_EXIT": "paused",
    "RESV_DEL_HOLD": "paused",
}

#: Native states that are ends: (reason of the exit record, what happened).
_ENDS = {
    "COMPLETED": ("runner-died", "completed"),
    "FAILED": ("runner-died", "failed"),
    "CANCELLED": ("cancelled", "was cancelled"),
    "TIMEOUT": ("time-limit", "was stopped at Slurm's time limit"),
    "DEADLINE": ("time-limit", "was stopped at its deadline"),
    "OUT_OF_MEMORY": ("out-of-memory", "used more memory than it had asked for"),
    "NODE_FAIL": ("node-failed", "lost a node"),
    "BOOT_FAIL": ("node-failed", "was given a node that did not boot"),
    "PREEMPTED": ("preempted", "was preempted and is not started again"),
}

#: Reasons of a pending job that somebody must release first.
_HELD = ("JobHeld", "job_requeued_in_held", "JobHoldMaxRequeue", "launch_failed_requeued_held")

#: What is printed where a memory limit was passed. Slurm itself often calls this end a plain failure.
_OUT_OF_MEMORY = (
    "exceeded memory limit",
    "exceeded job memory limit",
    "exceeded step memory limit",
    "oom-kill",
    "oom_kill",
)


class Standing(NamedTuple):
    """Where a task is that goes on; a status of None says that this is not known."""

    status: str | None
    message: str


def ended(job: Job) -> bool:
    """Whether a job can never run again by itself."""
    return job.state in _ENDS


def standing(job: Job, facts: dict[str, Any]) -> Standing:
    """Say where a task is whose job goes on."""
    status = _LIVE.get(job.state)
    words = " ".join(part for part in (job.state, f"({job.reason})" if job.reason else "") if part)
    started = facts["started"]
    if status == "pending":
        if job.reason.replace(" ", "_").startswith(_HELD):
            status = "paused"
        elif job.restarts or facts["claimed"]:
            status = "preempted"
    elif status == "running" and (started is None or started.get("incarnation", 0) < job.restarts):
        status = "provisioning"
    return Standing(status, f"Slurm job {job.id}: {words}")


def preemptions(job: Job | None, facts: dict[str, Any]) -> int:
    """Count how often the task was started again, or waits for that."""
    noted = [int((facts[name] or {}).get("incarnation", 0)) for name in ("owner", "started", "interrupted")]
    return max(*noted, job.restarts if job is not None else 0)


def verdict(job: Job | None, facts: dict[str, Any], output: str) -> dict[str, Any]:
    """Write the exit record of a task whose job has ended without one. `job` is None where nobody knows it any more.

    `output` is the end of what the batch script printed.
    """
    asked, noted = facts["cancel"], facts["interrupted"] or {}
    more = {
        name: noted[name] for name in ("started_at", "run_s", "peak_memory_bytes", "gpu_use") if name in noted
    }
    more["preemptions"] = preemptions(job, facts)
    if job is None:
        known = facts["job"] or "of this task"
        how = f": its runner was ended by {_named(noted['signal'])}" if noted.get("signal") else ""
        message = f"Slurm does not know job {known} any more, and no exit record was left{how}"
        return exit_record("cancelled" if asked else "runner-died", message=message, **more)
    reason, what = _ENDS[job.state]
    message = f"Slurm job {job.id} {what}" + (f" ({job.reason})" if job.reason else "")
    if asked:
        reason, message = (
            "cancelled",
            "cancelled " + ("while it ran" if facts["started"] else "before it started"),
        )
    elif job.reason == "DependencyNeverSatisfied" or (
        job.state == "CANCELLED" and job.reason == "Dependency"
    ):
        reason, message = (
            "dependency",
            f"Slurm job {job.id} can never start: a job that it depends on has failed",
        )
    elif job.state in ("FAILED", "COMPLETED"):
        reason, message = _failed(job, facts, output)
    # A node that is gone has reported nothing: newer Slurms (24.11) show a 1 all the same.
    code, number = (0, 0) if reason == "node-failed" else (job.code, job.signal)
    return exit_record(reason, code=code or None, signal=number or None, message=message, **more)


def _failed(job: Job, facts: dict[str, Any], output: str) -> tuple[str, str]:
    if any(words in output.lower() for words in _OUT_OF_MEMORY):
        return "out-of-memory", f"Slurm job {job.id} used more memory than it had asked for"
    what = f"was killed by {_named(job.signal)}" if job.signal else f"ended with exit code {job.code}"
    known = job.reason in ("", "NonZeroExitCode") or job.reason.startswith("RaisedSignal")
    what += "" if known else f" ({job.reason})"
    if facts["owner"] is None:
        said = f"; it had printed: {output.strip()[-400:]}" if output.strip() else ""
        return (
            "start-failed",
            f"the batch script of Slurm job {job.id} {what} before the task was started{said}",
        )
    return "runner-died", f"the runner in Slurm job {job.id} {what} and left no exit record"


def _named(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
