"""The task folder: its place, what goes into it, and what it says. Shared by every provider that reaches a file system.

The names inside the folder are documented where they are used most, in `flow_core.runner.task`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from flow_core.errors import ResourceNotFoundError, SpecRejected, ValidationError
from flow_core.ids import TaskId
from flow_core.models import Snapshot, TaskSpec, TaskStatus
from flow_core.runner import task as records

#: What stays of a task whose results the host has stored.
RECORDS = frozenset({"spec.json", "claimed", "alive", "started.json", "exit.json", "released"})

#: The uploaded code, kept by its content in a cache of the submitter's.
ARCHIVE = "code.tar.gz"


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


def place(tasks: Path, task_id: str) -> Path:
    """Return a task's folder: attempts of one key lie side by side, so the newest is found by listing one folder."""
    parsed = TaskId.parse(task_id)
    return tasks / parsed.digest / str(parsed.attempt)


def create(folder: Path, task_id: str, spec: TaskSpec, job: Job, *, submitted_at: datetime) -> bool:
    """Make the task folder appear, whole, under its name. Return False when it was there already.

    Everything is written beside it first: the name is the commit, and of two racers one wins.
    """
    private(folder.parent)
    draft = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        for file in spec.files:
            target = draft / inside(file.name)
            private(target.parent)
            if file.path is not None and file.name == ARCHIVE:
                _link_or_copy(file.path, target)  # replaced where it comes from, never rewritten
            elif file.path is not None:
                shutil.copyfile(file.path, target)
            else:
                target.write_bytes(file.data or b"")
        if spec.entry == "script":
            script = draft / "script"
            script.write_text(spec.script, encoding="utf-8")
            script.chmod(0o700)
        records.reserve(str(draft))
        records.write_json(str(draft), "job.json", job.render(spec, task_id))
        described = spec.model_dump(mode="json", exclude={"files"})
        records.write_json(
            str(draft),
            "spec.json",
            {"v": 1, "task_id": task_id, "submitted_at": submitted_at.timestamp(), "spec": described},
        )
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            return False
        return True
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def private(folder: Path) -> None:
    """Make a folder and its missing parents, readable by their owner alone (`mkdir` would leave the parents open)."""
    for path in (*reversed(folder.parents), folder):
        path.mkdir(mode=0o700, exist_ok=True)


def inside(name: str) -> PurePosixPath:
    """Check a path that must stay within a task folder. Raises ValidationError when it does not."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValidationError(
            f"{name!r} is not a path inside the task's folder",
            suggestions=["Give a relative path without '..'."],
        )
    return path


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def fetch(folder: Path, name: str, into: Path) -> None:
    """Copy a file out of a task folder, whole or not at all. Raises ResourceNotFoundError, ValidationError."""
    source = folder / inside(name)
    if not source.resolve().is_relative_to(folder.resolve()):
        raise ValidationError(f"{name!r} is a link that leaves the task's folder")
    handle, draft = tempfile.mkstemp(prefix=f".{into.name}.", dir=into.parent)
    os.close(handle)
    try:
        shutil.copyfile(source, draft)
        os.replace(draft, into)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ResourceNotFoundError(f"the task's folder has no file {name!r}") from error
    finally:
        Path(draft).unlink(missing_ok=True)


def release(folder: Path) -> None:
    """Remove all but the records of an ended task; the mark comes first, so an interrupted release is repeated."""
    (folder / "released").touch(mode=0o600)
    for path in folder.iterdir():
        if path.name in RECORDS:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
    if facts["claimed"]:
        return TaskStatus.PENDING, "queued", "waiting for its turn"
    return TaskStatus.PENDING, "queued", "submitted; no runner has taken it yet"


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, tz=timezone.utc)


def install_runner(home: Path) -> Path:
    """Put the runner's files where the machine can run them, once per content; return the folder to run.

    A task that waits for days keeps the runner that it was submitted with, whatever is installed meanwhile.
    """
    sources = {path.name: path.read_bytes() for path in sorted(Path(records.__file__).parent.glob("*.py"))}
    sha = hashlib.sha256(
        json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sources.items()}).encode()
    )
    target = home / sha.hexdigest()[:16]
    if target.is_dir():
        return target
    private(home)
    draft = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
    try:
        package = draft / "flow_runner"
        package.mkdir()
        for name, data in sources.items():
            (package / name).write_bytes(data)
        (draft / "__main__.py").write_text(
            "import sys\n\nfrom flow_runner.main import main\n\nsys.exit(main(sys.argv))\n"
        )
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def attempts(tasks: Path, digest: str) -> list[int]:
    """Return the attempt numbers that exist for a key's digest, in order."""
    try:
        return sorted(int(name) for name in os.listdir(tasks / digest) if name.isdigit())
    except FileNotFoundError:
        return []


def reject_sources(sources: Iterable[str], provider: str) -> None:
    """Raise SpecRejected when data is to be mounted from somewhere that is not a path of this machine."""
    for source in sources:
        if "://" in source and not source.startswith("file://"):
            raise SpecRejected(
                f"the {provider} provider cannot mount {source!r}",
                suggestions=["Give a path of the machine, or read the URL in your own code."],
            )
