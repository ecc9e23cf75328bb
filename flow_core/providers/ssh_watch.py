"""Snapshots of tasks on hosts: one question per host for all of them, and what is said while a host is silent."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flow_core.errors import FlowError, TaskNotFoundError
from flow_core.ids import TaskId
from flow_core.models import LogPosition, Snapshot, TaskStatus
from flow_core.providers import folder as folders
from flow_core.providers.ssh_fleet import Fleet, keep, others
from flow_core.providers.ssh_hosts import Host, together
from flow_core.providers.ssh_moves import Mover
from flow_core.providers.ssh_places import Place, Placement
from flow_core.runner.notes import UNSTARTED_S

#: What a host says of a task: {facts}, with {moved} where it was, {note}, or {} where it knows neither.
Said = Mapping[str, Any]
Answers = Mapping[Host, Mapping[str, Said]]

_PATIENCE_S = 10.0


class Watcher:
    """Asks for tasks, and remembers what was last said of each. Thread-safe."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._mover = Mover(fleet)
        self._table = threading.Lock()
        self._seen: OrderedDict[tuple[str, str], tuple[int, Said]] = OrderedDict()
        self._last: OrderedDict[str, Snapshot] = OrderedDict()

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        """Return a snapshot of each. Raises ProviderUnavailable when no host answers and nothing is known here."""
        seen = self.look(task_ids)
        self._mover.attend(waiting=any(map(_waits, seen.values())))
        return seen

    def look(self, task_ids: Collection[str]) -> dict[str, Snapshot]:
        """Do `poll`, and leave it to others to move who waits. A move that others have begun is finished."""
        ours = [task_id for task_id in dict.fromkeys(task_ids) if is_id(task_id)]
        answers, silent = self._ask(ours)
        stuck = self._follow(answers, silent)
        if not answers and not all(map(self._fleet.recall, ours)):
            raise self._fleet.nobody(silent)
        return {
            task_id: self._snapshot(task_id, answers, silent, stuck) if is_id(task_id) else _lost(task_id)
            for task_id in task_ids
        }

    def host_of(self, task_id: str, node: int) -> Host:
        """Return the host of a node. Raises TaskNotFoundError, ProviderUnavailable."""
        TaskId.parse(task_id)
        placement = self._fleet.recall(task_id)
        if placement is None or not self._is_settled(task_id):
            answers, silent = self._ask([task_id])
            stuck = self._follow(answers, silent)
            self._snapshot(task_id, answers, silent, stuck)  # once it has started, nobody need ask again
            placement = self._placement(task_id, _said_of(task_id, answers))
            if placement is None:
                if silent:
                    raise self._fleet.nobody(silent)
                raise TaskNotFoundError(
                    f"no host knows a task {task_id!r}",
                    suggestions=["List the tasks with flow.list_tasks()."],
                )
        host = self._fleet.host(placement.of_node(node) or placement.places[0])
        if host is None:
            raise TaskNotFoundError(f"task {task_id} was on {self._fleet.absence(placement)}")
        return host

    def hosts_of(
        self, wanted: Sequence[LogPosition]
    ) -> tuple[dict[Host, list[LogPosition]], dict[Host, FlowError]]:
        """Sort logs by the host that has them, and say which hosts could not be asked; unknown tasks are left out."""
        ids = [task_id for task_id in dict.fromkeys(at.task_id for at in wanted) if is_id(task_id)]
        placements = {task_id: self._fleet.recall(task_id) for task_id in ids}
        unknown = [task_id for task_id in ids if placements[task_id] is None or self._may_have_moved(task_id)]
        answers, silent = self._ask(unknown) if unknown else ({}, {})
        stuck = self._follow(answers, silent)
        for task_id in unknown:
            self._snapshot(task_id, answers, silent, stuck)
            placements[task_id] = self._placement(task_id, _said_of(task_id, answers))
        there: dict[Host, list[LogPosition]] = {}
        for at in wanted:
            placement = placements.get(at.task_id)
            host = placement and self._fleet.host(placement.of_node(at.node) or placement.places[0])
            if host:
                there.setdefault(host, []).append(at)
        return there, silent

    # -- asking

    def _ask(self, task_ids: Sequence[str]) -> tuple[dict[Host, dict[str, Said]], dict[Host, FlowError]]:
        """Ask each host about the tasks that are there, or may be."""
        wanted: dict[Host, list[str]] = {}
        for task_id in task_ids:
            placement = self._fleet.recall(task_id)
            hosts = [] if placement is None else self._fleet.hosts_of(placement)
            if any(host.transport.outage is not None for host in hosts) and not self._is_settled(task_id):
                hosts = self._fleet.hosts  # it may have been moved away before
            for host in hosts or self._fleet.hosts:
                wanted.setdefault(host, []).append(task_id)
        return together(wanted, lambda host: self._ask_one(host, wanted[host]), patience_s=_PATIENCE_S)

    def _ask_one(self, host: Host, task_ids: list[str]) -> dict[str, Said]:
        with self._table:
            seen = {task_id: self._seen.get((host.name, task_id)) for task_id in task_ids}
        known = {task_id: one[0] for task_id, one in seen.items() if one is not None}
        answer: dict[str, Said] = host.call("watch", task_ids=task_ids, known=known)
        return {task_id: self._take(host, task_id, one, seen[task_id]) for task_id, one in answer.items()}

    def _take(self, host: Host, task_id: str, said: Said, before: tuple[int, Said] | None) -> Said:
        if said.get("same") and before is not None:
            return {"facts": before[1]}
        if "seen" in said:
            with self._table:
                keep(self._seen, (host.name, task_id), (said["seen"], said["facts"]))
        return said

    def _is_settled(self, task_id: str) -> bool:
        """Whether a task is known to be where it stays."""
        with self._table:
            last = self._last.get(task_id)
        return len(self._fleet.hosts) == 1 or (last is not None and last.status is not TaskStatus.PENDING)

    def _may_have_moved(self, task_id: str) -> bool:
        """Whether nothing was heard yet of a task whose place was written down."""
        with self._table:
            return len(self._fleet.hosts) > 1 and task_id not in self._last

    def _follow(self, answers: dict[Host, dict[str, Said]], silent: dict[Host, FlowError]) -> dict[str, str]:
        """Ask for tasks that are not where they were asked for, where they are now; add to the answers.

        Return those that have not got there, with the reason in words.
        """
        stuck: dict[str, str] = {}
        followed: set[tuple[str, int]] = set()
        while True:
            gone = {
                task_id: (host, said)
                for task_id, (host, said) in _gone(answers).items()
                if (task_id, said["moved"]["moves"]) not in followed
            }
            followed |= {(task_id, said["moved"]["moves"]) for task_id, (_, said) in gone.items()}
            for task_id, (host, said) in gone.items():
                try:
                    self._mover.finish(task_id, host, said)
                except FlowError as error:
                    where = f"from host {host.name} to host {said['moved']['to']['name']}"
                    stuck[task_id] = f"moving {where}: {error.message}"
            moved = [task_id for task_id in gone if task_id not in stuck]
            if not moved:
                return stuck
            more, unheard = self._ask(moved)
            silent.update(unheard)
            for host, answer in more.items():
                answers[host] = {**answers.get(host, {}), **answer}

    # -- saying

    def _snapshot(
        self, task_id: str, answers: Answers, silent: Mapping[Host, FlowError], stuck: Mapping[str, str]
    ) -> Snapshot:
        there = _said_of(task_id, answers)
        placement = self._placement(task_id, there)
        if placement is None:
            return self._unknown(task_id, silent)
        facts = {
            host.id: (host, said["facts"])
            for host, said in there.items()
            if "facts" in said and "moved" not in said
        }
        leader = placement.places[0]
        if task_id in stuck:
            host, said = _gone(answers)[task_id]
            return replace(_shown(task_id, host, said["facts"]), message=stuck[task_id], reason="unreachable")
        if leader.id not in facts:
            return self._without_facts(task_id, placement, leader, answers)
        seen = _shown(task_id, *facts[leader.id])
        if len(placement.places) > 1:
            parts = [_shown(task_id, *facts[place.id]) for place in placement.places if place.id in facts]
            seen = joined(placement, seen, parts)
        with self._table:
            keep(self._last, task_id, seen)
        return seen

    def _placement(self, task_id: str, there: Mapping[Host, Said]) -> Placement | None:
        known = self._fleet.recall(task_id)
        found = [] if known is None else [known]
        told = [_placed(said["facts"]["spec"]) for said in there.values() if "facts" in said]
        found += told + [Placement.read(said["note"]) for said in there.values() if "note" in said]
        best = max(found, key=lambda one: one.moves, default=None)
        if best is not known and best is not None and best in told:
            self._fleet.remember(task_id, best, write=known is not None)
        return best

    def _unknown(self, task_id: str, silent: Mapping[Host, FlowError]) -> Snapshot:
        if not silent:
            return _lost(task_id)
        message = f"no host that can be reached knows this task; {others(self._fleet.hosts, silent)}"
        return replace(_lost(task_id), status=TaskStatus.PENDING, reason="unreachable", message=message)

    def _without_facts(self, task_id: str, placement: Placement, leader: Place, answers: Answers) -> Snapshot:
        """Describe a task of which its host says nothing: it cannot be asked, or it has not been told yet."""
        with self._table:
            last = self._last.get(task_id)
        if last is not None and last.status.final:
            return last
        host = self._fleet.host(leader)
        if host is None:
            return replace(_lost(task_id), message=f"it was placed on {self._fleet.absence(placement)}")
        if host in answers:
            notes = [said["note"] for said in _said_of(task_id, answers).values() if "note" in said]
            noted = Placement.read(notes[0]) if notes else self._fleet.noted(task_id)
            if placement.started or noted is None or noted.age_s > UNSTARTED_S:
                return _lost(task_id)
            return _told(task_id, placement, "queued", f"placed on host {leader.name}, not started yet")
        message = f"placed on {self._fleet.absence(placement)}"
        if last is not None:
            return replace(last, reason="unreachable", message=message)
        return _told(task_id, placement, "unreachable", message)


