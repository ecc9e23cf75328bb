"""On which hosts a task is: chosen, and written down on every host that can be reached and here.

It stays there, but for a task that waits for GPUs and is moved to a host that has some (`ssh_moves`): of two who name
different places, the one that knows of more moves is right. What `flow_core.runner.notes` holds on one machine is put
together here for all of them. A task is never started where a note says that it is somewhere else, whether that place
can be reached or not.
"""

from __future__ import annotations

import getpass
import logging
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flow_core.errors import FlowError, ProviderUnavailable, SpecRejected
from flow_core.ids import TaskId
from flow_core.models import TaskSpec
from flow_core.providers.local_machine import no_engine
from flow_core.providers.ssh_hosts import Host
from flow_core.runner import notes

log = logging.getLogger("flow_core.ssh")

#: What a host says of a key: see `notes.look`.
Looks = Mapping[Host, Mapping[str, Any]]


@dataclass(frozen=True)
class Place:
    """One host's part of a task: `nodes` of its ranks. `id` is the machine's own name for itself, `name` is ours."""

    id: str
    name: str
    nodes: int = 1


@dataclass(frozen=True)
class Placement:
    """Where a task is, rank after rank; and what a snapshot tells of it while nobody there can be asked.

    The machines of one task know each other by its `secret`. `moves`: how often it has changed its place.
    """

    places: tuple[Place, ...]
    told: Mapping[str, Any] = field(default_factory=dict)
    started: bool = False
    age_s: float = 0.0
    secret: str = field(default="", repr=False)
    moves: int = 0

    @classmethod
    def read(cls, note: Mapping[str, Any]) -> Placement:
        """Read a note."""
        places = tuple(Place(one["id"], one["name"], one["nodes"]) for one in note["hosts"])
        started, age_s = bool(note.get("started")), float(note.get("age_s", 0.0))
        secret, moves = note.get("secret", ""), note.get("moves", 0)
        return cls(places, note.get("told", {}), started, age_s, secret, moves)

    @classmethod
    def moved(cls, moved: Mapping[str, Any]) -> Placement:
        """Read what is left of a task where it was (`moves.withdraw`)."""
        return cls.read({"hosts": [moved["to"]], "moves": moved["moves"], "started": True})

    def note(self) -> dict[str, Any]:
        """Write a note. Pure but for who we are."""
        said = {"told": dict(self.told), "started": self.started, "secret": self.secret, "by": _WE}
        said["moves"] = self.moves
        return {"v": 1, "hosts": self.hosts, **said}

    @property
    def hosts(self) -> list[dict[str, Any]]:
        """The places as plain JSON values."""
        return [{"id": place.id, "name": place.name, "nodes": place.nodes} for place in self.places]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The host of each rank, by name."""
        return tuple(place.name for place in self.places for _ in range(place.nodes))

    @property
    def first_ranks(self) -> list[int]:
        """The first rank of each place."""
        firsts = [0]
        for place in self.places:
            firsts.append(firsts[-1] + place.nodes)
        return firsts[:-1]

    def of_node(self, node: int) -> Place | None:
        """The place of a rank, None where there is no such rank."""
        for first, place in zip(self.first_ranks, self.places, strict=True):
            if first <= node < first + place.nodes:
                return place
        return None


def _us() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a user without a name
        return socket.gethostname()


_WE = _us()


def told(spec: TaskSpec) -> dict[str, Any]:
    """Return what a snapshot shows of a task that nobody can be asked about."""
    shown = spec.model_dump(
        mode="json", include={"name", "instance_type", "num_instances", "labels", "ports"}
    )
    return dict(shown)


class Notebook:
    """The notes on this machine: they help when no host that has one can be reached. Without them all else works."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def read(self, task_id: str) -> Placement | None:
        """Return where a task was placed from here."""
        try:
            note = notes.of_task(self.folder, task_id)
        except OSError:
            return None
        return None if note is None else Placement.read(note)

    def newest(self, digest: str) -> str | None:
        """Return the id of the newest attempt at a key that was placed from here."""
        try:
            found = notes.of_key(self.folder, digest)
        except OSError:
            return None
        return str(found[max(found, key=int)]["task_id"]) if found else None

    def write(self, task_id: str, placement: Placement) -> None:
        """Remember where a task is."""
        try:
            notes.put(self.folder, task_id, placement.note(), replace=True)
            notes.forget(self.folder)
        except OSError as error:
            log.debug("no note could be written under %s: %s", self.folder, error)


# -- choosing


