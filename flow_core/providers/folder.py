"""The task folder: its place, what goes into it, and what it says. Shared by every provider that reaches a file system.

The names inside the folder are documented where they are used most, in `flow_core.runner.task`.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flow_core.errors import (
    ConfigError,
    FlowError,
    ProviderUnavailable,
    ResourceNotFoundError,
    SpecRejected,
    TaskNotFoundError,
    ValidationError,
)
from flow_core.ids import TaskId
from flow_core.models import Snapshot, TaskSpec, TaskStatus
from flow_core.runner import machine
from flow_core.runner.machine import Refused

#: The uploaded code, kept by its content in a cache of the submitter's.
ARCHIVE = "code.tar.gz"

#: The values that a call was given by reference.
INPUTS = "inputs"


@dataclass(frozen=True)
class Job:
    """What the runner is to do, beyond what the user wrote: the machine's part. Rendered into job.json."""

    python: str
    call: str
    base_env: Mapping[str, str]
    kill_grace_s: float
    after: str | None = None
    gpu: Mapping[str, Any] | None = None
    container: Mapping[str, Any] | None = None
    mounts: Sequence[tuple[str, str]] = ()
    links: Sequence[tuple[str, str]] = field(default=())

    def render(self, spec: TaskSpec, task_id: str) -> dict[str, Any]:
        """Return the runner's orders as plain JSON values. Pure."""
        return {
            "v": 1,
            "task_id": task_id,
            "entry": spec.entry,
            "argv": list(spec.argv),
            "python": self.python,
            "call": self.call,
            "env": {**self.base_env, **spec.env},
            "working_dir": spec.working_dir,
            "num_instances": spec.num_instances,
            "max_run_time_s": spec.max_run_time_s,
            "kill_grace_s": self.kill_grace_s,
            "after": self.after,
            "gpu": None if self.gpu is None else dict(self.gpu),
            "container": None if self.container is None else dict(self.container),
            "mounts": [list(pair) for pair in self.mounts],
            "links": [list(pair) for pair in self.links],
        }


def files(spec: TaskSpec) -> list[dict[str, Any]]:
    """Return what is to be put into the task's folder, as `machine.create` takes it."""
    listed: list[dict[str, Any]] = []
    for file in spec.files:
        if file.path is None:
            listed.append({"name": file.name, "data": file.data or b""})
        else:  # the archive and the inputs are replaced where they come from, never rewritten
            link = file.name == ARCHIVE or file.name.startswith(f"{INPUTS}/")
            listed.append({"name": file.name, "path": str(file.path), "link": link})
    if spec.entry == "script":
        listed.append({"name": "script", "data": spec.script.encode(), "mode": 0o700})
    return listed


def record(spec: TaskSpec, task_id: str, *, submitted_at: datetime) -> dict[str, Any]:
    """Return what spec.json holds: what was asked for, and when."""
    described = spec.model_dump(mode="json", exclude={"files"})
    return {"v": 1, "task_id": task_id, "submitted_at": submitted_at.timestamp(), "spec": described}


def place(tasks: Path, task_id: str) -> Path:
    """Return a task's folder: attempts of one key lie side by side, so the newest is found by listing one folder."""
    parsed = TaskId.parse(task_id)
    return tasks / parsed.digest / str(parsed.attempt)


@contextmanager
def drafted(into: Path) -> Iterator[Path]:
    """A path beside `into` that takes its place at the end; after an exception `into` is as it was."""
    handle, draft = tempfile.mkstemp(prefix=f".{into.name}.", dir=into.parent)
    os.close(handle)
    try:
        yield Path(draft)
        os.replace(draft, into)
    finally:
        Path(draft).unlink(missing_ok=True)


def private(folder: Path) -> None:
    """Make a folder and its missing parents, readable by their owner alone."""
    machine.private(str(folder))


_ERRORS: Mapping[str, type[FlowError]] = {
    "task-not-found": TaskNotFoundError,
    "not-found": ResourceNotFoundError,
    "invalid": ValidationError,
    "rejected": SpecRejected,
    "no-tool": ConfigError,
}