def _said_of(task_id: str, answers: Answers) -> dict[Host, Said]:
    return {host: answer[task_id] for host, answer in answers.items() if answer.get(task_id)}


def _placed(spec: Mapping[str, Any]) -> Placement:
    return Placement.read({"hosts": spec["placed"], "moves": spec["moves"], "started": True})


def _gone(answers: Answers) -> dict[str, tuple[Host, Said]]:
    """Return which tasks were moved away from a host, and are on none of those that have answered."""
    newest: dict[str, tuple[tuple[int, bool], Host, Said]] = {}
    for host, answer in answers.items():
        for task_id, said in answer.items():
            if "facts" not in said:
                continue
            moved = said.get("moved")
            rank = (said["facts"]["spec"]["moves"] if moved is None else moved["moves"], moved is None)
            if task_id not in newest or rank > newest[task_id][0]:
                newest[task_id] = (rank, host, said)
    return {task_id: (host, said) for task_id, (_, host, said) in newest.items() if "moved" in said}


def _waits(seen: Snapshot) -> bool:
    return seen.status is TaskStatus.PENDING and seen.reason == "queued" and seen.num_instances == 1


def _shown(task_id: str, host: Host, facts: Said) -> Snapshot:
    target = host.transport.target
    seen = folders.snapshot(task_id, facts, host=host.name, address=host.address, region=host.name)
    if seen.status is TaskStatus.PENDING and seen.reason == "queued":
        stays = "" if facts["spec"]["movable"] else ", where it stays"
        before = facts["spec"]["moved_from"]
        moved = f", moved there from host {before}" if before else ""
        seen = replace(seen, message=f"{seen.message} on host {host.name}{moved}{stays}")
    return replace(seen, ssh_host=target.host, ssh_port=target.port, ssh_user=target.user)


