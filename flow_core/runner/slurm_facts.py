"""What a task's folder says of its Slurm job: its name, its number, its cluster. Stdlib only, Python 3.8+."""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

from . import machine, slurm_tools, task
from .machine import Refused


def job_name(home: str, task_id: str) -> str:
    """Return the name under which a task's job is found again; two homes of one user do not meet."""
    return f"flow-{task_id}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}"


def known_job(home: str, folder: str) -> str | None:
    """Return the id of the job that has claimed a task, or else that was noted for it."""
    owner = task.read_json(folder, "claimed")
    if owner is not None and owner.get("job"):
        return str(owner["job"])
    queued = task.read_json(folder, "queued.json")
    if queued is None or queued["job"] is not None:
        return None if queued is None else str(queued["job"])
    noted = task.read_json(os.path.join(home, "arrays", queued["name"]), "queued.json")
    return None if noted is None else "{}_{}".format(noted["job"], queued["index"])


def facts_of(home: str, task_id: str) -> dict[str, Any] | None:
    """Gather what a task's folder says, its Slurm side included."""
    try:
        folder = machine.place(home, task_id)
    except Refused:
        return None
    try:
        changed = os.stat(folder).st_mtime_ns
    except FileNotFoundError:
        return None
    since, known = _gathered.get(folder, (0.0, None))
    if known is not None and known["changed"] == changed:
        if known["settled"]:
            return dict(known)
    else:
        since = time.monotonic()
    facts = _gather(home, folder)
    if facts is not None:
        # A folder that changes twice within a tick of its clock shows the same time twice.
        settled = time.monotonic() - since > _TICK_S and (facts["queued"] is None or facts["job"] is not None)
        facts.update(changed=changed, settled=settled)
        if facts["exit"] is None:
            _gathered[folder] = (since, facts)
            return dict(facts)
    _gathered.pop(folder, None)
    return facts


#: What the folders of live tasks said last, and since when they are seen unchanged: every record is a new name in its
#: folder, so a folder of the same time says the same. It saves most of the work of watching a thousand tasks.
_gathered: dict[str, tuple[float, dict[str, Any]]] = {}

_TICK_S = 2.0


def _gather(home: str, folder: str) -> dict[str, Any] | None:
    facts = task.gather(folder)
    if facts is None:
        return None
    for name, file in (("owner", "claimed"), ("queued", "queued.json"), ("interrupted", "interrupted")):
        facts[name] = task.read_json(folder, file)
    facts["job"] = None if facts["exit"] else known_job(home, folder)
    return facts


def elsewhere(facts: dict[str, Any], deadline_s: float) -> str | None:
    """Say so when a task's job is on another cluster than the one we can ask: numbers there mean other jobs here."""
    noted = (facts["queued"] or {}).get("cluster")
    ours = None if noted is None else slurm_tools.cluster_name(deadline_s)
    if ours is None or noted == ours:
        return None
    return f"its job is on the cluster {noted!r}, and Slurm's tools here speak with {ours!r}"
