"""The runner of a task that Slurm has started: the scheduler may kill it, and may start the task again.

It differs from the runner of a machine's own tasks in what it knows. Which GPUs it has, the scheduler has decided.
That it is to end, it hears as a signal without a reason: somebody's scancel, a preemption, a node that is drained, a
limit. So it then ends the work, notes that it was interrupted, and leaves the verdict to whoever asks the scheduler:
only that one knows whether the task starts again. Everything that it can tell itself is on record as always.

Standard library only, Python 3.8+. Started by the batch script as ``<runner> batch <task folder>``, or for an element
of an array as ``<runner> batch --list <file>``, whose lines are task folders.
"""

from __future__ import annotations

import os
import select
import signal
import time
import traceback
from typing import Any

from . import proc, task
from .gang import Gang, NodeRank
from .main import Runner, Stopped
from .ranks import Rank, prepare, start_rank
from .spawn import Gate

#: A signal to the whole job reaches the command and its runner in any order; this is how long the other may take.
_SETTLE_S = 0.2

#: The scheduler notices a dead node before it ends the job on the others.
_SETTLE_LOST_S = 10.0


class BatchRunner(Runner):
    """One incarnation of a task under a scheduler."""

    def __init__(self, folder: str, job_id: str, count: int) -> None:
        super().__init__(folder, None)
        self.job_id = job_id
        self.count = count
        self.gang: Gang | None = None
        self.job["env"] = {**inherited(self.job["python"]), **self.job["env"]}

    def wait_for_start(self, _ticket: tuple[str, int] | None) -> list[str]:
        """Return the names of the GPUs that the scheduler gave us: it is our turn."""
        if self.signal or self.asked_to_stop():
            raise Stopped
        return granted_gpus()

    def bury(self) -> bool:
        """End what a killed runner left behind. The record is for those who can ask the scheduler why."""
        proc.kill_members(self.folder)
        return True

    def started(self, granted: list[str]) -> dict[str, Any]:
        """Build the record of the start."""
        record = super().started(granted)
        return {
            **record,
            "job": self.job_id,
            "incarnation": self.count,
            "hosts": [node_name()],
            "partition": os.environ.get("SLURM_JOB_PARTITION", ""),
        }

    def start(self, granted: list[str], gate: Gate) -> list[Rank]:
        """Start the command here, or on every node by the scheduler's own means."""
        cwd = prepare(self.folder, self.job)
        if self.job["num_instances"] == 1 and not self.job["srun"]:
            port = self.job["env"].get("MASTER_PORT", "29500")
            return [start_rank(self.folder, self.job, 0, gate, gpus=granted, port=port, cwd=cwd)]
        self.mark_start(granted)
        self.gang = Gang(self.folder, self.job)
        return list(self.gang.ranks)

    # -- many nodes

    def reap(self) -> bool:
        """Collect ended children, and what the nodes report."""
        if self.gang is not None and self.gang.listen():
            task.write_json(
                self.folder, "started.json", {**self.started(self.gang.gpus), "hosts": self.gang.hosts}
            )
        left = super().reap()
        if self.gang is not None:
            self.peak_kb = max(self.peak_kb, self.gang.peak_kb)
        return left

    def _sleep(self, seconds: float) -> None:
        if self.gang is None or self.gang.ended:
            super()._sleep(seconds)
            return
        select.select([self._bell, self.gang.reports], [], [], seconds)
        try:
            os.read(self._bell, 512)
        except BlockingIOError:
            pass

    def stop(self, grace_s: float) -> None:
        """End all that is left of the task, on every node."""
        if self.gang is not None:
            self.gang.stop(grace_s)
            grace_s += 5.0  # the nodes take theirs, and then a moment
        super().stop(grace_s)

    # -- how it ended

    def watch(self) -> tuple[str, int | None, int | None, str]:
        """Wait for the end, and for a signal that explains it."""
        outcome = super().watch()
        if outcome[0] == "time-limit" or (outcome[:2] == ("exit", 0) and self.signal is None):
            return outcome
        deadline = time.monotonic() + (_SETTLE_LOST_S if outcome[0] == "node-failed" else _SETTLE_S)
        while self.signal is None and not self.asked_to_stop() and time.monotonic() < deadline:
            self._sleep(0.05)
        return outcome if self.signal is None and not self.asked_to_stop() else self._why_stopped()

    def _why_failed(self, rank: Rank) -> tuple[str, int | None, int | None, str]:
        if isinstance(rank, NodeRank):
            reason, code, number, message = rank.verdict
            return reason, code, number, f"node {rank.index} of {len(self.ranks)}: {message}"
        return super()._why_failed(rank)

    @property
    def interrupted(self) -> bool:
        """Whether the scheduler ended it, and nobody had asked for that in the task's folder."""
        return self.signal is not None and not self.asked_to_stop()


def inherited(python: str) -> dict[str, str]:
    """Return the variables of the batch script, which its set-up has made, with `python` first on PATH."""
    env = {name: value for name, value in os.environ.items() if name not in (proc.MARKER, "FLOW_GANG_PORT")}
    if os.path.isabs(python):
        own = os.path.dirname(python)
        path = env.get("PATH", os.defpath).split(os.pathsep)
        env["PATH"] = os.pathsep.join([own, *(entry for entry in path if entry != own)])
    return env


def granted_gpus() -> list[str]:
    """Return the names of this node's GPUs as the scheduler gave them to the step."""
    for name in (
        "CUDA_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "GPU_DEVICE_ORDINAL",
        "SLURM_STEP_GPUS",
        "SLURM_JOB_GPUS",
    ):
        value = os.environ.get(name, "")
        if value and value != "NoDevFiles":
            return value.split(",")
    return []


def node_name() -> str:
    """Return the scheduler's name for this node."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def _folder(argv: list[str]) -> str:
    if argv[0] != "--list":
        return argv[0]
    with open(argv[1], encoding="utf-8", errors="surrogateescape") as file:
        return file.read().split("\n")[int(os.environ["SLURM_ARRAY_TASK_ID"])]


def _job_id() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return (
        os.environ["SLURM_JOB_ID"] if not array else "{}_{}".format(array, os.environ["SLURM_ARRAY_TASK_ID"])
    )


def main(argv: list[str]) -> int:
    """Run the task; return its exit code, so that the scheduler's books agree. 0 when another runner has it."""
    folder = _folder(argv)
    job_id, count = _job_id(), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if not task.claim_incarnation(folder, job_id, count):
        return 0
    os.chdir(folder)
    runner = BatchRunner(folder, job_id, count)
    runner.listen()
    try:
        record = runner.run(None)
    except Exception as error:  # noqa: BLE001 - the task must end with a record, whatever is wrong here
        traceback.print_exc()
        runner.stop(0)
        reason = "storage" if isinstance(error, OSError) else "runner-died"
        record = runner.end(reason, None, None, f"the runner failed: {type(error).__name__}: {error}")
    if runner.interrupted and record["reason"] == "runner-died":
        task.write_json(folder, "interrupted", {**record, "job": job_id, "incarnation": count})
    else:
        task.finish(folder, record)
    if runner.guard is not None:
        runner.guard.dismiss()
    code = record["code"]
    return 128 + (record["signal"] or signal.SIGTERM) if code is None else min(code, 255)
