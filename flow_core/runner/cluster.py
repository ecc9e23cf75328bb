"""A Slurm cluster as seen from a machine that has its tools: what is asked of it, beyond the task folders of `machine`.

Nothing is held between calls. Every tool is given a deadline, since they hang when the controller is gone. The home is
a folder that all nodes see under the same path.

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
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import machine, proc, slurm_states, slurm_text, task
from .inventory import base_environment
from .machine import Refused
from .slurm_text import Job

#: What a cluster's users set so that the tools find it. Other variables of Slurm's would change what the tools do:
#: those of a job that we may be inside of, and the options that a user has put there for interactive work.
_OWN = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")

#: What means something on this machine alone; sbatch takes its environment to the nodes.
_HERE = ("TMPDIR", "XDG_RUNTIME_DIR")

#: Refusals of sbatch after which Slurm has nothing, for certain.
_NOTHING_THERE = ("rejected", "no-tool")

_TAIL_BYTES = 4096


def environment() -> dict[str, str]:
    """Return the variables for Slurm's tools; sbatch takes them to the nodes."""
    own = {name: os.environ[name] for name in _OWN if name in os.environ}
    base = {**base_environment(sys.executable), **own, "PATH": os.environ.get("PATH", os.defpath)}
    return {name: value for name, value in base.items() if name not in _HERE}


