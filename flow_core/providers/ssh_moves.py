"""Moving a task that waits for GPUs to a host where some are free, in step with whoever watches it.

What the two hosts do is in `flow_core.runner.moves`. The move is decided by one rename on the old host. This process
may die before it, and nothing has happened, or after it, and the next one who looks at the task finishes the move.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flow_core.errors import (
    FlowError,
    ResourceNotFoundError,
    SpecRejected,
    ValidationError,
)
from flow_core.models import TaskSpec
from flow_core.providers.ssh_fleet import Fleet, keep
from flow_core.providers.ssh_hosts import Host, in_background, together
from flow_core.providers.ssh_orders import job_for
from flow_core.providers.ssh_places import Place, Placement, nodes_for, told
from flow_core.providers.transfers import fetch_file, send_blob
from flow_core.providers.transport import BlobsMissing
from flow_core.runner.task import MOVE_BYTES

#: Hosts are asked for free GPUs so often, and not before a task has been seen waiting for so long (seconds).
LOOK_EVERY_S = 1.0

#: A task that could not be moved to a host is not tried there again for so long (seconds).
_AGAIN_S = 3.0

_LOOK_S, _STEP_S = 5.0, 10.0

#: After so long, the other moves are left to the next poll: who asks for many tasks waits for their answers (seconds).
_AT_ONCE_S = 1.0

#: A look that takes longer was begun by the process that this one was forked from.
_LOST_S = 60.0
_TELL_S = 5.0


@dataclass(frozen=True)
class Waiting:
    """A task in a host's queue, and how many seconds it has waited."""

    task_id: str
    gpus: int
    host: Host
    age_s: float


@dataclass(frozen=True)
class Packed:
    """What a host has of a task: its record, and its files as `start` takes them."""

    record: Mapping[str, Any]
    kill_grace_s: float
    files: list[dict[str, Any]]
    data: bytes

    @property
    def spec(self) -> TaskSpec:
        """What was asked for, but for the files."""
        return TaskSpec.model_validate(self.record["spec"])

    def check(self, host: Host) -> None:
        """Raise SpecRejected when it cannot run on a host, or the submitter would not find it there."""
        known = self.record["among"]
        if host.name not in known or known[host.name] not in (None, host.id):
            raise SpecRejected(f"host {host.name} is not among those that the task was submitted to")
        nodes_for(self.spec, host)


