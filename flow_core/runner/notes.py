"""Where tasks are placed, as several machines remember it: a note per attempt, on every machine that could be reached.

A task that is on a machine which cannot be reached must not be started on another one. So who places a task writes a
note on each machine, in an order that is the same for all who do, before it starts anything; the first note at a place
stays, and whoever finds another's adopts its content. Two who have one machine in common thus agree.
Standard library only, Python 3.8+.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from typing import Any

from . import machine, slots, sweeping, task

#: A note is small, and the longest task may be longer than the time for which ended ones are kept (seconds).
KEPT_S = 90 * 86400.0

#: How long after its note a task may be without a folder on its machine: its submitter is dead by then.
UNSTARTED_S = 120.0


def identity(home: str) -> str:
    """Return the name that this machine's home has given itself, whatever others call it."""
    path = os.path.join(home, "identity")
    machine.private(home)
    try:
        _appear(path, os.urandom(8).hex())
    except FileExistsError:
        pass
    with open(path, encoding="ascii") as file:
        return file.read()


def _appear(path: str, text: str) -> None:
    """Make a file be there whole. Raises FileExistsError when there is one."""
    draft = f"{path}.{os.urandom(6).hex()}"
    with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)
    try:
        os.link(draft, path)
    finally:
        os.unlink(draft)


def _place(home: str, task_id: str) -> str:
    digest, attempt = machine.place(home, task_id).split(os.sep)[-2:]
    return os.path.join(home, "notes", digest, attempt)


