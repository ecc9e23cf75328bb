"""Volumes of the local provider: directories that persist until they are deleted."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from flow_core.errors import TaskNotFoundError, ValidationError, VolumeError, VolumeNotFoundError
from flow_core.models import TaskSpec, Volume, VolumeSpec
from flow_core.providers import folder as folders
from flow_core.runner import task as records
from flow_core.runner.inventory import can_mount
from flow_core.storage import DEFAULT_VOLUME_GB


@dataclass(frozen=True)
class Attached:
    """How a task sees its volumes and data: bind mounts, links in the working directory, variables."""

    mounts: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    env: dict[str, str]


class LocalVolumes:
    """The `volumes` capability: `<root>/<name>/data` with a description beside it."""

    def __init__(self, root: Path, tasks: Path) -> None:
        self.root = root
        self.tasks = tasks

    def create(self, *, name: str | None, size_gb: int, interface: Literal["block", "file"]) -> Volume:
        volume_id = f"vol-{secrets.token_hex(6)}"
        name = name or volume_id
        existing = self._find(name)
        if existing is not None:
            return existing
        volume = Volume(
            volume_id=volume_id,
            name=name,
            size_gb=size_gb,
            region="local",
            interface=interface,
            created_at=datetime.now(timezone.utc),
        )
        folders.private(self.root)
        draft = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        try:
            (draft / "data").mkdir(mode=0o700)
            (draft / "volume.json").write_text(volume.model_dump_json())
            draft.rename(self.root / name)
        except OSError as error:
            raced = self._find(name)
            if raced is None:
                raise VolumeError(
                    f"volume {name!r} could not be created under {self.root}: {error.strerror}"
                ) from error
            return raced
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return volume

    def list(self) -> Sequence[Volume]:
        if not self.root.is_dir():
            return []
        found = (self._read(path) for path in sorted(self.root.iterdir()) if not path.name.startswith("."))
        return [volume for volume in found if volume is not None]

    def delete(self, volume: str) -> None:
        known = self._get(volume)
        users = self._users(known)
        if users:
            raise VolumeError(
                f"volume {known.name!r} is in use by {', '.join(users)}",
                suggestions=["Wait for the task, or cancel it, then delete the volume."],
            )
        trash = self.root / f".old-{secrets.token_hex(6)}"
        (self.root / known.name).rename(trash)
        shutil.rmtree(trash)

    def mount(self, volume: str, task_id: str) -> None:
        known = self._get(volume)
        folder = folders.place(self.tasks, task_id)
        facts = records.probe(str(folder))
        if facts is None:
            raise TaskNotFoundError(f"there is no task {task_id!r}")
        if facts["started"] is None or facts["exit"] is not None:
            raise ValidationError(
                f"task {task_id!r} is not running, so volume {known.name!r} cannot be mounted to it"
            )
        link = folder / "work" / "volumes" / known.name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(self.root / known.name / "data")
        except FileExistsError:
            raise ValidationError(f"volume {known.name!r} is already mounted to task {task_id!r}") from None

    def attach(self, spec: TaskSpec) -> Attached:
        """Create what a task names for the first time and say how it sees its storage. Raises VolumeNotFoundError."""
        mounts: list[tuple[str, str]] = []
        links: list[tuple[str, str]] = []
        env: dict[str, str] = {}
        for wanted in spec.volumes:
            volume = self._resolve(wanted)
            data = str(self.root / volume.name / "data")
            links.append((f"volumes/{volume.name}", data))
            env[f"FLOW_VOLUME_{re.sub(r'[^A-Z0-9]', '_', volume.name.upper())}"] = data
            # The default place is a convenience: where it cannot be had, the link and the variable are there.
            asked_for = wanted.mount_path != wanted.default_mount_path
            if asked_for or can_mount() or spec.image is not None:
                mounts.append((data, wanted.mount_path))
        for mount in spec.data_mounts:
            source = mount.source.removeprefix("file://")
            if not os.path.exists(source):
                raise VolumeNotFoundError(f"data_mounts: {source!r} does not exist on this machine")
            mounts.append((os.path.abspath(source), mount.target))
        return Attached(tuple(mounts), tuple(links), env)

    def _resolve(self, wanted: VolumeSpec) -> Volume:
        if wanted.volume_id is not None:
            return self._get(wanted.volume_id)
        return self.create(
            name=wanted.name, size_gb=wanted.size_gb or DEFAULT_VOLUME_GB, interface=wanted.interface
        )

    def _get(self, volume: str) -> Volume:
        found = self._find(volume) or next(
            (known for known in self.list() if known.volume_id == volume), None
        )
        if found is None:
            names = ", ".join(known.name for known in self.list()) or "none"
            raise VolumeNotFoundError(
                f"there is no volume {volume!r}", suggestions=[f"Volumes that exist: {names}."]
            )
        return found

    def _find(self, name: str) -> Volume | None:
        return None if "/" in name or name.startswith(".") else self._read(self.root / name)

    def _read(self, path: Path) -> Volume | None:
        try:
            return Volume.model_validate_json((path / "volume.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _users(self, volume: Volume) -> Sequence[str]:
        users = []
        for path in self.tasks.glob("*/*/spec.json"):
            if (path.parent / "exit.json").exists():
                continue
            spec = records.read_json(str(path.parent), "spec.json") or {}
            named = spec.get("spec", {}).get("volumes", [])
            if any(
                one.get("name") == volume.name or one.get("volume_id") == volume.volume_id for one in named
            ):
                users.append(str(spec["task_id"]))
        return users
