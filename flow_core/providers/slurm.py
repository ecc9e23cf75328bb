"""Tasks on a Slurm cluster. No daemon: Slurm queues them, our runner runs them, and files say what happened.

A task is a folder on the cluster's shared file system and a job with its name. Submitting is at least once, starting
exactly once: a job that was submitted twice finds the task claimed and leaves. What the runner's exit record says is
final; without one, Slurm's accounting or its queue decides (`flow_core.runner.slurm_states`). Everything that Slurm is
asked goes through `flow_core.runner.cluster` and `slurm_look`, here or on a login node.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

from flow_core.config import Settings
from flow_core.errors import SpecRejected
from flow_core.models import Instance, LogChunk, LogPosition, Snapshot, TaskSpec, TaskStatus
from flow_core.providers import folder as folders
from flow_core.providers import slurm_machines, slurm_script
from flow_core.providers.folder import Job
from flow_core.providers.slurm_script import Batch
from flow_core.providers.slurm_sessions import SlurmSessions
from flow_core.providers.slurm_shell import SlurmShell
from flow_core.providers.slurm_site import Site
from flow_core.providers.spi import Provider
from flow_core.providers.transfers import fetch_file, read_logs
from flow_core.runner import slurm_states
from flow_core.runner.inventory import UNBUFFERED
from flow_core.runner.slurm_facts import job_name

log = logging.getLogger("flow_core")

#: The queue is asked this often at most, however often we are; an end shows in the task's folder at once.
_QUEUE_S = 2.0

#: What sinfo says is good for so long when a task is submitted.
_NODES_S = 60.0


#: Where a task is before it runs.
_BEFORE = ("pending", "provisioning", "preempted")


class SlurmProvider(Provider):
    """Runs tasks on a Slurm cluster."""

    name: ClassVar[str] = "slurm"
    poll_interval_s: ClassVar[float] = 0.2

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.slurm
        self.site = Site(settings)
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._standing: dict[str, Mapping[str, Any]] = {}
        self._trouble: str | None = None
        self._nodes: tuple[float, Sequence[Mapping[str, Any]]] = (float("-inf"), ())

    # -- submitting

    def submit(self, spec: TaskSpec, *, task_id: str) -> None:
        self._submit([(spec, task_id)])

    def submit_many(self, tasks: Sequence[tuple[TaskSpec, str]]) -> None:
        """Those that ask for the same become arrays; see `Provider.submit_many`."""
        groups: dict[tuple[Any, ...], list[tuple[TaskSpec, str]]] = {}
        for spec, task_id in tasks:
            groups.setdefault(tuple(sorted(self._wishes(spec).items())), []).append((spec, task_id))
        for group in groups.values():
            largest = self._largest_array() if len(group) > 1 else 1
            for start in range(0, len(group), largest):
                self._submit(group[start : start + largest])

    def _submit(self, group: Sequence[tuple[TaskSpec, str]]) -> None:
        """Submit tasks that ask Slurm for the same: one as a job, several as the elements of an array."""
        wishes = self._wishes(group[0][0])
        depends = wishes.pop("dependency", None) or ""
        tasks = [self._task(spec, task_id, wishes) for spec, task_id in group]
        how: dict[str, Any] = {"depends": depends}
        if len(group) > 1 and not depends and all(task_id.endswith("-1") for _, task_id in group):
            digest = hashlib.sha256("\n".join(task_id for _, task_id in group).encode()).hexdigest()[:16]
            name = job_name(self.site.home, f"array-{digest}")
            how["array"] = {"name": name, "script": self._array_script(name, wishes, len(group))}
        self.site.submit([spec for spec, _ in group], tasks, **how)

    def _task(self, spec: TaskSpec, task_id: str, wishes: Mapping[str, str | None]) -> dict[str, Any]:
        files, data = self.site.pack(spec)
        return {
            "task_id": task_id,
            "job": self._job(spec, task_id),
            "spec": folders.record(spec, task_id, submitted_at=datetime.now(timezone.utc)),
            "files": files,
            "data": data,
            "script": slurm_script.render(self._batch(task_id, wishes)),
        }

    def _wishes(self, spec: TaskSpec) -> dict[str, str | None]:
        """Return the options of sbatch for a task. Raises SpecRejected."""
        if spec.volumes:
            raise SpecRejected(
                "the slurm provider has no volumes",
                suggestions=["Use a folder of the cluster's shared file system, by its path."],
            )
        machine = slurm_machines.choose(spec, self.settings, self._cluster_nodes)
        return slurm_script.wishes(spec, self.settings, machine)

    def _batch(self, task_id: str, wishes: Mapping[str, str | None]) -> Batch:
        folder = str(folders.place(self.site.tasks, task_id))
        return Batch(
            name=job_name(self.site.home, task_id),
            folder=folder,
            directives=wishes,
            runner=(self.site.python, "-I", "-S", self.site.runner),
            subject=(folder,),
            modules=tuple(self.settings.modules),
            setup=self.settings.setup,
        )

    def _array_script(self, name: str, wishes: Mapping[str, str | None], elements: int) -> str:
        folder = f"{self.site.home}/arrays/{name}"
        batch = Batch(
            name=name,
            folder=folder,
            directives=wishes,
            runner=(self.site.python, "-I", "-S", self.site.runner),
            subject=("--list", f"{folder}/tasks"),
            modules=tuple(self.settings.modules),
            setup=self.settings.setup,
            elements=elements,
            max_running=self.settings.max_running,
        )
        return slurm_script.render(batch)

    def _job(self, spec: TaskSpec, task_id: str) -> dict[str, Any]:
        """Return the runner's orders."""
        folders.reject_sources((mount.source for mount in spec.data_mounts), self.name)
        folder = str(folders.place(self.site.tasks, task_id))
        mounts = [(mount.source.removeprefix("file://"), mount.target) for mount in spec.data_mounts]
        if mounts and spec.image is None:
            raise SpecRejected(
                f"{mounts[0][1]!r} cannot be mounted on a node of the cluster without an image",
                suggestions=["Set image= to run in a container, or use the path itself."],
            )
        shown = [*mounts, *((path, path) for path in (self.site.runner, folder))]
        container, srun = None, []
        if spec.image is not None and self.settings.container == "apptainer":
            container = {
                "engine": "apptainer",
                "image": spec.image,
                "real_gpus": spec.gpu_count > 0,
                "mounts": shown,
            }
        elif spec.image is not None:
            srun = [f"--container-image={spec.image}", "--no-container-mount-home"]
            srun.append("--container-mounts=" + ",".join(f"{source}:{target}" for source, target in shown))
        job = Job(
            python=self.site.python if spec.image is None else "python",
            call=f"{self.site.runner}/flow_runner/call.py",
            base_env=UNBUFFERED,
            kill_grace_s=self.settings.kill_grace_s,
            container=container,
        )
        # With pyxis each node's runner is inside the container, and so is its Python.
        return {**job.render(spec, task_id), "srun": srun, "node_python": "python3" if srun else None}

    def _cluster_nodes(self) -> Sequence[Mapping[str, Any]]:
        read_at, nodes = self._nodes
        if time.monotonic() - read_at > _NODES_S:
            nodes = self.site.slurm("slurm_nodes", tools=1)
            self._nodes = (time.monotonic(), nodes)
        return nodes

    def _largest_array(self) -> int:
        """Ask how many elements an array may have: MaxArraySize is one more than the highest index."""
        said = self.site.slurm("slurm_setting", tools=1, name="MaxArraySize")
        return max(1, int(said)) if said is not None and said.isdigit() else 1

    # -- looking

    def find(self, digest: str) -> str | None:
        found: str | None = self.site.ask("find", digest=digest).value
        return found

    def find_many(self, digests: Collection[str]) -> Mapping[str, str]:
        found: Mapping[str, str] = self.site.ask("find_many", digests=[*digests]).value
        return found

    def list(self, *, limit: int) -> Sequence[str]:
        return [task_id for _, task_id in self.site.ask("newest", limit=limit).value]

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        unique = [*dict.fromkeys(task_ids)]
        # Whoever's turn it is asks for everybody: of many that are polled one by one, each would have its turn rarely.
        turn = self._queue_is_old()
        asked = [*dict.fromkeys([*unique, *self._live()])] if turn else unique
        unheard = None if turn else self._unheard(unique)
        answer = self.site.slurm("slurm_look", tools=2, home=self.site.home, task_ids=asked, unheard=unheard)
        tasks: Mapping[str, dict[str, Any] | None] = answer["tasks"]
        if answer["asked"]:
            self._note(tasks, answer["trouble"])
        return {task_id: self._snapshot(task_id, tasks[task_id]) for task_id in unique}

    def _queue_is_old(self) -> bool:
        """Whether it is time to ask the queue again; of several threads one is told so."""
        with self._lock:
            old = time.monotonic() - self._asked_at >= _QUEUE_S
            if old:
                self._asked_at = time.monotonic()
            return old

    def _live(self) -> Sequence[str]:
        """Return the tasks that the queue has told of, and that had not ended then."""
        with self._lock:
            return [*self._standing]

    def _unheard(self, task_ids: Sequence[str]) -> Sequence[str]:
        """Return the tasks of which the queue has never told: they cannot wait, unless it does not answer anyway."""
        with self._lock:
            return [one for one in task_ids if self._trouble is None and one not in self._standing]

    def _note(self, tasks: Mapping[str, dict[str, Any] | None], trouble: str | None) -> None:
        """Keep what the queue said."""
        with self._lock:
            if trouble is not None and self._trouble is None:
                log.warning("Slurm does not answer, and the tasks' folders alone are looked at: %s", trouble)
            self._trouble = trouble
            if trouble is not None:
                self._asked_at = time.monotonic()  # it may have taken long to find out
            for task_id, facts in tasks.items():
                if facts is None or facts["exit"] is not None:
                    self._standing.pop(task_id, None)
                elif trouble is None:
                    self._standing[task_id] = facts.get("slurm") or {}

    def _snapshot(self, task_id: str, facts: Mapping[str, Any] | None) -> Snapshot:
        started = (facts or {}).get("started") or {}
        hosts = tuple(started.get("hosts", ()))
        seen = folders.snapshot(
            task_id, facts, host="", address=hosts[0] if hosts else "", region=started.get("partition", "")
        )
        if facts is None:
            return seen
        standing = self._standing.get(task_id) or {}
        seen = replace(
            seen,
            hosts=hosts,
            endpoints=seen.endpoints if hosts else {},
            region=seen.region or standing.get("partition", ""),
            preemptions=max(standing.get("restarts", 0), slurm_states.preemptions(None, dict(facts))),
        )
        if facts["exit"] is not None:
            return seen
        if (
            started.get("incarnation", -1) >= standing.get("restarts", 0)
            and standing.get("status") in _BEFORE
        ):
            standing = {}  # it has started since the queue was asked
        return self._standing_of(seen, standing)

    def _standing_of(self, seen: Snapshot, standing: Mapping[str, Any]) -> Snapshot:
        """Add to a live task's snapshot what Slurm said of it last."""
        message = standing.get("message") or seen.message
        if self._trouble is not None:
            message = f"Slurm does not answer ({self._trouble}); this is what the task's folder says"
        status = TaskStatus(standing["status"]) if standing.get("status") else seen.status
        waits = status in (TaskStatus.PENDING, TaskStatus.PREEMPTED)
        return replace(
            seen, status=status, message=message, reason=seen.reason or ("queued" if waits else "")
        )

    def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
        answer = self.site.ask("read_log", task_id=task_id, node=node, offset=offset, limit=limit)
        chunk = LogChunk(data=answer.data, next_offset=answer.value["next_offset"], end=answer.value["end"])
        if not chunk.data and not chunk.end:
            self._look_after([task_id])
        return chunk

    def read_logs(
        self, wanted: Sequence[LogPosition], *, limit: int = 65536
    ) -> Mapping[LogPosition, LogChunk]:
        chunks = read_logs(self.site.transport, self.site.home, wanted, limit)
        self._look_after([at.task_id for at, chunk in chunks.items() if not chunk.data and not chunk.end])
        return chunks

    def _look_after(self, silent: Sequence[str]) -> None:
        """Poll tasks that say nothing: a killed job leaves no record by itself, and a reader may be all who look."""
        if silent and time.monotonic() - self._asked_at >= _QUEUE_S:
            self.poll(silent)

    def fetch(self, task_id: str, path: str, into: Path) -> None:
        fetch_file(self.site.transport, str(self.locate(task_id, path)), into)

    def locate(self, task_id: str, path: str) -> str | None:
        found: str = self.site.ask("locate", task_id=task_id, name=path).value
        return found

    # -- ending

    def cancel(self, task_ids: Collection[str]) -> None:
        trouble = self.site.slurm("slurm_cancel", tools=2, home=self.site.home, task_ids=[*task_ids])
        if trouble is not None:
            log.warning("the tasks will end, and Slurm has not been told: %s", trouble)

    def release(self, task_ids: Collection[str]) -> None:
        self.site.ask("release", task_ids=[*task_ids])

    # -- capabilities

    def find_instances(self) -> Sequence[Instance]:
        return slurm_machines.instances(self.settings, self.site.slurm("slurm_nodes", tools=1))

    @property
    def shell(self) -> SlurmShell:
        return SlurmShell(self.site)

    @property
    def sessions(self) -> SlurmSessions:
        return SlurmSessions(self.site)
