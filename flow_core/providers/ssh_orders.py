"""What a host is told when a task is to start there: the runner's orders, and the task's files as they travel."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flow_core.ids import TaskId
from flow_core.models import TaskSpec
from flow_core.providers import folder as folders
from flow_core.providers.folder import Job
from flow_core.providers.ssh_hosts import Host
from flow_core.providers.ssh_places import Placement
from flow_core.providers.transfers import send_archive, send_blob
from flow_core.providers.transport import BlobsMissing
from flow_core.runner.inventory import UNBUFFERED
from flow_core.runner.task import MOVE_BYTES

#: What is smaller travels with the task, what is larger once per content.
_INLINE_BYTES = 65536


@dataclass
class Files:
    """A task's files as they travel: small ones one after the other in `inline`, large ones by their SHA-256."""

    listed: list[dict[str, Any]] = field(default_factory=list)
    inline: bytes = b""
    blobs: dict[str, Path | bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: TaskSpec) -> Files:
        """Sort the files of a task."""
        files, small = cls(), []
        for file in folders.files(spec):
            source = Path(file["path"]) if "path" in file else file["data"]
            if isinstance(source, Path) and not file["link"] and source.stat().st_size <= _INLINE_BYTES:
                source = source.read_bytes()
            about: dict[str, Any] = {name: file[name] for name in ("name", "mode") if name in file}
            if isinstance(source, bytes) and len(source) <= _INLINE_BYTES:
                files.listed.append({**about, "size": len(source)})
                small.append(source)
            else:
                sha = _sha256(source)
                files.blobs[sha] = source
                files.listed.append({**about, "blob": sha, "link": bool(file.get("link"))})
        files.inline = b"".join(small)
        return files

    def keep_room(self, name: str, size: int) -> None:
        """Add a file that only takes space."""
        self.listed.append({"name": name, "size": size})
        self.inline += b" " * size

    def send(self, host: Host) -> None:
        """Store the large ones that a host does not have."""
        for sha in host.call("missing_blobs", shas=[*self.blobs]):
            source = self.blobs[sha]
            send = send_archive if isinstance(source, Path) else send_blob
            send(host.transport, host.home, sha, source)  # type: ignore[arg-type]


def start(
    spec: TaskSpec,
    task_id: str,
    placement: Placement,
    host: Host,
    *,
    leader: Host,
    settings: Mapping[str, float],
    among: Mapping[str, str | None],
) -> bool:
    """Have a host start its part of a task, unless it has. False: it has been moved. Raises ProviderUnavailable.

    `settings` are kill_grace_s and retention_s; `among` are all hosts by name, with what those call themselves that
    were heard of.
    """
    job = job_for(spec, task_id, placement, host, settings["kill_grace_s"])
    if len(placement.places) > 1:
        _make_one_of_many(job, placement, host, leader)
    record = folders.record(spec, task_id, submitted_at=datetime.now(timezone.utc))
    record["placed"] = placement.hosts
    files = Files.of(spec)
    if spec.gpu_count and spec.num_instances == 1 and spec.region is None and len(among) > 1:
        record.update(among=dict(among), files=[*files.listed], moves=placement.moves)
        files.keep_room("here", MOVE_BYTES)
    order = {"task_id": task_id, "job": job, "spec": record, "files": files.listed}
    for last in (False, True):
        try:
            started: bool = host.call(
                "start", data=files.inline, deadline_s=60.0, retention_s=settings["retention_s"], **order
            )
            return started
        except BlobsMissing:
            if last:
                raise
            files.send(host)
    raise AssertionError("not reached")


def job_for(
    spec: TaskSpec, task_id: str, placement: Placement, host: Host, kill_grace_s: float
) -> dict[str, Any]:
    """Return the orders for a host's runner."""
    hello, parsed = host.hello, TaskId.parse(task_id)
    facts, home, runner = hello["facts"], hello["home"], hello["runner"]
    nodes = sum(place.nodes for place in placement.places if place.id == host.id)
    mounts = [(mount.source.removeprefix("file://"), mount.target) for mount in spec.data_mounts]
    folder = f"{home}/tasks/{parsed.digest}/{parsed.attempt}"
    container = None
    if spec.image is not None:
        own = [(path, path) for path in (runner, folder)]
        container = {
            "engine": facts["engine"],
            "image": spec.image,
            "real_gpus": host.devices.real,
            "mounts": [*mounts, *own],
        }
    gpus = spec.gpu_count * nodes
    queue = {"queue": f"{home}/queue", "slots": f"{home}/gpus"}
    job = Job(
        python=facts["python"] if container is None else "python",
        call=f"{runner}/flow_runner/call.py",
        base_env=facts["environment"] if container is None else UNBUFFERED,
        kill_grace_s=kill_grace_s,
        after=f"{home}/tasks/{parsed.digest}/{parsed.attempt - 1}" if parsed.attempt > 1 else None,
        gpu={"count": gpus, "devices": list(host.devices.names), **queue} if gpus else None,
        container=container,
        mounts=mounts,
    )
    return job.render(spec, task_id)


def _make_one_of_many(job: dict[str, Any], placement: Placement, host: Host, leader: Host) -> None:
    """Add to the runner's orders who the others are (`flow_core.runner.team`)."""
    index = [place.id for place in placement.places].index(host.id)
    job["main_address"] = leader.address
    job["team"] = {
        "index": index,
        "hosts": [place.name for place in placement.places],
        "first": placement.first_ranks[index],
        "nodes": placement.places[index].nodes,
        "secret": placement.secret,
        "gpu": job["gpu"],
    }
    job["gpu"] = None  # not before it is this host's turn


_shas: dict[tuple[str, int, int, int], str] = {}


def _sha256(source: Path | bytes) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    status = os.stat(source)
    key = (str(source), status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _shas:
        sha = hashlib.sha256()
        with open(source, "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                sha.update(piece)
        if len(_shas) > 1000:
            _shas.clear()
        _shas[key] = sha.hexdigest()
    return _shas[key]
