"""Tasks on this machine: detached processes that outlive whoever submitted them. No daemon, no table, only files.

The machine's GPUs are shared out by count, in order of arrival (`flow_core.runner.slots`). Everything lies under
`local.home`, readable by its owner alone; any process of the same user with the same home sees the same tasks.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from flow_core.config import Settings
from flow_core.errors import ProviderUnavailable, SpecRejected, TaskNotFoundError
from flow_core.ids import TaskId
from flow_core.models import Instance, LogChunk, LogPosition, Snapshot, TaskSpec
from flow_core.providers import folder as folders
from flow_core.providers.folder import Job
from flow_core.providers.local_machine import Devices, container_engine
from flow_core.providers.local_sessions import LocalSessions
from flow_core.providers.local_shell import LocalShell
from flow_core.providers.local_volumes import LocalVolumes
from flow_core.providers.spi import Provider
from flow_core.runner import logs, machine, slots, sweeping
from flow_core.runner.bell import FolderBell
from flow_core.runner.inventory import UNBUFFERED, base_environment, can_mount


class LocalProvider(Provider):
    """Runs tasks on this machine."""

    name: ClassVar[str] = "local"
    poll_interval_s: ClassVar[float] = 0.02
    shares_files: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.local
        # The real path: processes of a task are recognized by the folder's name in their environment.
        self.home = Path(os.path.realpath(self.settings.home.expanduser()))
        self.tasks = self.home / "tasks"
        self.queue = self.home / "queue"
        self.slots = self.home / "gpus"
        self.host = socket.gethostname()

    @cached_property
    def devices(self) -> Devices:
        """This machine's GPUs, found or declared."""
        return Devices.of_this_machine(self.settings.gpus)

    @property
    def python(self) -> str:
        """The interpreter that runs functions and scripts."""
        return self.settings.python or sys.executable

    # -- submitting

    def submit(self, spec: TaskSpec, *, task_id: str) -> None:
        if folders.place(self.tasks, task_id).is_dir():
            with folders.told():
                machine.launch(str(self.home), task_id)
            return
        try:
            with folders.told():
                self._begin(spec, task_id)
        except OSError as error:
            raise ProviderUnavailable(
                f"the task's folder could not be written under {self.home}: {error.strerror}",
                suggestions=["Free some space there, or set FLOW_LOCAL_HOME to another disk."],
            ) from error

    def _begin(self, spec: TaskSpec, task_id: str) -> None:
        folders.private(self.tasks)
        self._sweep()
        job = self._job(spec, task_id).render(spec, task_id)
        record = folders.record(spec, task_id, submitted_at=datetime.now(timezone.utc))
        with machine.Launch(str(self.home), task_id, job):  # it takes as long to come up as this takes:
            machine.create(str(self.home), task_id, job=job, spec=record, files=folders.files(spec))

    def _job(self, spec: TaskSpec, task_id: str) -> Job:
        """Resolve a spec against this machine. Raises SpecRejected."""
        if spec.gpu_count:
            self.devices.check(spec)
        folders.reject_sources((mount.source for mount in spec.data_mounts), self.name)
        runner = Path(machine.install(str(self.home), folders.runner_sources()))
        volumes = self.volumes.attach(spec)
        folder = folders.place(self.tasks, task_id)
        container = None
        if spec.image is not None:
            container = {
                "engine": container_engine(spec.image),
                "image": spec.image,
                "real_gpus": self.devices.real,
                "mounts": [*volumes.mounts, *((str(path), str(path)) for path in (runner, folder))],
            }
        elif volumes.mounts and not can_mount():
            raise SpecRejected(
                f"{volumes.mounts[0][1]!r} cannot be mounted: without an image that takes Linux and root",
                suggestions=[
                    "Leave mount_path out and use 'volumes/<name>' in the working directory, or $FLOW_VOLUME_<NAME>.",
                    "Set image= to run in a container.",
                ],
            )
        parsed = TaskId.parse(task_id)
        gpus = spec.gpu_count * spec.num_instances
        return Job(
            python=self.python if container is None else "python",
            call=str(runner / "flow_runner" / "call.py"),
            base_env={**(base_environment(self.python) if container is None else UNBUFFERED), **volumes.env},
            kill_grace_s=self.settings.kill_grace_s,
            after=str(self.tasks / parsed.digest / str(parsed.attempt - 1)) if parsed.attempt > 1 else None,
            gpu={
                "count": gpus,
                "devices": list(self.devices.names),
                "queue": str(self.queue),
                "slots": str(self.slots),
            }
            if gpus
            else None,
            container=container,
            mounts=volumes.mounts,
            links=volumes.links,
        )

    # -- looking

    def find(self, digest: str) -> str | None:
        return machine.find(str(self.home), digest)

    def list(self, *, limit: int) -> Sequence[str]:
        return [task_id for _, task_id in machine.newest(str(self.home), limit)]

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        with folders.told():
            facts = machine.poll(str(self.home), [*task_ids])
        return {
            task_id: folders.snapshot(task_id, known, host=self.host, address="127.0.0.1", region="local")
            for task_id, known in facts.items()
        }

    def bell(self, task_ids: Collection[str]) -> FolderBell | None:
        try:
            return FolderBell.on([folders.place(self.tasks, task_id) for task_id in task_ids])
        except TaskNotFoundError:
            return None

    def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
        with folders.told():
            data, next_offset, end = logs.read_log(str(self.home), task_id, node, offset, limit)
        return LogChunk(data=data, next_offset=next_offset, end=end)

    def read_logs(
        self, wanted: Sequence[LogPosition], *, limit: int = 65536
    ) -> Mapping[LogPosition, LogChunk]:
        return {
            at: LogChunk(*piece)
            for at, piece in zip(wanted, logs.read_logs(str(self.home), [*wanted], limit), strict=True)
            if piece is not None
        }

    def read(self, task_id: str, path: str) -> bytes:
        return Path(self.locate(task_id, path)).read_bytes()

    def fetch(self, task_id: str, path: str, into: Path) -> None:
        source = self.locate(task_id, path)
        with folders.drafted(into) as draft:
            shutil.copyfile(source, draft)

    def locate(self, task_id: str, path: str) -> str:
        with folders.told():
            return machine.locate(str(self.home), task_id, path)

    # -- ending

    def cancel(self, task_ids: Collection[str]) -> None:
        machine.cancel(str(self.home), [*task_ids])

    def release(self, task_ids: Collection[str]) -> None:
        machine.release(str(self.home), [*task_ids])

    def _sweep(self) -> None:
        sweeping.sweep(str(self.home), self.settings.retention_days * 86400)

    # -- capabilities

    def find_instances(self) -> Sequence[Instance]:
        return self.devices.instances(busy=len(slots.busy(str(self.slots), list(self.devices.names))))

    @property
    def volumes(self) -> LocalVolumes:
        return LocalVolumes(self.home / "volumes", self.tasks)

    @property
    def shell(self) -> LocalShell:
        return LocalShell(self.tasks)

    @property
    def sessions(self) -> LocalSessions:
        return LocalSessions(self.tasks)