def flow_error(refused: Refused) -> FlowError:
    """Turn what a machine refused into the error that a caller expects."""
    return _ERRORS.get(refused.kind, ProviderUnavailable)(refused.message, suggestions=refused.suggestions)


@contextmanager
def told() -> Iterator[None]:
    """Within this, what a machine refuses is raised as an error of ours."""
    try:
        yield
    except Refused as refused:
        raise flow_error(refused) from refused


_STATUS = {"cancelled": TaskStatus.CANCELLED}


def snapshot(
    task_id: str, facts: Mapping[str, Any] | None, *, host: str, address: str, region: str
) -> Snapshot:
    """Say what the facts gathered on the machine (`flow_core.runner.task.probe`) mean. Pure."""
    if facts is None:
        return Snapshot(
            task_id=task_id,
            name="",
            status=TaskStatus.LOST,
            reason="lost",
            message="no task has this id here",
        )
    spec, started, ended = facts["spec"]["spec"], facts["started"] or {}, facts["exit"]
    status, reason, message = _verdict(facts)
    record = ended or {}
    run_s = record.get("run_s")
    gpu_use = record.get("gpu_use") or {}
    started_at = started.get("at")
    # The length of a run is measured on a clock that nobody sets; its end is shown accordingly.
    ended_at = started_at + run_s if started_at is not None and run_s is not None else record.get("ended_at")
    return Snapshot(
        task_id=task_id,
        name=spec["name"],
        status=status,
        reason=reason,
        message=message,
        exit_code=record.get("code"),
        signal=record.get("signal"),
        submitted_at=_time(facts["spec"]["submitted_at"]),
        started_at=_time(started_at),
        ended_at=_time(ended_at),
        peak_memory_bytes=record.get("peak_memory_bytes"),
        gpu_utilization_percent=gpu_use.get("utilization_percent"),
        peak_gpu_memory_bytes=gpu_use.get("peak_memory_bytes"),
        hosts=(host,) * int(spec["num_instances"]),
        gpus=tuple(started.get("gpus", ())),
        instance_type=spec["instance_type"],
        num_instances=spec["num_instances"],
        region=region,
        cost_per_hour_usd=0.0,
        total_cost_usd=0.0,
        endpoints={str(port): f"http://{address}:{port}" for port in spec["ports"]},
        labels=spec["labels"],
    )


def _verdict(facts: Mapping[str, Any]) -> tuple[TaskStatus, str, str]:
    record = facts["exit"]
    if record is not None:
        reason, code = record["reason"], record.get("code")
        status = (
            TaskStatus.COMPLETED if reason == "exit" and code == 0 else _STATUS.get(reason, TaskStatus.FAILED)
        )
        return status, "released" if facts["released"] else reason, record.get("message", "")
    if facts["started"] is not None:
        return TaskStatus.RUNNING, "cancelling" if facts["cancel"] else "", ""
    if facts["cancel"]:
        return TaskStatus.PENDING, "cancelling", ""
    if facts.get("moved"):
        return TaskStatus.PENDING, "queued", f"moved to host {facts['moved']['to']['name']}"
    if facts["claimed"]:
        return TaskStatus.PENDING, "queued", "waiting for its turn"
    return TaskStatus.PENDING, "queued", "submitted; no runner has taken it yet"


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, tz=timezone.utc)


@functools.cache
def runner_sources() -> dict[str, bytes]:
    """Return the files that run a task, by name."""
    return {path.name: path.read_bytes() for path in Path(machine.__file__).parent.glob("*.py")}


def reject_sources(sources: Iterable[str], provider: str) -> None:
    """Raise SpecRejected when data is to be mounted from somewhere that is not a path of this machine."""
    for source in sources:
        if "://" in source and not source.startswith("file://"):
            raise SpecRejected(
                f"the {provider} provider cannot mount {source!r}",
                suggestions=["Give a path of the machine, or read the URL in your own code."],
            )