def joined(placement: Placement, leader: Snapshot, parts: Sequence[Snapshot]) -> Snapshot:
    """Make one snapshot of those of a task's machines: how it ended is the leader's word. Pure."""
    peaks = [one.peak_memory_bytes for one in parts if one.peak_memory_bytes is not None]
    seen = replace(
        leader,
        hosts=placement.nodes,
        gpus=tuple(gpu for one in parts for gpu in one.gpus),
        peak_memory_bytes=max(peaks, default=None),
    )
    if seen.status.final and not all(one.status.final for one in parts):
        return replace(seen, status=TaskStatus.RUNNING, reason="", exit_code=None, signal=None, ended_at=None)
    return seen


def _told(task_id: str, placement: Placement, reason: str, message: str) -> Snapshot:
    about = placement.told
    return Snapshot(
        task_id=task_id,
        name=about.get("name", ""),
        status=TaskStatus.PENDING,
        reason=reason,
        message=message,
        hosts=placement.nodes,
        instance_type=about.get("instance_type", ""),
        num_instances=about.get("num_instances", 1),
        labels=about.get("labels", {}),
    )


def is_id(text: str) -> bool:
    """Whether a text is a task id of ours."""
    try:
        TaskId.parse(text)
    except TaskNotFoundError:
        return False
    return True


def _lost(task_id: str) -> Snapshot:
    return folders.snapshot(task_id, None, host="", address="", region="")