def put(home: str, task_id: str, note: dict[str, Any], replace: bool = False) -> dict[str, Any]:
    """Put a note down unless there is one; return the one that is there now. With `replace` it is ours."""
    path = _place(home, task_id)
    machine.private(os.path.dirname(path))
    text = json.dumps({**note, "task_id": task_id})
    if replace:
        there = task.read_json(*os.path.split(path)) or {}
        if there.get("moves", 0) > note.get("moves", 0):  # news of a move that is overtaken by the next one
            return there
        draft = f"{path}.{os.urandom(6).hex()}"
        _appear(draft, text)
        os.rename(draft, path)
        return note
    try:
        _appear(path, text)
        return note
    except FileExistsError:
        with open(path, encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
        if found["hosts"] == note["hosts"]:
            os.utime(path)  # it is being submitted once more
        return found


def of_key(home: str, digest: str) -> dict[str, dict[str, Any]]:
    """Return the notes of a key, by attempt."""
    folder, found = os.path.join(home, "notes", digest), {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    for name in names:
        note = task.read_json(folder, name) if name.isdigit() else None
        if note is not None:
            found[name] = note
    return found


def of_task(home: str, task_id: str) -> dict[str, Any] | None:
    """Return a task's note, with `age_s`, None where there is none."""
    path = _place(home, task_id)
    note = task.read_json(*os.path.split(path))
    try:
        return None if note is None else {**note, "age_s": time.time() - os.stat(path).st_mtime}
    except FileNotFoundError:
        return None


def look(home: str, digests: list[str], devices: list[str] | None = None) -> dict[str, Any]:
    """Gather what a submitter must know before it places tasks with these keys.

    {keys: {digest: {tasks: {attempt: {task_id, gone, moves, moved}}, notes: {attempt: note}}}, survey: what goes on
    here, with `devices`}. A task is gone when it has ended and its last process has, too; `moved` says where one is
    that was here.
    """
    answer: dict[str, Any] = {"keys": {digest: _look(home, digest) for digest in digests}}
    if devices is not None:
        answer["survey"] = machine.survey(home, devices)
    return answer


def _look(home: str, digest: str) -> dict[str, Any]:
    found = {}
    for number in machine.attempts(home, digest):
        folder = os.path.join(home, "tasks", digest, str(number))
        spec = task.read_json(folder, "spec.json")
        if spec is not None:
            about = {"moves": spec.get("moves", 0), "moved": task.moved(folder)}
            found[str(number)] = {"task_id": spec["task_id"], "gone": gone(folder), **about}
    return {"tasks": found, "notes": of_key(home, digest)}


def start(
    home: str,
    task_id: str,
    *,
    job: dict[str, Any],
    spec: dict[str, Any],
    files: list[dict[str, Any]],
    retention_s: float,
) -> bool:
    """Make the task's folder and start its runner, unless that has been done. False: it has been moved away.

    Where there is a note it must be a fresh one: those who watch have given up the submitter of an old one, and may
    have said so. Raises Refused (missing, unavailable).
    """
    sweep(home, retention_s)
    folder = machine.place(home, task_id)
    if not os.path.isdir(folder):
        note = of_task(home, task_id)
        if (
            note is not None
            and note.get("moves", 0)
            and identity(home) not in [one["id"] for one in note["hosts"]]
        ):
            return False
        if note is not None and note["age_s"] > UNSTARTED_S - 20.0:
            raise machine.Refused(
                "unavailable", f"task {task_id} was placed here too long ago", ("Submit it again.",)
            )
        machine.create(home, task_id, job=job, spec=spec, files=files)
    if task.moved(folder) is not None:
        return False
    machine.launch(home, task_id)
    return True


def gone(folder: str) -> bool:
    """Whether a task has ended, and its last process, too."""
    task.probe(folder)  # buries what nobody else has
    if not os.path.exists(os.path.join(folder, "exit.json")):
        return False
    return not slots.is_held(os.path.join(folder, "alive"))


def watch(home: str, task_ids: list[str], known: dict[str, int]) -> dict[str, Any]:
    """Return what is known of each task: {facts, seen}, {same} when `known` has the number `seen`, {note}, or {}.

    Of one that has been moved away: {facts, moved: where it is, cleared: whether it has arrived there}.
    """
    answer: dict[str, Any] = {}
    for task_id, facts in machine.poll(home, task_ids).items():
        if facts is None:
            answer[task_id] = _from_note(home, task_id)
            continue
        moved = facts.pop("moved")
        facts["spec"] = {
            "placed": facts["spec"].get("placed"),
            "moves": facts["spec"].get("moves", 0),
            "moved_from": facts["spec"].get("moved_from"),
            "movable": "among" in facts["spec"],
            "submitted_at": facts["spec"]["submitted_at"],
            "spec": {name: facts["spec"]["spec"][name] for name in _SHOWN},
        }
        if moved is not None:
            cleared = os.path.exists(os.path.join(machine.place(home, task_id), "cleared"))
            answer[task_id] = {"facts": facts, "moved": moved, "cleared": cleared}
            continue
        seen = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
        answer[task_id] = {"same": True} if known.get(task_id) == seen else {"facts": facts, "seen": seen}
    return answer


#: What a snapshot tells of what was asked for.
_SHOWN = ("name", "num_instances", "instance_type", "ports", "labels")


def _from_note(home: str, task_id: str) -> dict[str, Any]:
    try:
        note = of_task(home, task_id)
    except machine.Refused:
        return {}
    return {} if note is None else {"note": note}


def sweep(home: str, retention_s: float) -> None:
    """Remove what is too old (`sweeping.sweep`), notes among it."""
    sweeping.sweep(home, retention_s)
    forget(home)


def forget(home: str) -> None:
    """Remove notes that are too old; looked for once a day at most."""
    shelf = os.path.join(home, "notes")
    stamp = os.path.join(shelf, ".swept")
    now = time.time()
    try:
        if now - os.stat(stamp).st_mtime < 86400:
            return
    except FileNotFoundError:
        pass
    machine.private(shelf)
    with open(stamp, "w"):
        pass
    for key in os.scandir(shelf):
        for note in os.scandir(key.path) if key.is_dir() else ():
            if now - note.stat().st_mtime > KEPT_S:
                os.unlink(note.path)