class Mover:
    """Moves tasks between hosts. Thread-safe; what it remembers only saves questions."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._lock = threading.Lock()
        self._look_at: float | None = None
        self._looking_since = float("-inf")
        self._found: list[tuple[Waiting, Host]] = []
        self._tried: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._copying: set[tuple[str, str]] = set()

    # -- while something waits

    def attend(self, *, waiting: bool) -> None:
        """Do what can be done for those who wait. The looking is done in the background, a move is done on return."""
        if len(self._fleet.hosts) < 2 or not self._lock.acquire(blocking=False):
            return
        try:
            now = time.monotonic()
            if not waiting:
                self._look_at, self._found = None, []
            elif self._look_at is None:
                self._look_at = now + LOOK_EVERY_S
            elif self._found:
                while self._found and time.monotonic() - now < _AT_ONCE_S:
                    self._try(*self._found.pop(0))
            elif now >= self._look_at and now - self._looking_since > _LOST_S:
                self._looking_since = now
                in_background(self._look)
        finally:
            self._lock.release()

    def _look(self) -> None:
        try:
            self._found = self.possible()
        except FlowError:
            pass
        finally:
            self._look_at = time.monotonic() + LOOK_EVERY_S
            self._looking_since = float("-inf")

    def possible(self) -> list[tuple[Waiting, Host]]:
        """Ask all hosts that can be reached; return which task could start at once on which other host."""
        up = [host for host in self._fleet.hosts if _is_up(host)]
        looks, _ = together(
            up,
            lambda host: host.call("queue", devices=[*host.devices.names], deadline_s=_LOOK_S),
            patience_s=_LOOK_S,
        )
        once = {host.id: host for host in looks}  # a machine may have two names
        now = time.monotonic()
        tried = {pair for pair, until in list(self._tried.items()) if now < until}
        return plan({host: looks[host] for host in once.values()}, tried)

    def _try(self, one: Waiting, target: Host) -> None:
        again = _AGAIN_S
        try:
            self._move(one.task_id, one.host, target)
        except (SpecRejected, ValidationError):  # it is not for this host, or stays where it is
            again = float("inf")
        except BlobsMissing:
            self._copy_in_background(one, target)
        except FlowError:  # the next who looks at it sees how far it came
            pass
        keep(self._tried, (one.task_id, target.id), time.monotonic() + again)

    def _move(self, task_id: str, source: Host, target: Host) -> None:
        packed = _pack(source, task_id)
        packed.check(target)
        places, moves = (Place(target.id, target.name),), packed.record["moves"] + 1
        placement = Placement(places, told(packed.spec), started=True, moves=moves)
        order = _order(task_id, packed, placement, source, target)
        token = target.call("prepare", data=packed.data, deadline_s=_STEP_S, **order)
        if token is None or not self._withdrawn(task_id, source, target, placement, token):
            return
        try:
            target.call("settle", task_id=task_id, token=token, deadline_s=_STEP_S)
        except FlowError:
            target.call("adopt", data=packed.data, deadline_s=_STEP_S, **order)
        self._tell(task_id, placement, source)

    def _withdrawn(self, task_id: str, source: Host, target: Host, placement: Placement, token: str) -> bool:
        """Have the old host decide; whether it decided for this target."""
        order: dict[str, Any] = {"task_id": task_id, "to": placement.hosts[0], "moves": placement.moves}
        done = False
        try:
            moved = source.call("withdraw", deadline_s=_STEP_S, **order)
            done = moved is not None and moved["to"]["id"] == target.id
        finally:
            if not done:  # or nobody knows: then the next who looks finds out
                with contextlib.suppress(FlowError):
                    target.call("abandon", token=token, deadline_s=_STEP_S)
        return done

    # -- what others have begun

    def finish(self, task_id: str, source: Host, said: Mapping[str, Any]) -> Placement:
        """See to it that a task which was withdrawn is where it is to be, and return that place.

        `said` is what `source`, where it was, says of it (`notes.watch`). Raises ProviderUnavailable.
        """
        placement = Placement.moved(said["moved"])
        target = self._fleet.find_host(placement.places[0])
        if target is None or not _is_up(target):
            raise self._fleet.out_of_reach(task_id, placement)
        facts = target.call("watch", task_ids=[task_id], known={})[task_id].get("facts")
        if facts is None and not said["cleared"]:
            self._adopt(task_id, placement, source, target)
        elif facts is not None and not facts["claimed"]:
            target.call("launch", task_id=task_id)
        self._fleet.remember(task_id, placement, write=True)
        if not said["cleared"]:
            self._tell(task_id, placement, source)
        return placement

    def _adopt(self, task_id: str, placement: Placement, source: Host, target: Host) -> None:
        try:
            packed = _pack(source, task_id)
        except ResourceNotFoundError:  # it has arrived at this very moment
            return
        order = _order(task_id, packed, placement, source, target)
        try:
            target.call("adopt", data=packed.data, **order)
        except BlobsMissing:
            _copy(packed, task_id, source, target)
            target.call("adopt", data=packed.data, **order)

    def _tell(self, task_id: str, placement: Placement, source: Host) -> None:
        """Let everybody know where it has arrived; a host that does not hear of it learns it from the old one."""
        self._fleet.remember(task_id, placement, write=True)
        note = placement.note()

        def tell(host: Host) -> None:
            if host is source:
                host.call("clear", task_id=task_id, note=note, deadline_s=_TELL_S)
            else:
                host.call("put_note", task_id=task_id, note=note, replace=True, deadline_s=_TELL_S)

        together(filter(_is_up, self._fleet.hosts), tell, patience_s=_TELL_S)

    # -- large files

    def _copy_in_background(self, one: Waiting, target: Host) -> None:
        """Bring what is missing there; a later look finds it, and the task moves."""
        key = (one.task_id, target.id)
        if key in self._copying:
            return
        self._copying.add(key)

        def copy() -> None:
            try:
                _copy(_pack(one.host, one.task_id), one.task_id, one.host, target)
            except FlowError:
                pass
            finally:
                self._copying.discard(key)

        in_background(copy)


def _is_up(host: Host) -> bool:
    """Whether a host can be asked without waiting for it, as far as is known; others are called in the background."""
    if host.transport.outage is None:
        return True
    host.transport.try_again()
    return False


def _pack(source: Host, task_id: str) -> Packed:
    """Raises ValidationError: it stays there; ResourceNotFoundError; ProviderUnavailable."""
    answer = source.transport.call("pack", {"home": source.home, "task_id": task_id}, deadline_s=_STEP_S)
    found = answer.value
    files = [*found["files"], {"name": "here", "size": MOVE_BYTES}]  # it may move once more
    return Packed(found["spec"], found["kill_grace_s"], files, answer.data + b" " * MOVE_BYTES)


def _order(task_id: str, packed: Packed, placement: Placement, source: Host, target: Host) -> dict[str, Any]:
    """Return what another host is told of a task."""
    job = job_for(packed.spec, task_id, placement, target, packed.kill_grace_s)
    record = {
        **packed.record,
        "placed": placement.hosts,
        "moves": placement.moves,
        "moved_from": source.name,
    }
    return {"task_id": task_id, "job": job, "spec": record, "files": packed.files}


def _copy(packed: Packed, task_id: str, source: Host, target: Host) -> None:
    """Bring the large files of a task from one host to another, those that are not there."""
    names = {file["blob"]: file["name"] for file in packed.files if "blob" in file}
    with tempfile.TemporaryDirectory(prefix="flow-") as folder:
        for sha in target.call("missing_blobs", shas=[*names]):
            path = source.call("locate", task_id=task_id, name=names[sha])
            into = Path(folder) / sha
            fetch_file(source.transport, path, into)
            send_blob(target.transport, target.home, sha, into)
            into.unlink()


def plan(
    looks: Mapping[Host, Mapping[str, Any]], tried: Collection[tuple[str, str]] = ()
) -> list[tuple[Waiting, Host]]:
    """Say which task should go to which host, those that have waited longest first.

    `tried` are (task id, id of a host) that need no thought. A host with a queue of its own takes nobody, and who gets
    a turn at once where it waits stays there.
    """
    free = {host: look["free"] for host, look in looks.items() if not look["waiting"]}
    waiting: list[Waiting] = []
    for host, look in looks.items():
        left, blocked = look["free"], False
        for task_id, gpus, age_s in look["waiting"]:
            left -= gpus
            blocked = blocked or left < 0
            if blocked and age_s >= LOOK_EVERY_S:
                waiting.append(Waiting(task_id, gpus, host, age_s))
    found = []
    for one in sorted(waiting, key=lambda one: -one.age_s):
        fit = [host for host in free if free[host] >= one.gpus and (one.task_id, host.id) not in tried]
        target = max(fit, key=free.__getitem__, default=None)
        if target is not None:
            free[target] -= one.gpus
            found.append((one, target))
    return found