def choose(spec: TaskSpec, hosts: Sequence[Host], silent: Mapping[Host, FlowError]) -> dict[Host, int]:
    """Return how many of the task's nodes go to which of these hosts, the first rank's first.

    Each node gets a host of its own where there are enough of them; among those that are able to, the emptiest. Chance
    decides between equals: submitters on many machines that all find empty hosts would else pick the same one.
    Raises SpecRejected: no host has what it takes; ProviderUnavailable: one that is silent now may have it.
    """
    refused: list[SpecRejected] = []
    able: dict[Host, int] = {}
    for host in hosts:
        try:
            able[host] = nodes_for(spec, host)
        except SpecRejected as error:
            refused.append(error)
    free = dict(able)
    chosen: dict[Host, int] = {}
    for _ in range(spec.num_instances):
        candidates = [host for host in free if free[host] > chosen.get(host, 0)]
        if not candidates:
            raise _too_little(spec, able, refused, silent)
        random.shuffle(candidates)
        best = min(
            candidates,
            key=lambda host: (chosen.get(host, 0), host.load((chosen.get(host, 0) + 1) * spec.gpu_count)),
        )
        chosen[best] = chosen.get(best, 0) + 1
    return chosen


_MANY = 1 << 20


def nodes_for(spec: TaskSpec, host: Host) -> int:
    """Return how many of a task's nodes a host could ever run at once. Raises SpecRejected for none."""
    if spec.region is not None and spec.region != host.name:
        raise SpecRejected(f"region={spec.region!r} is not the host {host.name}")
    if spec.image is not None and host.hello["facts"]["engine"] is None:
        raise no_engine(spec.image, f"host {host.name}")
    if spec.data_mounts and spec.image is None and not host.hello["facts"]["can_mount"]:
        raise SpecRejected(
            f"{spec.data_mounts[0].target!r} cannot be mounted on host {host.name}: without an image that takes root",
            suggestions=["Set image= to run in a container, or read the source's own path."],
        )
    if not spec.gpu_count:
        return _MANY
    one = spec.model_copy(update={"num_instances": 1})
    host.devices.check(one, where=f"host {host.name}", strict=True)
    return len(host.devices.names) // spec.gpu_count


def _too_little(
    spec: TaskSpec,
    able: Mapping[Host, int],
    refused: Sequence[SpecRejected],
    silent: Mapping[Host, FlowError],
) -> FlowError:
    if silent:
        down = "; ".join(error.message for error in silent.values())
        return ProviderUnavailable(f"no host that can be reached has room for this task, and {down}")
    if able:
        have = ", ".join(f"{host.name}: {nodes}" for host, nodes in able.items())
        return SpecRejected(
            f"num_instances={spec.num_instances} with {spec.instance_type!r} each is more than the hosts have ({have})",
            suggestions=["Ask for fewer nodes or smaller ones, or add hosts to ssh.hosts."],
        )
    messages = dict.fromkeys(error.message for error in refused)
    advice = dict.fromkeys(hint for error in refused for hint in error.suggestions)
    return SpecRejected("; ".join(messages), suggestions=[*advice])


# -- agreeing


def agree(task_id: str, wanted: Placement, hosts: Sequence[Host]) -> Placement:
    """Write down where a task is to be, everywhere and in the order that is the same for all; return where it is.

    Another submitter may have been first; then theirs counts. Raises ProviderUnavailable when nobody took the note.
    """
    carried, written, trouble = wanted, list[Host](), ""
    for host in sorted(hosts, key=lambda host: host.id):
        try:
            there = Placement.read(host.call("put_note", task_id=task_id, note=carried.note()))
            if there.places != carried.places and there.moves < carried.moves:
                host.call("put_note", task_id=task_id, note=carried.note(), replace=True)
            elif there.places != carried.places:
                carried = there
                for earlier in written:
                    earlier.call("put_note", task_id=task_id, note=carried.note(), replace=True)
            written.append(host)
        except ProviderUnavailable as error:
            trouble = error.message
    if not written:
        raise ProviderUnavailable(f"task {task_id} could not be placed: {trouble}")
    return replace(carried, told=wanted.told)


# -- where it is


def whereabouts(attempt: int, looks: Looks) -> Placement | None:
    """Return where hosts say that an attempt is, None where nobody knows it."""
    number = str(attempt)
    found = [Placement.read(look["notes"][number]) for look in looks.values() if number in look["notes"]]
    there = {host: look["tasks"][number] for host, look in looks.items() if number in look["tasks"]}
    found += [Placement.moved(one["moved"]) for one in there.values() if one["moved"] is not None]
    here = {host: one for host, one in there.items() if one["moved"] is None}
    if here:
        places = tuple(Place(host.id, host.name) for host in here)
        found.append(Placement(places, moves=max(one["moves"] for one in here.values())))
    return max(found, key=lambda placement: placement.moves, default=None)


def held_by_the_attempt_before(task_id: TaskId, looks: Looks) -> Placement | None:
    """Return where the attempt before this one is while a process of it may live, None when it is gone.

    The next one must be placed there too: nobody else can wait for its end.
    """
    placement = whereabouts(task_id.attempt - 1, looks)
    if placement is None:
        return None
    before = str(task_id.attempt - 1)
    there = {host: look["tasks"][before] for host, look in looks.items() if before in look["tasks"]}
    if all(
        any(host.id == place.id and one["gone"] for host, one in there.items()) for place in placement.places
    ):
        return None
    return placement