def tool(argv: list[str], *, deadline_s: float, cwd: str | None = None) -> tuple[int, str, str]:
    """Run one of Slurm's tools: (exit code, stdout, stderr). Raises Refused (deadline, no-tool)."""
    try:
        done = subprocess.run(
            argv,
            env=environment(),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=deadline_s,
            start_new_session=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise Refused(
            "no-tool",
            f"there is no {argv[0]!r} on this machine",
            ("Install Slurm's client tools here, or set slurm.host to a login node that has them.",),
        ) from error
    except subprocess.TimeoutExpired:
        raise Refused("deadline", f"{argv[0]} did not answer within {deadline_s:g} s") from None
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def _ask(argv: list[str], *, deadline_s: float) -> str:
    """Return what a tool prints. Raises Refused (unavailable) with its own words where it fails."""
    try:
        code, out, err = tool(argv, deadline_s=deadline_s)
    except Refused as refused:
        if refused.kind != "deadline":
            raise
        raise Refused("unavailable", refused.message, ("Is Slurm's controller up?",)) from refused
    if code != 0:
        raise Refused("unavailable", f"{argv[0]}: {slurm_text.words(err) or f'exit code {code}'}")
    return out


# -- names


def job_name(home: str, task_id: str) -> str:
    """Return the name under which a task's job is found again; two homes of one user do not meet."""
    return f"flow-{task_id}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}"


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
        task.write_json(folder, "queued.json", {**element, "job": job, "cluster": cluster_name(deadline_s)})


def _last_of_the_attempt_before(home: str, folder: str) -> str | None:
    """Return the dependency on a job that may still run the attempt before this one."""
    shelf, number = os.path.split(folder)
    before = os.path.join(shelf, str(int(number) - 1))
    if task.read_json(before, "spec.json") is None or task.read_json(before, "exit.json") is not None:
        return None
    job = _known_job(home, before)
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
    element = {"name": name, "job": None, "cluster": cluster_name(deadline_s)}
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
    return _known_job(home, folder) is not None


def _known_job(home: str, folder: str) -> str | None:
    """Return the id of the job that has claimed a task, or else that was noted for it."""
    owner = task.read_json(folder, "claimed")
    if owner is not None and owner.get("job"):
        return str(owner["job"])
    queued = task.read_json(folder, "queued.json")
    if queued is None or queued["job"] is not None:
        return None if queued is None else str(queued["job"])
    noted = task.read_json(os.path.join(home, "arrays", queued["name"]), "queued.json")
    return None if noted is None else "{}_{}".format(noted["job"], queued["index"])


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
    jobs = _queue([name for name, _ in names], deadline_s)
    return next((job.id for job in jobs if (job.name, job.element) in names), None)


def _queue(names: list[str], deadline_s: float, user: str = "--me") -> list[Job]:
    return slurm_text.parse_queue(_ask(slurm_text.queue_command(names, user), deadline_s=deadline_s))


def _owner(home: str) -> str:
    """Return whose jobs are asked for: ours, or everybody's where the tasks are somebody else's."""
    return "--me" if os.stat(home).st_uid == os.geteuid() else ""


def cluster_name(deadline_s: float) -> str | None:
    """Return the name of the cluster that the tools speak with, None where it does not tell. Asked once."""
    conf = os.environ.get("SLURM_CONF", "")
    if conf not in _clusters:
        try:
            named = setting("ClusterName", deadline_s=deadline_s)
        except Refused:
            return None
        if named is None:
            return None
        _clusters[conf] = named
    return _clusters[conf]


#: Names of clusters by the configuration that leads to them.
_clusters: dict[str, str] = {}


def _sbatch(arguments: list[str], name: str, cwd: str, deadline_s: float) -> str:
    """Submit a script; return the job's id. Raises Refused: rejected, unavailable."""
    said = ""
    try:
        code, out, err = tool(["sbatch", "--parsable", *arguments], deadline_s=deadline_s, cwd=cwd)
        job = slurm_text.parse_submitted(out) if code == 0 else None
        said = slurm_text.words(err) or f"sbatch ended with exit code {code}"
    except Refused as refused:
        if refused.kind != "deadline":
            raise
        code, job, said = 0, None, refused.message
    if job is None and code != 0 and not slurm_text.transient(said):
        raise Refused("rejected", f"Slurm refuses this task: {said}")
    if job is None:  # the controller may have taken it, and its answer may be lost
        job = next((one.id.split("_")[0] for one in _queue([name], deadline_s) if one.name == name), None)
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


# -- looking


def look(home: str, task_ids: list[str], *, unheard: list[str] | None, deadline_s: float) -> dict[str, Any]:
    """Return {tasks, asked, trouble}: by id what the folders say (None: no such task), and Slurm of those that go on.

    Slurm is asked once for all of them, and its accounting only for jobs that the queue has forgotten; with `unheard`
    only if one of these goes on. A task whose job has ended without an exit record gets one. Where Slurm does not
    answer, `trouble` says why, and the folders' word stands: that is never an end.
    """
    tasks = {task_id: _facts(home, task_id) for task_id in task_ids}
    live = {task_id: facts for task_id, facts in tasks.items() if facts is not None and facts["exit"] is None}
    if not live or (unheard is not None and not any(task_id in live for task_id in unheard)):
        return {"tasks": tasks, "asked": False, "trouble": None}
    try:
        jobs = _Jobs(_queue([], deadline_s, _owner(home)))
    except Refused as refused:
        if refused.kind != "unavailable":
            raise
        return {"tasks": tasks, "asked": True, "trouble": refused.message}
    for task_id, facts in list(live.items()):
        elsewhere = _elsewhere(facts, deadline_s)
        if elsewhere:
            tasks[task_id] = {**facts, "slurm": {"status": None, "message": elsewhere}}
            del live[task_id]
    found = {task_id: jobs.of(job_name(home, task_id), facts) for task_id, facts in live.items()}
    # What was noted before the queue was asked, and is not in its answer, is gone.
    forgotten = {live[one]["job"]: one for one, job in found.items() if job is None and live[one]["job"]}
    if forgotten:
        found.update(_accounted(forgotten, deadline_s))
    for task_id, job in found.items():
        if job is not None and not slurm_states.ended(job):
            status, message = slurm_states.standing(job, live[task_id])
            tasks[task_id] = {**live[task_id], "slurm": _told(job, status, message)}
        elif job is not None or task_id in forgotten.values():
            tasks[task_id] = _settled(home, task_id, job)
    return {"tasks": tasks, "asked": True, "trouble": None}


def _elsewhere(facts: dict[str, Any], deadline_s: float) -> str | None:
    """Say so when a task's job is on another cluster than the one we can ask: numbers there mean other jobs here."""
    noted = (facts["queued"] or {}).get("cluster")
    ours = None if noted is None else cluster_name(deadline_s)
    if ours is None or noted == ours:
        return None
    return f"its job is on the cluster {noted!r}, and Slurm's tools here speak with {ours!r}"


def _told(job: Job, status: str | None, message: str) -> dict[str, Any]:
    return {
        "job": job.id,
        "status": status,
        "message": message,
        "partition": job.partition,
        "restarts": job.restarts,
    }


def _facts(home: str, task_id: str) -> dict[str, Any] | None:
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
    facts["job"] = None if facts["exit"] else _known_job(home, folder)
    return facts


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


def _accounted(forgotten: dict[str, str], deadline_s: float) -> dict[str, Job | None]:
    """Ask the accounting for jobs that the queue has forgotten; a cluster that has none says so with an error."""
    try:
        code, out, _err = tool(slurm_text.accounting_command(sorted(forgotten)), deadline_s=deadline_s)
    except Refused:
        return {}
    jobs = slurm_text.parse_accounting(out) if code == 0 else []
    return {forgotten[job.id]: job for job in jobs if job.id in forgotten}


def _settled(home: str, task_id: str, job: Job | None) -> dict[str, Any] | None:
    """Give an ended task its record, unless its runner has written one meanwhile; return its facts."""
    folder = machine.place(home, task_id)
    _refresh(folder)
    facts = _facts(home, task_id)
    owner = None if facts is None else (facts["owner"] or {}).get("job")
    if owner is not None and job is not None and owner != job.id:  # claimed meanwhile, by another job
        return facts
    if facts is not None and facts["exit"] is None:
        record = slurm_states.verdict(job, facts, _tail(_output(home, folder, facts["queued"])))
        if facts["owner"] is None:
            task.claim_first(folder, proc.nobody())
        task.finish(folder, record)
        facts = _facts(home, task_id)
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
    facts = _facts(home, task_id)
    if facts is None or facts["exit"] is not None:
        return None
    folder = machine.place(home, task_id)
    os.close(os.open(os.path.join(folder, "cancel"), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    if task.claim_first(folder, proc.nobody()):
        task.finish(folder, task.exit_record("cancelled", message="cancelled before it started"))
    if _elsewhere(facts, deadline_s):  # its runner looks for the wish
        return None
    job = facts["job"] or _known_job(home, folder)
    return (job_name(home, task_id), True) if job is None else (job, False)


def _scancel(arguments: list[str], deadline_s: float) -> str | None:
    try:
        code, _out, err = tool(["scancel", "--quiet", *arguments], deadline_s=deadline_s)
    except Refused as refused:
        return refused.message
    said = slurm_text.words(err)
    gone = "Invalid job id" in said or "already completing or completed" in said
    return None if code == 0 or gone else said


def sweep(home: str, retention_s: float) -> None:
    """Do `machine.sweep`, and remove the arrays that are older."""
    machine.sweep(home, retention_s)
    shelf, limit = os.path.join(home, "arrays"), time.time() - max(retention_s, 86400.0) * 2
    for name in os.listdir(shelf) if os.path.isdir(shelf) else ():
        path = os.path.join(shelf, name)
        try:
            if os.stat(path).st_mtime < limit:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue


# -- what there is


def nodes(*, deadline_s: float) -> list[dict[str, Any]]:
    """Return every node in every partition (`slurm_text.Node`)."""
    listed = slurm_text.parse_nodes(_ask(slurm_text.nodes_command(), deadline_s=deadline_s))
    return [node._asdict() for node in listed]


def setting(name: str, *, deadline_s: float) -> str | None:
    """Return one value of the cluster's own configuration."""
    return slurm_text.parse_setting(_ask(["scontrol", "show", "config"], deadline_s=deadline_s), name)
