"""Tasks on this machine: detached processes that outlive whoever submitted them. No daemon, no table, only files.

The machine's GPUs are shared out by count, in order of arrival (`flow_core.runner.slots`). Everything lies under
`local.home`, readable by its owner alone; any process of the same user with the same home sees the same tasks.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from flow_core.config import Settings
from flow_core.errors import ProviderUnavailable, SpecRejected, TaskNotFoundError
from flow_core.ids import TaskId
from flow_core.models import Instance, LogChunk, Snapshot, TaskSpec
from flow_core.providers import folder as folders
from flow_core.providers.folder import Job
from flow_core.providers.local_machine import UNBUFFERED, Devices, base_environment, container_engine
from flow_core.providers.local_shell import LocalShell
from flow_core.providers.local_volumes import LocalVolumes, can_mount
from flow_core.providers.spi import Provider
from flow_core.runner import slots
from flow_core.runner import task as records

_SWEEP_EVERY_S = 3600.0
_DRAFT_S = 86400.0  # a submit that still copies its files is younger


class LocalProvider(Provider):
    """Runs tasks on this machine."""

    name: ClassVar[str] = "local"
    poll_interval_s: ClassVar[float] = 0.02

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
        folder = folders.place(self.tasks, task_id)
        if not folder.is_dir():
            try:
                folders.private(self.tasks)
                self._sweep()
                job = self._job(spec, task_id)
                folders.create(folder, task_id, spec, job, submitted_at=datetime.now(timezone.utc))
            except OSError as error:
                raise ProviderUnavailable(
                    f"the task's folder could not be written under {self.home}: {error.strerror}",
                    suggestions=["Free some space there, or set FLOW_LOCAL_HOME to another disk."],
                ) from error
        self._start(folder, task_id)

    def _job(self, spec: TaskSpec, task_id: str) -> Job:
        """Resolve a spec against this machine. Raises SpecRejected."""
        if spec.gpu_count:
            self.devices.check(spec)
        folders.reject_sources((mount.source for mount in spec.data_mounts), self.name)
        runner = folders.install_runner(self.home / "runner")
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

    def _start(self, folder: Path, task_id: str) -> None:
        """Launch a runner unless the task has one or had one. A needless runner finds the task claimed and leaves."""
        if not (folder / "unclaimed").exists():
            return
        job = records.read_json(str(folder), "job.json") or {}
        runner = Path(job["call"]).parent.parent
        argv = [sys.executable, "-I", "-S", str(runner), str(folder)]
        ticket: int | None = None
        try:
            if not os.path.isfile(sys.executable):  # the shell below would not tell
                raise FileNotFoundError(f"there is no Python at {sys.executable!r} any more")
            if job["gpu"] is not None:
                name, ticket = slots.take_ticket(str(self.queue), task_id)
                argv += [name, str(ticket)]
            # The shell leaves the runner to the system at once: it is nobody's child here and cannot become a zombie.
            subprocess.run(
                ["/bin/sh", "-c", '"$@" 2>>"$0" &', str(folder / "runner.log"), *argv],
                env={**base_environment(sys.executable), "FLOW_TASK_DIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=() if ticket is None else (ticket,),
                start_new_session=True,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ProviderUnavailable(
                f"the runner could not be started: {error}", suggestions=["Submit again with the same key."]
            ) from error
        finally:
            if ticket is not None:
                slots.hand_over(ticket)

    # -- looking

    def find(self, digest: str) -> str | None:
        for number in reversed(folders.attempts(self.tasks, digest)):
            spec = records.read_json(str(self.tasks / digest / str(number)), "spec.json")
            if spec is not None:
                return str(spec["task_id"])
        return None

    def list(self, *, limit: int) -> Sequence[str]:
        try:
            keys = sorted(os.scandir(self.tasks), key=lambda entry: entry.stat().st_mtime, reverse=True)
        except FileNotFoundError:
            return []
        found: list[tuple[float, str]] = []
        for entry in keys[:limit]:  # a key's folder is as new as its newest attempt
            for number in folders.attempts(self.tasks, entry.name):
                spec = records.read_json(os.path.join(entry.path, str(number)), "spec.json")
                if spec is not None:
                    found.append((spec["submitted_at"], spec["task_id"]))
        return [task_id for _, task_id in sorted(found, reverse=True)[:limit]]

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        return {task_id: self._snapshot(task_id) for task_id in task_ids}

    def _snapshot(self, task_id: str) -> Snapshot:
        try:
            facts = records.probe(str(folders.place(self.tasks, task_id)))
        except TaskNotFoundError:
            facts = None
        except OSError as error:  # this process has no descriptor left, the disk does not answer
            raise ProviderUnavailable(f"the records of task {task_id} cannot be read: {error}") from error
        return folders.snapshot(task_id, facts, host=self.host, address="127.0.0.1", region="local")

    def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
        folder = self._existing(task_id)
        # Looked at first: what is written before the end is then in the file.
        final = (folder / "exit.json").exists()
        try:
            with open(folder / f"log.{int(node)}", "rb") as file:
                size = os.fstat(file.fileno()).st_size
                start = max(0, size + offset) if offset < 0 else offset
                file.seek(start)
                data = file.read(limit)
        except FileNotFoundError:
            return LogChunk(data=b"", next_offset=max(0, offset), end=final)
        return LogChunk(data=data, next_offset=start + len(data), end=final and start + len(data) >= size)

    def fetch(self, task_id: str, path: str, into: Path) -> None:
        folders.fetch(self._existing(task_id), path, into)

    def _existing(self, task_id: str) -> Path:
        folder = folders.place(self.tasks, task_id)
        if not (folder / "spec.json").exists():
            raise TaskNotFoundError(
                f"there is no task {task_id!r} under {self.home}",
                suggestions=["List the tasks with flow.list_tasks()."],
            )
        return folder

    # -- ending

    def cancel(self, task_ids: Collection[str]) -> None:
        for task_id in task_ids:
            folder = self._folder_or_none(task_id)
            if folder is not None:
                records.ask_to_stop(str(folder))

    def release(self, task_ids: Collection[str]) -> None:
        for task_id in task_ids:
            folder = self._folder_or_none(task_id)
            if folder is not None and (folder / "exit.json").exists():
                folders.release(folder)

    def _folder_or_none(self, task_id: str) -> Path | None:
        try:
            return self._existing(task_id)
        except TaskNotFoundError:
            return None

    def _sweep(self) -> None:
        """Remove tasks that ended longer ago than the retention time; looked for once an hour at most."""
        stamp = self.home / ".swept"
        now = time.time()
        if stamp.exists() and now - stamp.stat().st_mtime < _SWEEP_EVERY_S:
            return
        stamp.touch(mode=0o600)
        for record in self.tasks.glob("*/*/exit.json"):
            ended = (records.read_json(str(record.parent), "exit.json") or {}).get("ended_at", now)
            if now - ended > self.settings.retention_days * 86400:
                trash = record.parent.with_name(f".old-{secrets.token_hex(8)}")
                try:
                    record.parent.rename(
                        trash
                    )  # gone at once for everybody who looks, then removed at leisure
                except FileNotFoundError:  # somebody else sweeps too
                    continue
                shutil.rmtree(trash, ignore_errors=True)
        for draft in self.tasks.glob("*/.new-*"):  # of submits that were killed
            with contextlib.suppress(FileNotFoundError):
                if now - draft.stat().st_mtime > _DRAFT_S:
                    shutil.rmtree(draft, ignore_errors=True)

    # -- capabilities

    def find_instances(self) -> Sequence[Instance]:
        return self.devices.instances(busy=len(slots.busy(str(self.slots), list(self.devices.names))))

    @property
    def volumes(self) -> LocalVolumes:
        return LocalVolumes(self.home / "volumes", self.tasks)

    @property
    def shell(self) -> LocalShell:
        return LocalShell(self.tasks)
