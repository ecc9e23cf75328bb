"""Tasks on machines that are reached by SSH, with no daemon on any of them.

What a machine does for its tasks is what this one does for its own (`flow_core.runner.machine`), through an agent at
the other end of one connection per host. GPUs are shared out by each host itself, in order of arrival; a task goes to
the host where it gets its turn first, as far as can be told when it is submitted, and stays there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

from flow_core.config import Settings
from flow_core.errors import (
    ConfigError,
    FlowError,
    ProviderUnavailable,
    ResourceNotFoundError,
    SpecRejected,
    TaskNotFoundError,
)
from flow_core.ids import TaskId
from flow_core.models import Instance, LogChunk, Snapshot, TaskSpec, TaskStatus
from flow_core.providers import folder as folders
from flow_core.providers.folder import Job
from flow_core.providers.spi import Provider
from flow_core.providers.ssh_bell import HostsBell
from flow_core.providers.ssh_hosts import Host, together
from flow_core.providers.ssh_places import (
    Looks,
    Notebook,
    Place,
    Placement,
    agree,
    choose,
    held_by_the_attempt_before,
    told,
)
from flow_core.providers.ssh_shell import SSHSessions, SSHShell
from flow_core.providers.transport import BlobsMissing, fetch_file, send_archive, send_blob
from flow_core.runner.inventory import UNBUFFERED
from flow_core.runner.notes import UNSTARTED_S

log = logging.getLogger("flow_core.ssh")

#: What is smaller travels with the task, what is larger once per content.
_INLINE_BYTES = 65536

#: A submit begins with a question that is asked again a moment later (seconds).
_FRESH_S = 1.0

#: So many tasks of one `submit_many` are submitted side by side: enough to fill the time that words take to travel.
_AT_ONCE = 8

#: Of so many tasks we remember where they are and what was last said of them.
_REMEMBERED = 20_000


class SSHProvider(Provider):
    """Runs tasks on the hosts of the settings."""

    name: ClassVar[str] = "ssh"
    poll_interval_s: ClassVar[float] = 0.2

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.ssh
        names = [host.name for host in self.settings.hosts]
        if not names:
            raise ConfigError(
                "the ssh provider needs hosts",
                suggestions=[
                    "Name them: FLOW_SSH_HOSTS=gpu1,ada@gpu2, or hosts: under ssh: in ~/.flow/config.yaml."
                ],
            )
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConfigError(f"ssh.hosts names {', '.join(sorted(twice))} twice")
        self.hosts = [Host(host, self.settings) for host in self.settings.hosts]
        for host in self.hosts:
            host.transport.target  # noqa: B018 - a mistake in ~/.ssh/config is told now, not host by host
        self.notebook = Notebook(self.settings.notes)
        self._table = threading.Lock()
        self._placements: OrderedDict[str, Placement] = OrderedDict()
        self._seen: OrderedDict[tuple[str, str], tuple[int, Mapping[str, Any]]] = OrderedDict()
        self._last: OrderedDict[str, Snapshot] = OrderedDict()
        self._heard: OrderedDict[str, tuple[float, Any]] = OrderedDict()

    # -- submitting

    def submit(self, spec: TaskSpec, *, task_id: str) -> None:
        parsed = TaskId.parse(task_id)
        folders.reject_sources((mount.source for mount in spec.data_mounts), self.name)
        if spec.volumes:
            raise SpecRejected(
                "the ssh provider has no volumes",
                suggestions=["Use a path of the host, in data_mounts or in your own code."],
            )
        own = self._recall(task_id)
        if own is not None and own.started:
            return  # it runs, or waits its turn, or has ended
        looks, silent = self._look(parsed.digest)
        placement = self._placed_already(task_id, looks)
        if placement is None:
            placement = self._place(spec, task_id, looks, silent)
            self.notebook.write(task_id, placement)
            if len(self.hosts) > 1:
                placement = agree(task_id, placement, list(looks))
        elif not self._reachable(placement):
            raise self._out_of_reach(task_id, placement)
        self._remember(task_id, placement)
        for host in self._hosts_of(task_id, placement):
            self._start(spec, task_id, placement, host)
        self._remember(task_id, replace(placement, started=True))
        self.notebook.write(task_id, replace(placement, started=True))

    def submit_many(self, tasks: Sequence[tuple[TaskSpec, str]]) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            started = [pool.submit(self.submit, spec, task_id=task_id) for spec, task_id in tasks]
        for one in started:
            one.result()

    def _look(self, digest: str) -> tuple[dict[Host, dict[str, Any]], dict[Host, FlowError]]:
        """Ask all hosts about a key, or take what `find` has just heard. Raises ProviderUnavailable when none answers.

        It may be a moment old: others who place the task at the same time are met when it is written down.
        """
        with self._table:
            at, heard = self._heard.pop(digest, (0.0, None))
        looks, silent = (
            heard if heard is not None and time.monotonic() - at < _FRESH_S else self._ask_about(digest)
        )
        if not looks:
            raise self._nobody(silent)
        return looks, silent

    def _ask_about(self, digest: str) -> tuple[dict[Host, dict[str, Any]], dict[Host, FlowError]]:
        return together(self.hosts, lambda host: host.look(digest), patience_s=15.0)

    def _nobody(self, silent: Mapping[Host, FlowError]) -> FlowError:
        errors = [silent[host] for host in self.hosts if host in silent]
        if len(errors) == 1:
            return errors[0]
        said = "; ".join(error.message for error in errors)
        advice = dict.fromkeys(hint for error in errors for hint in error.suggestions)
        return ProviderUnavailable(f"no host can be reached: {said}", suggestions=[*advice])

    def _placed_already(self, task_id: str, looks: Looks) -> Placement | None:
        """Return where the task is, if anybody knows: its folder, a note on a host, a note here."""
        attempt = str(TaskId.parse(task_id).attempt)
        own = self._recall(task_id)
        for look in looks.values():
            note = look["notes"].get(attempt)
            if note is not None:
                found = Placement.read(note)
                return found if own is None or own.places != found.places else own
        there = [host for host, look in looks.items() if attempt in look["tasks"]]
        return Placement((Place(there[0].id, there[0].name),)) if there else own

    def _place(
        self, spec: TaskSpec, task_id: str, looks: Looks, silent: Mapping[Host, FlowError]
    ) -> Placement:
        """Choose hosts for a new task. Raises SpecRejected, ProviderUnavailable."""
        parsed = TaskId.parse(task_id)
        if parsed.attempt > 1:
            before = str(replace(parsed, attempt=parsed.attempt - 1))
            held = held_by_the_attempt_before(parsed, looks) or self._noted_elsewhere(before, looks)
            # Where a host was taken out of the settings, what may run there was given up.
            if held is not None and self._configured(held):
                if not self._reachable(held):
                    raise self._out_of_reach(before, held)
                return self._after(held, spec, before)
        machines = {host.id: host for host in looks}  # a machine may have two names
        chosen = choose(spec, [*machines.values()], silent)
        for host, nodes in chosen.items():
            host.place(spec, nodes)
        # Gangs take their hosts' GPUs one after the other, in this order: so no two of them wait for each other.
        ordered = sorted(chosen, key=lambda host: host.id)
        places = tuple(Place(host.id, host.name, chosen[host]) for host in ordered)
        return Placement(places, told(spec), secret=secrets.token_hex(16))

    @staticmethod
    def _after(held: Placement, spec: TaskSpec, before: str) -> Placement:
        """Return the placement of a task that waits for the attempt before it: where that one is."""
        places = held.places
        if len(places) == 1:
            places = (replace(places[0], nodes=spec.num_instances),)
        if sum(place.nodes for place in places) != spec.num_instances:
            raise ProviderUnavailable(
                f"the attempt before, {before}, has not ended yet, and it has another number of nodes",
                suggestions=["Ask again when it has ended."],
            )
        return Placement(places, told(spec), secret=secrets.token_hex(16))

    def _noted_elsewhere(self, task_id: str, looks: Looks) -> Placement | None:
        """Return the placement of an attempt that only we know of, unless its host says that it is gone."""
        noted = self._recall(task_id)
        if noted is None or all(any(host.id == place.id for host in looks) for place in noted.places):
            return None
        return noted

    def _start(self, spec: TaskSpec, task_id: str, placement: Placement, host: Host) -> None:
        files, data, blobs = self._pack(spec)
        job = self._job(spec, task_id, placement, host).render(spec, task_id)
        if len(placement.places) > 1:
            self._make_one_of_many(job, placement, host)
        record = folders.record(spec, task_id, submitted_at=datetime.now(timezone.utc))
        record["placed"] = [{"name": place.name, "nodes": place.nodes} for place in placement.places]
        args = {
            "task_id": task_id,
            "job": job,
            "spec": record,
            "files": files,
            "retention_s": self.settings.retention_days * 86400,
        }
        for last in (False, True):
            try:
                host.call("start", data=data, deadline_s=60.0, **args)
                return
            except BlobsMissing:
                if last:
                    raise
                for sha in host.call("missing_blobs", shas=[*blobs]):
                    source = blobs[sha]
                    if isinstance(source, Path):
                        send_archive(host.transport, host.home, sha, source)
                    else:
                        send_blob(host.transport, host.home, sha, source)

    def _job(self, spec: TaskSpec, task_id: str, placement: Placement, host: Host) -> Job:
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
        return Job(
            python=facts["python"] if container is None else "python",
            call=f"{runner}/flow_runner/call.py",
            base_env=facts["environment"] if container is None else UNBUFFERED,
            kill_grace_s=self.settings.kill_grace_s,
            after=f"{home}/tasks/{parsed.digest}/{parsed.attempt - 1}" if parsed.attempt > 1 else None,
            gpu={"count": gpus, "devices": list(host.devices.names), **queue} if gpus else None,
            container=container,
            mounts=mounts,
        )

    def _make_one_of_many(self, job: dict[str, Any], placement: Placement, host: Host) -> None:
        """Add to the runner's orders who the others are (`flow_core.runner.team`)."""
        index = [place.id for place in placement.places].index(host.id)
        leader = self._host(placement.places[0])
        assert leader is not None
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

    @staticmethod
    def _pack(spec: TaskSpec) -> tuple[list[dict[str, Any]], bytes, dict[str, Path | bytes]]:
        """Return the task's files as they travel: (list, the small ones' content, the large ones by SHA-256)."""
        listed: list[dict[str, Any]] = []
        inline: list[bytes] = []
        blobs: dict[str, Path | bytes] = {}
        for file in folders.files(spec):
            source = Path(file["path"]) if "path" in file else file["data"]
            if isinstance(source, Path) and not file["link"] and source.stat().st_size <= _INLINE_BYTES:
                source = source.read_bytes()
            about: dict[str, Any] = {name: file[name] for name in ("name", "mode") if name in file}
            if isinstance(source, bytes) and len(source) <= _INLINE_BYTES:
                listed.append({**about, "size": len(source)})
                inline.append(source)
            else:
                sha = _sha256(source)
                blobs[sha] = source
                listed.append({**about, "blob": sha, "link": bool(file.get("link"))})
        return listed, b"".join(inline), blobs

    # -- where tasks are

    def _remember(self, task_id: str, placement: Placement) -> None:
        with self._table:
            _keep(self._placements, task_id, placement)

    def _recall(self, task_id: str) -> Placement | None:
        with self._table:
            known = self._placements.get(task_id)
        if known is None:
            known = self.notebook.read(task_id)
            if known is not None and known.started:
                self._remember(task_id, known)
        return known

    def _host(self, place: Place) -> Host | None:
        """Return the host of a place: by what the machine calls itself, or by name where it cannot be asked."""
        for host in self.hosts:
            if host.transport.connected and host.id == place.id:
                return host
        named = (host for host in self.hosts if host.name == place.name and not host.transport.connected)
        return next(named, None)

    def _configured(self, placement: Placement) -> bool:
        return all(self._host(place) is not None for place in placement.places)

    def _reachable(self, placement: Placement) -> bool:
        hosts = [self._host(place) for place in placement.places]
        return all(host is not None and host.transport.connected for host in hosts)

    def _hosts_of(self, task_id: str, placement: Placement) -> list[Host]:
        hosts = [self._host(place) for place in placement.places]
        found = [host for host in hosts if host is not None]
        if len(found) < len(hosts):
            raise self._out_of_reach(task_id, placement)
        return found

    def _out_of_reach(self, task_id: str, placement: Placement) -> ProviderUnavailable:
        return ProviderUnavailable(
            f"task {task_id} was placed on {self._absence(placement)}, so it is not started anywhere else",
            suggestions=[
                "Wait until the host is back.",
                "To give up what may run there, take the host out of ssh.hosts and submit again.",
            ],
        )

    def _absence(self, placement: Placement) -> str:
        """Say which host of a placement cannot be asked, and why."""
        for place in placement.places:
            host = self._host(place)
            if host is None:
                return f"host {place.name}, which is not among ssh.hosts any more"
            if host.transport.outage is not None:
                return f"host {host.name}, {host.transport.outage}"
        return f"host {placement.places[0].name}, which has not answered yet"

    # -- looking

    def find(self, digest: str) -> str | None:
        looks, silent = self._ask_about(digest)
        with self._table:
            _keep(self._heard, digest, (time.monotonic(), (looks, silent)), 1000)
        found = {
            int(number): one["task_id"] for look in looks.values() for number, one in look["tasks"].items()
        }
        for look in looks.values():
            found |= {int(number): note["task_id"] for number, note in look["notes"].items()}
        here = self.notebook.newest(digest)
        if here is not None:
            found.setdefault(TaskId.parse(here).attempt, here)
        if not looks and not found:
            raise self._nobody(silent)
        return str(found[max(found)]) if found else None

    def find_many(self, digests: Collection[str]) -> Mapping[str, str]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = dict(zip(digests, pool.map(self.find, digests), strict=True))
        return {digest: task_id for digest, task_id in found.items() if task_id is not None}

    def list(self, *, limit: int) -> Sequence[str]:
        pages, silent = together(self.hosts, lambda host: host.call("newest", limit=limit), patience_s=15.0)
        if not pages:
            raise self._nobody(silent)
        found = {task_id: at for page in pages.values() for at, task_id in page}
        return sorted(found, key=lambda task_id: (found[task_id], task_id), reverse=True)[:limit]

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        ours = [task_id for task_id in dict.fromkeys(task_ids) if _is_id(task_id)]
        answers, silent = self._ask(ours)
        if not answers and not all(map(self._recall, ours)):
            raise self._nobody(silent)
        return {
            task_id: self._snapshot(task_id, answers, silent) if _is_id(task_id) else _lost(task_id)
            for task_id in task_ids
        }

    def _ask(
        self, task_ids: Sequence[str]
    ) -> tuple[dict[Host, dict[str, Mapping[str, Any]]], dict[Host, FlowError]]:
        """Ask each host about the tasks that are there, or may be: one request per host, all at once."""
        wanted: dict[Host, list[str]] = {}
        for task_id in task_ids:
            placement = self._recall(task_id)
            places = () if placement is None else placement.places
            hosts = [host for host in map(self._host, places) if host is not None]
            for host in hosts or self.hosts:
                wanted.setdefault(host, []).append(task_id)

        def ask(host: Host) -> dict[str, Mapping[str, Any]]:
            ids = wanted[host]
            with self._table:
                known = {
                    task_id: self._seen[host.name, task_id][0]
                    for task_id in ids
                    if (host.name, task_id) in self._seen
                }
            answer: dict[str, Mapping[str, Any]] = host.call("watch", task_ids=ids, known=known)
            return {task_id: self._facts(host, task_id, one) for task_id, one in answer.items()}

        return together(wanted, ask, patience_s=10.0)

    def _facts(self, host: Host, task_id: str, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return {facts} or {note} or {}; what has not changed is what we have been told before."""
        key = (host.name, task_id)
        with self._table:
            if answer.get("same"):
                return {"facts": self._seen[key][1]}
            if "facts" in answer:
                _keep(self._seen, key, (answer["seen"], answer["facts"]))
        return answer

    def _snapshot(
        self,
        task_id: str,
        answers: Mapping[Host, Mapping[str, Mapping[str, Any]]],
        silent: Mapping[Host, FlowError],
    ) -> Snapshot:
        there = {host: answer[task_id] for host, answer in answers.items() if answer.get(task_id)}
        placement = self._placement_of(task_id, there)
        if placement is None:
            return self._unknown(task_id, silent)
        facts = {host.id: (host, one["facts"]) for host, one in there.items() if "facts" in one}
        leader = placement.places[0]
        if leader.id not in facts:
            return self._half(task_id, placement, leader, answers)
        seen = self._shown(task_id, *facts[leader.id])
        if len(placement.places) > 1:
            parts = [
                self._shown(task_id, *facts[place.id]) for place in placement.places if place.id in facts
            ]
            seen = together_shown(placement, seen, parts)
        with self._table:
            _keep(self._last, task_id, seen)
        return seen

    def _placement_of(self, task_id: str, there: Mapping[Host, Mapping[str, Any]]) -> Placement | None:
        known = self._recall(task_id)
        if known is not None:
            return known
        noted = [Placement.read(one["note"]) for one in there.values() if "note" in one]
        placed = [host for host, one in there.items() if "facts" in one]
        if placed:
            found = Placement((Place(placed[0].id, placed[0].name),), started=True)
            self._remember(task_id, found)
            return found
        return noted[0] if noted else None

    def _shown(self, task_id: str, host: Host, facts: Mapping[str, Any]) -> Snapshot:
        target = host.transport.target
        seen = folders.snapshot(task_id, facts, host=host.name, address=host.address, region=host.name)
        if seen.status is TaskStatus.PENDING and seen.reason == "queued":
            seen = replace(seen, message=f"{seen.message} on host {host.name}, where it stays")
        return replace(seen, ssh_host=target.host, ssh_port=target.port, ssh_user=target.user)

    def _unknown(self, task_id: str, silent: Mapping[Host, FlowError]) -> Snapshot:
        if not silent:
            return _lost(task_id)
        down = "; ".join(error.message for error in silent.values())
        return replace(
            _lost(task_id),
            status=TaskStatus.PENDING,
            reason="unreachable",
            message=f"no host that can be reached knows this task; {down}",
        )

    def _half(
        self,
        task_id: str,
        placement: Placement,
        missing: Place,
        answers: Mapping[Host, Mapping[str, Mapping[str, Any]]],
    ) -> Snapshot:
        """Describe a task of which a host says nothing: it cannot be asked, or it has not been told yet."""
        with self._table:
            last = self._last.get(task_id)
        if last is not None and last.status.final:
            return last
        host = self._host(missing)
        if host is None:
            return replace(_lost(task_id), message=f"it was placed on {self._absence(placement)}")
        if host in answers:
            notes = [
                answer[task_id]["note"] for answer in answers.values() if "note" in answer.get(task_id, ())
            ]
            noted = Placement.read(notes[0]) if notes else self.notebook.read(task_id)
            if placement.started or noted is None or noted.age_s > UNSTARTED_S:
                return _lost(task_id)
            return self._told(task_id, placement, "queued", f"placed on host {missing.name}, not started yet")
        message = f"placed on {self._absence(placement)}"
        if last is not None:
            return replace(last, reason="unreachable", message=message)
        return self._told(task_id, placement, "unreachable", message)

    def _told(self, task_id: str, placement: Placement, reason: str, message: str) -> Snapshot:
        about = placement.told
        return Snapshot(
            task_id=task_id,
            name=about.get("name", ""),
            status=TaskStatus.PENDING,
            reason=reason,
            message=message,
            hosts=tuple(place.name for place in placement.places for _ in range(place.nodes)),
            instance_type=about.get("instance_type", ""),
            num_instances=about.get("num_instances", 1),
            labels=about.get("labels", {}),
        )

    def bell(self, task_ids: Collection[str]) -> HostsBell | None:
        wanted: dict[Host, list[str]] = {}
        for task_id in task_ids:
            placement = self._recall(task_id)
            host = None if placement is None else self._host(placement.places[0])
            if host is None:
                return None
            wanted.setdefault(host, []).append(task_id)
        return HostsBell.on(wanted)

    def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
        host = self._host_of(task_id, node)
        args = {"home": host.home, "task_id": task_id, "node": node, "offset": offset, "limit": limit}
        answer = host.transport.call("read_log", args)
        return LogChunk(data=answer.data, next_offset=answer.value["next_offset"], end=answer.value["end"])

    def fetch(self, task_id: str, path: str, into: Path) -> None:
        host = self._host_of(task_id, 0)
        source = host.call("locate", task_id=task_id, name=path)
        try:
            fetch_file(host.transport, source, into)
        except ResourceNotFoundError as error:
            raise ResourceNotFoundError(f"the task's folder has no file {path!r}") from error

    def _host_of(self, task_id: str, node: int) -> Host:
        """Return the host of a node. Raises TaskNotFoundError, ProviderUnavailable."""
        TaskId.parse(task_id)
        placement = self._recall(task_id)
        if placement is None:
            answers, silent = self._ask([task_id])
            there = {host: answer[task_id] for host, answer in answers.items() if answer.get(task_id)}
            placement = self._placement_of(task_id, there)
            if placement is None:
                if silent:
                    raise self._nobody(silent)
                raise TaskNotFoundError(
                    f"no host knows a task {task_id!r}",
                    suggestions=["List the tasks with flow.list_tasks()."],
                )
        place = placement.of_node(node) or placement.places[0]
        host = self._host(place)
        if host is None:
            raise TaskNotFoundError(f"task {task_id} was on {self._absence(placement)}")
        return host

    # -- ending

    def cancel(self, task_ids: Collection[str]) -> None:
        self._everywhere("cancel", task_ids)

    def release(self, task_ids: Collection[str]) -> None:
        self._everywhere("release", task_ids)

    def _everywhere(self, verb: str, task_ids: Iterable[str]) -> None:
        """Do a verb for tasks, on each host for its own. Raises ProviderUnavailable for those that cannot be told."""
        wanted: dict[Host, list[str]] = {}
        for task_id in filter(_is_id, task_ids):
            placement = self._recall(task_id)
            hosts = self.hosts if placement is None else [*filter(None, map(self._host, placement.places))]
            for host in hosts:
                wanted.setdefault(host, []).append(task_id)
        _, silent = together(wanted, lambda host: host.call(verb, task_ids=wanted[host]), patience_s=15.0)
        lost = [error for host, error in silent.items() if any(map(self._recall, wanted[host]))]
        if lost or (silent and len(silent) == len(wanted)):
            raise self._nobody(silent)

    # -- capabilities

    @property
    def shell(self) -> SSHShell:
        return SSHShell(self._host_of)

    @property
    def sessions(self) -> SSHSessions:
        return SSHSessions(self._host_of)

    def find_instances(self) -> Sequence[Instance]:
        def ask(host: Host) -> list[Instance]:
            devices = host.devices
            busy = host.call("survey", devices=list(devices.names))["busy"]
            return [one.model_copy(update={"region": host.name}) for one in devices.instances(busy=busy)]

        found, silent = together(self.hosts, ask, patience_s=30.0)
        if not found:
            raise self._nobody(silent)
        down = [
            one.model_copy(update={"region": host.name, "available": 0})
            for host in silent
            for one in (host.known_devices.instances(busy=0) if host.known_devices else ())
        ]
        return [one for host in self.hosts for one in found.get(host, ())] + down


def together_shown(placement: Placement, leader: Snapshot, parts: Sequence[Snapshot]) -> Snapshot:
    """Make one snapshot of those of a task's machines: how it ended is the leader's word. Pure."""
    names = tuple(place.name for place in placement.places for _ in range(place.nodes))
    peaks = [one.peak_memory_bytes for one in parts if one.peak_memory_bytes is not None]
    seen = replace(
        leader,
        hosts=names,
        gpus=tuple(gpu for one in parts for gpu in one.gpus),
        peak_memory_bytes=max(peaks, default=None),
    )
    if seen.status.final and not all(one.status.final for one in parts):
        return replace(seen, status=TaskStatus.RUNNING, reason="", exit_code=None, signal=None, ended_at=None)
    return seen


def _is_id(text: str) -> bool:
    try:
        TaskId.parse(text)
    except TaskNotFoundError:
        return False
    return True


def _lost(task_id: str) -> Snapshot:
    return folders.snapshot(task_id, None, host="", address="", region="")


def _keep(table: OrderedDict[Any, Any], key: Any, value: Any, most: int = _REMEMBERED) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > most:
        table.popitem(last=False)


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
