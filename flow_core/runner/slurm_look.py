"""Where many tasks are: their folders' word, then one question to Slurm for all of them. Stdlib only, Python 3.8+."""

from __future__ import annotations

import os
from typing import Any

from . import machine, proc, slurm_states, slurm_tools, task
from .machine import Refused
from .slurm_facts import elsewhere, facts_of, job_name
from .slurm_text import Job

_TAIL_BYTES = 4096


def look(home: str, task_ids: list[str], *, unheard: list[str] | None, deadline_s: float) -> dict[str, Any]:
    """Return {tasks, asked, trouble}: by id what the folders say (None: no such task), and Slurm of those that go on.

    Slurm is asked once for all of them, and its accounting only for jobs that the queue has forgotten; with `unheard`
    only if one of these goes on. A task whose job has ended without an exit record gets one. Where Slurm does not
    answer, `trouble` says why, and the folders' word stands: that is never an end.
    """
    tasks = {task_id: facts_of(home, task_id) for task_id in task_ids}
    live = {task_id: facts for task_id, facts in tasks.items() if facts is not None and facts["exit"] is None}
    if not live or (unheard is not None and not any(task_id in live for task_id in unheard)):
        return {"tasks": tasks, "asked": False, "trouble": None}
    try:
        jobs = _Jobs(slurm_tools.queue([], deadline_s, _owner(home)))
    except Refused as refused:
        if refused.kind != "unavailable":
            raise
        return {"tasks": tasks, "asked": True, "trouble": refused.message}
    for task_id, facts in list(live.items()):
        there = elsewhere(facts, deadline_s)
        if there:
            tasks[task_id] = {**facts, "slurm": {"status": None, "message": there}}
            del live[task_id]
    found = {task_id: jobs.of(job_name(home, task_id), facts) for task_id, facts in live.items()}
    # What was noted before the queue was asked, and is not in its answer, is gone.
    forgotten = {live[one]["job"]: one for one, job in found.items() if job is None and live[one]["job"]}
    gone = set(forgotten.values())
    if gone:
        found.update(slurm_tools.accounted(forgotten, deadline_s))
    for task_id, job in found.items():
        if job is not None and not slurm_states.ended(job):
            status, message = slurm_states.standing(job, live[task_id])
            tasks[task_id] = {**live[task_id], "slurm": _told(job, status, message)}
        elif job is not None or task_id in gone:
            tasks[task_id] = _settled(home, task_id, job)
    return {"tasks": tasks, "asked": True, "trouble": None}


def _owner(home: str) -> str:
    """Return whose jobs are asked for: ours, or everybody's where the tasks are somebody else's."""
    return "--me" if os.stat(home).st_uid == os.geteuid() else ""


def _told(job: Job, status: str | None, message: str) -> dict[str, Any]:
    return {
        "job": job.id,
        "status": status,
        "message": message,
        "partition": job.partition,
        "restarts": job.restarts,
    }


class _Jobs:
    """What the queue knows, by name and element, and by id."""

    def __init__(self, jobs: list[Job]) -> None:
        self.by_id = {job.id: job for job in jobs}
        self.named: dict[tuple[str, int | None], list[Job]] = {}
        for job in jobs:
            self.named.setdefault((job.name, job.element), []).append(job)

    def of(self, name: str, facts: dict[str, Any]) -> Job | None:
        """Return the job that counts: the one that has claimed the task, else one that goes on, else the noted one.

        Slurm keeps a record also of what it has refused, under the same name.
        """
        owner, queued = facts["owner"] or {}, facts["queued"]
        if owner.get("job"):
            return self.by_id.get(owner["job"])
        mine = [*self.named.get((name, None), ())]
        if queued is not None and queued["index"] is not None:
            mine += self.named.get((queued["name"], queued["index"]), ())
        order = lambda job: (slurm_states.ended(job), job.id != facts["job"], int(job.id.split("_")[0]))  # noqa: E731
        return min(mine, key=order, default=None)


def _settled(home: str, task_id: str, job: Job | None) -> dict[str, Any] | None:
    """Give an ended task its record, unless its runner has written one meanwhile; return its facts."""
    folder = machine.place(home, task_id)
    _refresh(folder)
    facts = facts_of(home, task_id)
    owner = None if facts is None else (facts["owner"] or {}).get("job")
    if owner is not None and job is not None and owner != job.id:  # claimed meanwhile, by another job
        return facts
    if facts is not None and facts["exit"] is None:
        record = slurm_states.verdict(job, facts, _tail(_output(home, folder, facts["queued"])))
        if facts["owner"] is None:
            task.claim_first(folder, proc.nobody())
        task.finish(folder, record)
        facts = facts_of(home, task_id)
    return facts


def _refresh(folder: str) -> None:
    """Make a network file system look again: a client that has just changed a folder sees what others put there."""
    path = os.path.join(folder, ".looked." + os.urandom(8).hex())
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        os.unlink(path)
    except OSError:  # a full disk does not matter here
        pass


def _output(home: str, folder: str, queued: dict[str, Any] | None) -> str:
    """Return the path of what a task's batch script has printed."""
    if queued is None or queued["index"] is None:
        return os.path.join(folder, "slurm.out")
    return os.path.join(home, "arrays", queued["name"], "slurm-{}.out".format(queued["index"]))


def _tail(path: str) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
