"""What is known about a task: its status, a snapshot, a piece of its log. Standard library only, and no rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import NamedTuple

Reason = str
"""Why a task is where it is; a word from this list, or one that a newer runner knows and this release does not.

    queued          waits for a free GPU or for the provider's queue
    unreachable     its machine cannot be asked at the moment; the status is the last one known
    cancelling      somebody asked it to stop, and its last process is not gone yet
    exit            the command ended by itself, with an exit code or by a signal of its own
    cancelled       somebody asked for it
    time-limit      it ran past max_run_time_hours
    out-of-memory   the machine or the container ran out of memory
    killed          a signal from outside ended it, and nobody here asked for that
    runner-died     the process that watches over the command vanished
    reboot          the machine restarted under it
    node-failed     the provider lost a machine under it
    preempted       the provider took its machine away and does not start it again
    dependency      it was to start after something else, which has failed
    start-failed    the command could not be started
    storage         the disk was full or could not be written
    lost            nothing knows about this task any more
    released        it ended and gave back what it occupied
"""


class TaskStatus(str, Enum):
    """Where a task is in its life. `final` says whether it can still change; never compare against a list.

    PENDING → PROVISIONING → RUNNING → COMPLETED | FAILED | CANCELLED, with PREEMPTED and PAUSED on the way.
    """

    PENDING = "pending"
    """Accepted and waiting. Nothing runs and nothing is paid for; cancelling costs nothing."""

    PROVISIONING = "provisioning"
    """A machine is being prepared for it. It may be paid for; the command has not started."""

    RUNNING = "running"
    """The command runs on its machine."""

    COMPLETED = "completed"
    """The command ended with exit code 0. Final; the result can be collected until it is released."""

    FAILED = "failed"
    """The command ended in another way, or could not start. Final; `reason` and `exit_code` tell more."""

    CANCELLED = "cancelled"
    """Stopped because somebody asked for it. Final."""

    PREEMPTED = "preempted"
    """The provider took the machine away and starts the task again by itself. Not final: keep waiting."""

    PAUSED = "paused"
    """Held by the provider or its user, and can be resumed. Not final: keep waiting."""

    LOST = "lost"
    """Nothing here knows this task: it never existed or its records are gone. Final; it may have run."""

    def __str__(self) -> str:
        return self.value

    @property
    def final(self) -> bool:
        """Whether the status can never change again."""
        return self in _FINAL

    @property
    def succeeded(self) -> bool:
        """Whether the command ended well."""
        return self is TaskStatus.COMPLETED


_FINAL = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.LOST})


@dataclass(frozen=True)
class Snapshot:
    """All that a provider knows about a task at one moment.

    Times are aware and in UTC, None where that moment has not come. `hosts` and `gpus` are the machines and
    the GPUs in use, `preemptions` counts how often the machine was taken away. `gpu_utilization_percent` is the
    mean over the run and the GPUs of node 0, `peak_gpu_memory_bytes` the most that one of them held; both once it
    has ended, None where its machine does not tell or it was over before anybody looked. Money is in US dollars,
    None where the provider knows no price. `endpoints` maps exposed ports to URLs.
    """

    task_id: str
    name: str
    status: TaskStatus
    reason: Reason = ""
    message: str = ""
    exit_code: int | None = None
    signal: int | None = None
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    peak_memory_bytes: int | None = None
    gpu_utilization_percent: float | None = None
    peak_gpu_memory_bytes: int | None = None
    preemptions: int = 0
    hosts: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    instance_type: str = ""
    num_instances: int = 1
    region: str = ""
    cost_per_hour_usd: float | None = None
    total_cost_usd: float | None = None
    ssh_host: str | None = None
    ssh_port: int = 22
    ssh_user: str = "ubuntu"
    endpoints: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LogChunk:
    """A piece of a log as bytes, which may begin or end in the middle of a character.

    Ask for `next_offset` to go on; `end` says that nothing will follow, ever.
    """

    data: bytes
    next_offset: int
    end: bool


class LogPosition(NamedTuple):
    """Where to read on in the output of one of a task's machines: `offset` bytes are known already."""

    task_id: str
    node: int = 0
    offset: int = 0
