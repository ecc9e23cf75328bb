"""Tasks on machines that are reached by SSH, with no daemon on any of them.

What a machine does for its tasks is what this one does for its own (`flow_core.runner.machine`), through an agent at
the other end of one connection per host. GPUs are shared out by each host itself, in order of arrival; a task goes to
the host where it gets its turn first, as far as can be told when it is submitted. While it waits, whoever watches may
move it to a host that is free before (`ssh_moves`).
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from flow_core.config import Settings
from flow_core.errors import ConfigError, FlowError, ProviderUnavailable, ResourceNotFoundError, SpecRejected
from flow_core.ids import TaskId
from flow_core.models import Instance, LogChunk, LogPosition, Snapshot, TaskSpec
from flow_core.providers import folder as folders
from flow_core.providers import ssh_orders
from flow_core.providers.spi import Provider
from flow_core.providers.ssh_bell import HostsBell
from flow_core.providers.ssh_fleet import Fleet, Heard
from flow_core.providers.ssh_hosts import Host, together
from flow_core.providers.ssh_places import (
    Looks,
    Place,
    Placement,
    agree,
    choose,
    held_by_the_attempt_before,
    told,
    whereabouts,
)
from flow_core.providers.ssh_shell import SSHSessions, SSHShell
from flow_core.providers.ssh_watch import Watcher, is_id
from flow_core.providers.transfers import fetch_file, read_logs

#: So many tasks of one `submit_many` are submitted side by side: enough to fill the time that words take to travel.
_AT_ONCE = 8

_PATIENCE_S = 15.0
_NVIDIA_SMI_S = 30.0


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
        self._fleet = Fleet(self.settings)
        self._watcher = Watcher(self._fleet)

    @property
    def hosts(self) -> Sequence[Host]:
        """All hosts, in the order of the settings."""
        return self._fleet.hosts

    # -- submitting

    def submit(self, spec: TaskSpec, *, task_id: str) -> None:
        parsed = TaskId.parse(task_id)
        folders.reject_sources((mount.source for mount in spec.data_mounts), self.name)
        if spec.volumes:
            raise SpecRejected(
                "the ssh provider has no volumes",
                suggestions=["Use a path of the host, in data_mounts or in your own code."],
            )
        own = self._fleet.recall(task_id)
        if own is not None and own.started:
            return  # it runs, or waits its turn, or has ended
        looks, silent = self._fleet.look(parsed.digest)
        if any(one["moved"] is not None for look in looks.values() for one in look["tasks"].values()):
            looks, silent = self._after_moves(parsed, looks)
        placement = self._placed_already(task_id, looks)
        if placement is None:
            placement = self._place(spec, parsed, looks, silent)
            self._fleet.remember(task_id, placement, write=True)
            if len(self.hosts) > 1:
                placement = agree(task_id, placement, list(looks))
        if not self._fleet.reachable(placement):
            raise self._fleet.out_of_reach(task_id, placement)
        self._fleet.remember(task_id, placement)
        hosts = self._fleet.hosts_of(placement)
        started = [self._start(spec, task_id, placement, host, leader=hosts[0]) for host in hosts]
        if not all(started):  # it has been moved since we looked
            self._watcher.look([task_id])
            return
        self._fleet.remember(task_id, replace(placement, started=True), write=True)

    def _start(self, spec: TaskSpec, task_id: str, placement: Placement, host: Host, *, leader: Host) -> bool:
        settings = {
            "kill_grace_s": self.settings.kill_grace_s,
            "retention_s": self.settings.retention_days * 86400,
        }
        among = {one.name: one.id if one.transport.connected else None for one in self.hosts}
        return ssh_orders.start(spec, task_id, placement, host, leader=leader, settings=settings, among=among)

    def submit_many(self, tasks: Sequence[tuple[TaskSpec, str]]) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            started = [pool.submit(self.submit, spec, task_id=task_id) for spec, task_id in tasks]
        for one in started:
            one.result()

    def _placed_already(self, task_id: str, looks: Looks) -> Placement | None:
        """Return where the task is, if anybody knows: a note on a host, its folder, a note here."""
        own = self._fleet.recall(task_id)
        found = whereabouts(TaskId.parse(task_id).attempt, looks)
        if found is None or (own is not None and (own.places == found.places or own.moves > found.moves)):
            return own
        return found

    def _after_moves(self, task_id: TaskId, looks: Looks) -> Heard:
        """Look once more when moves that were begun are finished: who died may have left one half-way."""
        moved = {
            str(one["task_id"])
            for look in looks.values()
            for one in look["tasks"].values()
            if one["moved"] is not None
        }
        self._watcher.look(moved)
        return self._fleet.ask_about([task_id.digest])[task_id.digest]

    def _place(
        self, spec: TaskSpec, task_id: TaskId, looks: Looks, silent: Mapping[Host, FlowError]
    ) -> Placement:
        """Choose hosts for a new task. Raises SpecRejected, ProviderUnavailable."""
        if task_id.attempt > 1:
            before = str(replace(task_id, attempt=task_id.attempt - 1))
            held = held_by_the_attempt_before(task_id, looks) or self._noted_elsewhere(before, looks)
            # Where a host was taken out of the settings, what may run there was given up.
            if held is not None and self._fleet.configured(held):
                if not self._fleet.reachable(held):
                    raise self._fleet.out_of_reach(before, held)
                return _after(held, spec, before)
        machines = {host.id: host for host in looks}  # a machine may have two names
        chosen = choose(spec, [*machines.values()], silent)
        for host, nodes in chosen.items():
            host.place(spec, nodes)
        # Teams take their hosts' GPUs one after the other, in this order: so no two of them wait for each other.
        ordered = sorted(chosen, key=lambda host: host.id)
        places = tuple(Place(host.id, host.name, chosen[host]) for host in ordered)
        return Placement(places, told(spec), secret=secrets.token_hex(16))

    def _noted_elsewhere(self, task_id: str, looks: Looks) -> Placement | None:
        """Return the placement of an attempt that only we know of, unless all its hosts have answered."""
        noted = self._fleet.recall(task_id)
        if noted is None or all(any(host.id == place.id for host in looks) for place in noted.places):
            return None
        return noted

    # -- looking

    def find(self, digest: str) -> str | None:
        return self._fleet.find([digest]).get(digest)

    def find_many(self, digests: Collection[str]) -> Mapping[str, str]:
        return self._fleet.find(digests)

    def list(self, *, limit: int) -> Sequence[str]:
        pages, silent = together(
            self.hosts, lambda host: host.call("newest", limit=limit), patience_s=_PATIENCE_S
        )
        if not pages:
            raise self._fleet.nobody(silent)
        found = {task_id: at for page in pages.values() for at, task_id in page}
        return sorted(found, key=lambda task_id: (found[task_id], task_id), reverse=True)[:limit]

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        return self._watcher.poll(task_ids)

    def bell(self, task_ids: Collection[str]) -> HostsBell | None:
        wanted: dict[Host, list[str]] = {}
        for task_id in task_ids:
            placement = self._fleet.recall(task_id)
            host = None if placement is None else self._fleet.host(placement.places[0])
            if host is None:
                return None
            wanted.setdefault(host, []).append(task_id)
        return HostsBell.on(wanted)

    def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
        host = self._watcher.host_of(task_id, node)
        args = {"home": host.home, "task_id": task_id, "node": node, "offset": offset, "limit": limit}
        answer = host.transport.call("read_log", args)
        return LogChunk(data=answer.data, next_offset=answer.value["next_offset"], end=answer.value["end"])

    def read_logs(
        self, wanted: Sequence[LogPosition], *, limit: int = 65536
    ) -> Mapping[LogPosition, LogChunk]:
        there, silent = self._watcher.hosts_of(wanted)

        def ask(host: Host) -> Mapping[LogPosition, LogChunk]:
            part = limit * len(there[host]) // len(wanted)
            return read_logs(host.transport, host.home, there[host], part)

        answers, unheard = together(there, ask, patience_s=_PATIENCE_S)
        silent = {**silent, **unheard}
        if silent and not answers:
            raise self._fleet.nobody(silent)
        return {at: chunk for answer in answers.values() for at, chunk in answer.items()}

    def fetch(self, task_id: str, path: str, into: Path) -> None:
        host = self._watcher.host_of(task_id, 0)
        source = host.call("locate", task_id=task_id, name=path)
        try:
            fetch_file(host.transport, source, into)
        except ResourceNotFoundError as error:
            raise ResourceNotFoundError(f"the task's folder has no file {path!r}") from error

    # -- ending

    def cancel(self, task_ids: Collection[str]) -> None:
        self._everywhere("cancel", task_ids)

    def release(self, task_ids: Collection[str]) -> None:
        self._everywhere("release", task_ids)

    def _everywhere(self, verb: str, task_ids: Iterable[str]) -> None:
        """Do a verb for tasks, on each host for its own. Raises ProviderUnavailable for those that cannot be told."""
        left = {*filter(is_id, task_ids)}
        while left:
            left = self._wherever(verb, left)
            stuck = [one for one in self._watcher.look(left).values() if one.reason == "unreachable"]
            if stuck:
                raise ProviderUnavailable("; ".join(f"task {one.task_id} is {one.message}" for one in stuck))

    def _wherever(self, verb: str, task_ids: Iterable[str]) -> set[str]:
        """Do a verb where tasks are as far as is known; return those that have been moved away from there."""
        wanted: dict[Host, list[str]] = {}
        for task_id in task_ids:
            placement = self._fleet.recall(task_id)
            hosts = self.hosts if placement is None else self._fleet.hosts_of(placement)
            for host in hosts:
                wanted.setdefault(host, []).append(task_id)
        moved, silent = together(
            wanted, lambda host: host.call(verb, task_ids=wanted[host]), patience_s=_PATIENCE_S
        )
        lost = [host for host in silent if any(map(self._fleet.recall, wanted[host]))]
        if lost or (silent and len(silent) == len(wanted)):
            raise self._fleet.nobody(silent)
        return {task_id for answer in moved.values() for task_id in answer}

    # -- capabilities

    @property
    def shell(self) -> SSHShell:
        return SSHShell(self._watcher.host_of)

    @property
    def sessions(self) -> SSHSessions:
        return SSHSessions(self._watcher.host_of)

    def find_instances(self) -> Sequence[Instance]:
        def ask(host: Host) -> list[Instance]:
            devices = host.devices
            busy = host.call("survey", devices=list(devices.names))["busy"]
            return [one.model_copy(update={"region": host.name}) for one in devices.instances(busy=busy)]

        found, silent = together(self.hosts, ask, patience_s=_NVIDIA_SMI_S)
        if not found:
            raise self._fleet.nobody(silent)
        down = [
            one.model_copy(update={"region": host.name, "available": 0})
            for host in silent
            for one in (host.known_devices.instances(busy=0) if host.known_devices else ())
        ]
        return [one for host in self.hosts for one in found.get(host, ())] + down


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
