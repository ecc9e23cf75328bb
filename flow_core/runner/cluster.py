"""A Slurm cluster as seen from a machine that has its tools: what is asked of it, beyond the task folders of `machine`.

Here is what changes something: submitting, cancelling, sweeping; `slurm_look` looks. Nothing is held between calls. The
home is a folder that all nodes see under the same path.

============ ===============================================================================
batch.sh     in a task's folder: the script that Slurm is given
queued.json  in a task's folder: {name, job, index, cluster}, written once Slurm has taken it
slurm.out    in a task's folder: what the script and Slurm itself print
arrays/      one folder per array of tasks: `batch.sh`, and `tasks` with a task folder per line
enqueue/     locks, so that two submits of one task do not both ask Slurm
============ ===============================================================================

Standard library only, Python 3.8+.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import machine, proc, slurm_text, slurm_tools, sweeping, task
from .machine import Refused
from .slurm_facts import elsewhere, facts_of, job_name, known_job

#: Refusals of sbatch after which Slurm has nothing, for certain.
_NOTHING_THERE = ("rejected", "no-tool")


# -- submitting


def submit(
    home: str,
    tasks: list[dict[str, Any]],
    *,
    array: dict[str, str] | None = None,
    depends: str = "",
    retention_s: float,
    deadline_s: float,
) -> None:
    """Create the folders of tasks ({task_id, job, spec, files, script}) and give them to Slurm: once each.

    With `array` ({name, script}) those that are new become elements of one array, all or none of them; the script's
    name and number of elements are for exactly that many, so a set of which some exist goes one by one.
    Raises as `enqueue` does, and Refused (missing) as `machine.create` does.
    """
    sweep(home, retention_s)
    new = []
    for one in tasks:
        files = [
            *one["files"],
            {"name": "batch.sh", "data": one["script"].encode("utf-8", "surrogateescape")},
        ]
        made = machine.create(home, one["task_id"], job=one["job"], spec=one["spec"], files=files)
        new += [one["task_id"]] if made else []
    if array is not None and len(new) == len(tasks):
        enqueue_array(home, array["name"], array["script"], new, deadline_s=deadline_s)
        return
    for one in tasks:
        fresh = one["task_id"] in new
        enqueue(home, one["task_id"], fresh=fresh, depends=depends, deadline_s=deadline_s)


def enqueue(home: str, task_id: str, *, fresh: bool, depends: str, deadline_s: float) -> None:
    """Give a task's script to Slurm, unless Slurm has it already.

    With `fresh` the folder was made by this very submit, so that nobody can have asked before. `depends` is what the
    user wants the job to wait for; it waits for the last process of the attempt before as well. Raises Refused:
    rejected (Slurm never takes this; nothing is left), unavailable (ask again).
    """
    folder = machine.existing(home, task_id)
    if _taken(home, folder):
        return
    with _Turn(home, job_name(home, task_id)):
        if _taken(home, machine.existing(home, task_id)):
            return
        queued = task.read_json(folder, "queued.json")
        job = None if fresh else _look_up(home, task_id, queued, deadline_s)
        name = job_name(home, task_id)
        if job is None:
            after = [part for part in (depends, _last_of_the_attempt_before(home, folder)) if part]
            options = ["--dependency=" + ",".join(after)] if after else []
            try:
                job = _sbatch([*options, os.path.join(folder, "batch.sh")], name, folder, deadline_s)
            except Refused as refused:
                if refused.kind in _NOTHING_THERE:
                    _discard(folder)
                raise
        element = queued if queued is not None and "_" in job else {"name": name, "index": None}
        task.write_json(
            folder, "queued.json", {**element, "job": job, "cluster": slurm_tools.cluster_name(deadline_s)}
        )


def _last_of_the_attempt_before(home: str, folder: str) -> str | None:
    """Return the dependency on a job that may still run the attempt before this one."""
    shelf, number = os.path.split(folder)
    before = os.path.join(shelf, str(int(number) - 1))
    if task.read_json(before, "spec.json") is None or task.read_json(before, "exit.json") is not None:
        return None
    job = known_job(home, before)
    return None if job is None else f"afterany:{job}"


def enqueue_array(home: str, name: str, script: str, task_ids: list[str], *, deadline_s: float) -> None:
    """Give new tasks to Slurm as the elements of one array. As `enqueue`, and all or none of them.

    The folders exist; what says which element is which is written before Slurm is asked, so that whoever finishes this
    submit finds it.
    """
    folders = [machine.existing(home, task_id) for task_id in task_ids]
    shelf = os.path.join(home, "arrays", name)
    machine.private(shelf)
    for file, text in (("tasks", "\n".join(folders) + "\n"), ("batch.sh", script)):
        _write(os.path.join(shelf, file), text)
    element = {"name": name, "job": None, "cluster": slurm_tools.cluster_name(deadline_s)}
    for index, folder in enumerate(folders):
        task.write_json(folder, "queued.json", {**element, "index": index})
    try:
        job = _sbatch([os.path.join(shelf, "batch.sh")], name, shelf, deadline_s)
    except Refused as refused:
        if refused.kind in _NOTHING_THERE:
            for folder in folders:
                _discard(folder)
        raise
    task.write_json(shelf, "queued.json", {"name": name, "job": job})


def _write(path: str, text: str) -> None:
    draft = f"{path}.{os.urandom(8).hex()}"
    with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    os.rename(draft, path)


def _taken(home: str, folder: str) -> bool:
    """Whether Slurm has had this task's script, as far as its folder knows."""
    if any(os.path.exists(os.path.join(folder, name)) for name in ("claimed", "exit.json")):
        return True
    return known_job(home, folder) is not None


