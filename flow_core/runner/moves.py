"""Moving a task that waits for GPUs to a machine where some are free: what each of the two machines does.

Whoever moves it (`flow_core.providers.ssh_moves`) has the other machine *prepare*: the folder is written beside its
place, and a runner stands at the head of the queue. Then the old one *withdraws* it, which is the decision: one rename
that excludes its start, its end and every other move. Then the other one *settles* it: the folder gets its name, and
the runner claims it. Where the mover dies in between, anybody can *adopt* what was withdrawn, from what lies in its old
folder. A folder that was left stays as a mark, so that nobody who comes late starts the task there.
Standard library only, Python 3.8+.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import Any, NamedTuple

from . import machine, notes, proc, slots, task
from .light import signal

#: Of a queue, so many are told; those who wait longest.
_MOST = 200

#: What was withdrawn so long ago is not started any more. Where it arrived, its record is kept for longer (seconds).
_ADOPTED_S = 30 * 86400.0

_MARKS = frozenset({"spec.json", "claimed", "alive", "moved", "cleared", "cancel"})


def queue(home: str, devices: list[str]) -> dict[str, Any]:
    """Tell how many GPUs are free, and who waits here, in order: {free, waiting: [[task id, GPUs, seconds]]}."""
    folder = os.path.join(home, "queue")
    waiting = []
    for ticket in slots.line(folder)[:_MOST]:
        task_id, _, count = slots.label(ticket).rpartition(".")
        waiting.append([task_id, int(count), slots.age_s(folder, ticket)])
    return {"free": _free(home, devices), "waiting": waiting}


def _free(home: str, devices: list[str]) -> int:
    return len(devices) - len(slots.busy(os.path.join(home, "gpus"), devices))


def pack(home: str, task_id: str) -> tuple[dict[str, Any], bytes]:
    """Return what a task's folder holds, for another machine: {spec, kill_grace_s, files}, and their content.

    `files` is as `machine.create` takes it; those with `size` are in the content, one after the other.
    Raises Refused: invalid (it stays), not-found (nothing is left of it).
    """
    folder = machine.place(home, task_id)
    spec, job = task.read_json(folder, "spec.json"), task.read_json(folder, "job.json")
    if spec is None or job is None:
        raise machine.Refused("not-found", f"nothing is left of task {task_id} here")
    found = task.moved(folder)
    if found is not None and time.time() - found["at"] > _ADOPTED_S:
        raise machine.Refused("not-found", f"task {task_id} was moved away too long ago")
    if "among" not in spec or os.path.exists(os.path.join(folder, "stays")):
        raise machine.Refused("invalid", f"task {task_id} stays where it is")
    pieces = []
    for file in spec["files"]:
        if "size" in file:
            with open(os.path.join(folder, machine.inside(file["name"])), "rb") as content:
                pieces.append(content.read())
    told = {"spec": spec, "kill_grace_s": job["kill_grace_s"], "files": spec["files"]}
    return told, b"".join(pieces)


class _Prepared(NamedTuple):
    home: str
    task_id: str
    draft: str
    runner: machine.Launch


#: What this process holds for movers that are about to decide. It ends with their connection, and then the runner
#: finds no folder and leaves; the draft is swept.
_prepared: dict[str, _Prepared] = {}


def prepare(
    home: str,
    task_id: str,
    *,
    job: dict[str, Any],
    spec: dict[str, Any],
    files: list[dict[str, Any]],
) -> str | None:
    """Get ready for a task whose turn it would be here at once; return a word for `settle`, None where it is not so.

    Until then nobody who comes later gets a GPU here, for a minute at most. Raises Refused (missing, unavailable).
    """
    gpu = job["gpu"]
    if os.path.isdir(machine.place(home, task_id)) or slots.waiting(gpu["queue"]):
        return None
    if _free(home, gpu["devices"]) < gpu["count"]:
        return None
    draft = machine.draft(home, task_id, job=job, spec=_arriving(spec), files=files)
    try:
        prepared = _Prepared(home, task_id, draft, machine.Launch(home, task_id, job))
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    first = slots.line(gpu["queue"])[:1] == [prepared.runner.place]
    if not first or _free(home, gpu["devices"]) < gpu["count"]:
        _drop(prepared)
        return None
    token = os.urandom(8).hex()
    _prepared[token] = prepared
    return token


def _arriving(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "moved_at": time.time()}


def settle(home: str, task_id: str, token: str) -> None:
    """Start what was prepared, after it was withdrawn where it was. Raises Refused (unavailable): `adopt` it."""
    prepared = _prepared.pop(token, None)
    if prepared is None or (prepared.home, prepared.task_id) != (home, task_id):
        raise machine.Refused("unavailable", f"nothing is prepared here for task {task_id}")
    machine.appear(prepared.draft, machine.place(home, task_id))
    shutil.rmtree(prepared.draft, ignore_errors=True)
    if not prepared.runner.go():
        machine.launch(home, task_id)


def abandon(home: str, token: str) -> None:  # noqa: ARG001 - every verb is asked in a home
    """Forget what was prepared."""
    prepared = _prepared.pop(token, None)
    if prepared is not None:
        _drop(prepared)


def _drop(prepared: _Prepared) -> None:
    shutil.rmtree(prepared.draft, ignore_errors=True)
    prepared.runner.go()


def withdraw(home: str, task_id: str, to: dict[str, Any], moves: int) -> dict[str, Any] | None:
    """Decide that a task which waits here is on another machine from now on; return where it is, None: it stays.

    After an answer that names a place the task has not started here and never will, and the same answer is given to
    everybody for good: it may name another place than the caller's.
    """
    folder = machine.place(home, task_id)
    found = task.moved(folder)
    if found is not None:
        return found
    owner, job = task.owner_of(folder), task.read_json(folder, "job.json")
    if owner is None or job is None or proc.state(owner) != "alive":
        return None
    if os.path.exists(os.path.join(folder, "cancel")) or not _is_alone(job):
        return None
    found = task.move_away(folder, {"to": to, "moves": moves, "at": time.time()})
    if found is not None:
        task.tell(owner, signal.SIGTERM)  # it leaves the queue; without a signal it would see so by itself
    return found


def _is_alone(job: dict[str, Any]) -> bool:
    """Whether nothing is left of the attempt before: only here could its end be waited for."""
    before = job["after"]
    return not before or not os.path.isdir(before) or notes.gone(before) or task.moved(before) is not None


def adopt(
    home: str,
    task_id: str,
    *,
    job: dict[str, Any],
    spec: dict[str, Any],
    files: list[dict[str, Any]],
) -> None:
    """Have a task that was withdrawn in favour of this machine be here and wait its turn, unless it is here already.

    Raises Refused (missing, unavailable).
    """
    if os.path.isdir(machine.place(home, task_id)):
        machine.launch(home, task_id)
        return
    with machine.Launch(home, task_id, job):  # whoever asks may die meanwhile, and we with the connection
        machine.create(home, task_id, job=job, spec=_arriving(spec), files=files)


def clear(home: str, task_id: str, note: dict[str, Any]) -> None:
    """Keep no more than a mark of a task that has arrived where it was moved to."""
    folder = machine.place(home, task_id)
    if task.moved(folder) is None:
        return
    notes.put(home, task_id, note, replace=True)
    task.write_json(folder, "cleared", {"ended_at": time.time()})
    machine.remove_all_but(_MARKS, folder)