class _Turn:
    """A lock that is the same for all submits of one name; a few files serve all names."""

    def __init__(self, home: str, name: str) -> None:
        shelf = os.path.join(home, "enqueue")
        machine.private(shelf)
        self.path = os.path.join(shelf, hashlib.sha256(name.encode()).hexdigest()[:2])

    def __enter__(self) -> None:
        self.fd = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        proc.lock_if_possible(self.fd)

    def __exit__(self, *_exc: object) -> None:
        proc.unlock(self.fd)


def _look_up(home: str, task_id: str, queued: dict[str, Any] | None, deadline_s: float) -> str | None:
    """Return the id of a task's job by its name, None when Slurm knows none."""
    names = {(job_name(home, task_id), None)}
    if queued is not None:
        names.add((queued["name"], queued["index"]))
    jobs = slurm_tools.queue([name for name, _ in names], deadline_s)
    return next((job.id for job in jobs if (job.name, job.element) in names), None)


def _sbatch(arguments: list[str], name: str, cwd: str, deadline_s: float) -> str:
    """Submit a script; return the job's id. Raises Refused: rejected, unavailable."""
    said = ""
    try:
        code, out, err = slurm_tools.tool(
            ["sbatch", "--parsable", *arguments], deadline_s=deadline_s, cwd=cwd
        )
        job = slurm_text.parse_submitted(out) if code == 0 else None
        said = slurm_text.words(err) or f"sbatch ended with exit code {code}"
    except Refused as refused:
        if refused.kind != "deadline":
            raise
        code, job, said = 0, None, refused.message
    if job is None and code != 0 and not slurm_text.transient(said):
        raise Refused("rejected", f"Slurm refuses this task: {said}")
    if job is None:  # the controller may have taken it, and its answer may be lost
        job = next(
            (one.id.split("_")[0] for one in slurm_tools.queue([name], deadline_s) if one.name == name), None
        )
    if job is None:
        raise Refused(
            "unavailable", f"Slurm did not take the task: {said}", ("Submit again with the same key.",)
        )
    return job


def _discard(folder: str) -> None:
    """Remove a task that Slurm has refused, at once for everybody who looks."""
    trash = os.path.join(os.path.dirname(folder), ".old-" + os.urandom(8).hex())
    try:
        os.rename(folder, trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)
    try:
        os.rmdir(os.path.dirname(folder))  # unless there are other attempts
    except OSError:
        pass


# -- ending


def dequeue(home: str, task_ids: list[str], *, deadline_s: float) -> str | None:
    """Ask tasks to stop, and Slurm to end their jobs; return what Slurm said against it, None when all went well.

    What is written in the folders suffices: a task that is not running is ended here and never starts, and a runner
    looks for the wish by itself.
    """
    with ThreadPoolExecutor(16) as pool:  # each record waits for the disk
        jobs = [
            job
            for job in pool.map(lambda task_id: _stop(home, task_id, deadline_s), task_ids)
            if job is not None
        ]
    ids = slurm_text.fold([job for job, is_name in jobs if not is_name])
    trouble = [_scancel(ids[start : start + 200], deadline_s) for start in range(0, len(ids), 200)]
    trouble += [_scancel(["--me", "--name=" + name], deadline_s) for name, is_name in jobs if is_name]
    return next((words for words in trouble if words), None)


def _stop(home: str, task_id: str, deadline_s: float) -> tuple[str, bool] | None:
    """Write down the wish; return what Slurm calls the job, its id or (True) its name. None when it has ended."""
    facts = facts_of(home, task_id)
    if facts is None or facts["exit"] is not None:
        return None
    folder = machine.place(home, task_id)
    os.close(os.open(os.path.join(folder, "cancel"), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    if task.claim_first(folder, proc.nobody()):
        task.finish(folder, task.exit_record("cancelled", message="cancelled before it started"))
    if elsewhere(facts, deadline_s):  # its runner looks for the wish
        return None
    job = facts["job"] or known_job(home, folder)
    return (job_name(home, task_id), True) if job is None else (job, False)


def _scancel(arguments: list[str], deadline_s: float) -> str | None:
    try:
        code, _out, err = slurm_tools.tool(["scancel", "--quiet", *arguments], deadline_s=deadline_s)
    except Refused as refused:
        return refused.message
    said = slurm_text.words(err)
    gone = "Invalid job id" in said or "already completing or completed" in said
    return None if code == 0 or gone else said


def sweep(home: str, retention_s: float) -> None:
    """Do `sweeping.sweep`, and remove the arrays that are older."""
    sweeping.sweep(home, retention_s)
    shelf, limit = os.path.join(home, "arrays"), time.time() - max(retention_s, 86400.0) * 2
    for name in os.listdir(shelf) if os.path.isdir(shelf) else ():
        path = os.path.join(shelf, name)
        try:
            if os.stat(path).st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue
