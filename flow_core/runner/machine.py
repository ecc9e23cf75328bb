"""One machine and the tasks in a home folder on it: all that can be asked of them, as plain functions.

A provider calls them in its own process where the machine is this one; `agent` serves them to providers elsewhere.
Arguments and answers are JSON values and bytes. Nothing is held between calls: all of it is in files under the home,
readable by their owner alone.

============ ===============================================================================
tasks/       one folder per key, in it one per attempt: the task folder (`task`)
runner/      the files that run a task, once per content
blobs/       files that tasks share, by the SHA-256 of their content
queue/ gpus/ who waits and who holds what (`slots`)
runner.log   what runners, and the start-up files of their Python, had to say
============ ===============================================================================

Standard library only, Python 3.8+.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from . import proc, slots, task
from .inventory import base_environment
from .strict_json import encode

#: What stays of a task whose results the host has stored.
RECORDS = frozenset({"spec.json", "claimed", "alive", "started.json", "exit.json", "released"})


class Refused(Exception):
    """Something that was asked for cannot be done; `kind` is a word that the caller's side turns into its own error.

    task-not-found, not-found, invalid (a value that can never be right), missing (blobs that were not sent yet),
    unavailable (ask again), deadline.
    """

    def __init__(self, kind: str, message: str, suggestions: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.suggestions = suggestions


# -- places


def place(home: str, task_id: str) -> str:
    """Return a task's folder. Raises Refused (task-not-found) for what cannot be an id."""
    slug, _, rest = task_id.rpartition("-")
    digest = slug.rpartition("-")[2]
    if not (
        rest.isdigit() and rest.isascii() and len(digest) == 16 and set(digest) <= set("0123456789abcdef")
    ):
        raise Refused("task-not-found", f"{task_id!r} is not a task id")
    return os.path.join(home, "tasks", digest, rest)


def existing(home: str, task_id: str) -> str:
    """Return the folder of a task that exists. Raises Refused (task-not-found)."""
    folder = place(home, task_id)
    if not os.path.exists(os.path.join(folder, "spec.json")):
        raise Refused(
            "task-not-found",
            f"there is no task {task_id!r} under {home}",
            ("List the tasks with flow.list_tasks().",),
        )
    return folder


def inside(name: str) -> str:
    """Check a path that must stay within a folder. Raises Refused (invalid) when it does not."""
    if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise Refused(
            "invalid",
            f"{name!r} is not a path inside the task's folder",
            ("Give a relative path without '..'.",),
        )
    return os.path.normpath(name)


def private(folder: str) -> None:
    """Make a folder and its missing parents, readable by their owner alone; `makedirs` would leave the parents open."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise
    except FileNotFoundError:
        private(os.path.dirname(folder))
        private(folder)


# -- before a task starts


def install(home: str, sources: dict[str, bytes]) -> str:
    """Put the runner's files where the machine can run them, once per content; return the folder to run.

    A task that waits for days keeps the runner that it was submitted with, whatever is installed meanwhile.
    """
    target = os.path.join(home, "runner", version(sources))
    if os.path.isdir(target):
        return target
    private(os.path.dirname(target))
    draft = tempfile.mkdtemp(prefix=".new-", dir=os.path.dirname(target))
    try:
        os.mkdir(os.path.join(draft, "flow_runner"))
        for name, data in sources.items():
            _write(os.path.join(draft, "flow_runner", name), data, 0o644)
        start = b"import sys\n\nfrom flow_runner.main import main\n\nsys.exit(main(sys.argv))\n"
        _write(os.path.join(draft, "__main__.py"), start, 0o644)
        appear(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def version(sources: dict[str, bytes]) -> str:
    """Name a set of files by its content."""
    sha = hashlib.sha256()
    for name in sorted(sources):
        sha.update(b"%s %s\n" % (name.encode(), hashlib.sha256(sources[name]).hexdigest().encode()))
    return sha.hexdigest()[:16]


def create(
    home: str,
    task_id: str,
    *,
    job: dict[str, Any],
    spec: dict[str, Any],
    files: list[dict[str, Any]],
) -> bool:
    """Make the task folder appear, whole, under its name. Return False when it was there already.

    Everything is written beside it first: the name is the commit, and of two racers one wins. A file is a dict of
    `name`, optionally `mode`, and `data` (bytes), `path` (copied) or `blob` (what `keep_blob` has stored); with
    `link` the copy is a hard link, for content that is replaced where it comes from and never rewritten.
    Raises Refused (missing) that names the blobs that are not there, OSError where the disk refuses.
    """
    folder = place(home, task_id)
    if os.path.isdir(folder):
        return False
    made = draft(home, task_id, job=job, spec=spec, files=files)
    try:
        return appear(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def draft(
    home: str, task_id: str, *, job: dict[str, Any], spec: dict[str, Any], files: list[dict[str, Any]]
) -> str:
    """Write a task's folder beside its place; return its path. Raises as `create` does."""
    shelf = os.path.dirname(place(home, task_id))
    private(shelf)
    made = tempfile.mkdtemp(prefix=".new-", dir=shelf)
    try:
        for file in files:
            _put(home, made, file)
        task.reserve(made)
        for name, record in (("job.json", job), ("spec.json", spec)):
            _write(os.path.join(made, name), encode(record).encode(), 0o600)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return made


def appear(draft: str, target: str) -> bool:
    """Give a folder its name; False when there is one of this name already."""
    try:
        os.rename(draft, target)
    except OSError:
        if not os.path.isdir(target):
            raise
        return False
    return True


def _put(home: str, draft: str, file: dict[str, Any]) -> None:
    target = os.path.join(draft, inside(file["name"]))
    private(os.path.dirname(target))
    source = file.get("path") or (blob_path(home, file["blob"]) if "blob" in file else None)
    if source is None:
        _write(target, file["data"], file.get("mode", 0o600))
        return
    try:
        if file.get("link"):
            try:
                os.link(source, target)
                return
            except FileNotFoundError:
                raise
            except OSError:  # another file system
                pass
        shutil.copyfile(source, target)
    except FileNotFoundError:
        if "blob" in file:
            raise Refused("missing", file["blob"]) from None
        raise


def _write(path: str, data: bytes, mode: int) -> None:
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode), "wb") as file:
        file.write(data)


def launch(home: str, task_id: str) -> None:
    """Start a runner unless the task has one or had one. A needless runner finds the task claimed and leaves.

    Raises Refused (unavailable): no runner was started, ask again.
    """
    folder = place(home, task_id)
    if os.path.exists(os.path.join(folder, "unclaimed")):
        Launch(home, task_id, task.read_json(folder, "job.json") or {}).go()


class Launch:
    """A runner that starts up while its task's folder is written, which takes about as long.

    It looks for the folder when it is told to, or when whoever has started it is gone. Raises Refused (unavailable).
    """

    def __init__(self, home: str, task_id: str, job: dict[str, Any]) -> None:
        wait, self._go = os.pipe()
        self.place = ""  # in the queue
        inherited = [wait]
        try:
            if not os.path.isfile(sys.executable):  # the shell below would not tell
                raise FileNotFoundError(f"there is no Python at {sys.executable!r} any more")
            argv, env = _command(job, place(home, task_id))
            argv.append(str(wait))
            if job["gpu"] is not None:
                label = "{}.{}".format(task_id, job["gpu"]["count"])
                self.place, ticket = slots.take_ticket(job["gpu"]["queue"], label)
                inherited.append(ticket)
                argv += [self.place, str(ticket)]
            # The shell leaves the runner to the system at once: it is nobody's child here and cannot become a zombie.
            subprocess.run(
                ["/bin/sh", "-c", '"$@" 2>>"$0" &', os.path.join(home, "runner.log"), *argv],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            os.close(self._go)
            message = f"the runner could not be started: {error}"
            raise Refused("unavailable", message, ("Submit again with the same key.",)) from error
        finally:
            os.close(wait)
            for ticket in inherited[1:]:
                slots.hand_over(ticket)

    def go(self) -> bool:
        """Let it look for its folder; where there is none, it leaves. False when it is gone already."""
        try:
            os.write(self._go, b".")
        except BrokenPipeError:  # whoever waits for the task will notice
            return False
        finally:
            os.close(self._go)
        return True

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.go()


def _command(job: dict[str, Any], folder: str) -> tuple[list[str], dict[str, str]]:
    """Return (argument list, variables) of a runner."""
    if begins_as_its_runner(job):
        return [job["python"], job["call"], folder], {**job["env"], proc.MARKER: folder}
    env = {**base_environment(sys.executable), proc.MARKER: folder}
    return [sys.executable, "-I", "-S", job["call"], folder], env


#: Variables that an interpreter or the system's loader reads before it runs anything: no runner may fail by a user's.
_READ_AT_START = ("PYTHON", "LD_", "DYLD_", "GLIBC_", "MALLOC_")


def begins_as_its_runner(job: dict[str, Any]) -> bool:
    """Whether the process of a call can be a fork of its runner: both start the same Python with the same variables.

    What `-I -S` would keep from the runner (site-packages, start-up files) has served this very interpreter already.
    """
    if job["entry"] != "call" or job["python"] != sys.executable or job["container"] or job["mounts"]:
        return False
    ours = base_environment(sys.executable)
    given = [pair for pair in job["env"].items() if pair[0].startswith(_READ_AT_START)]
    return all(ours.get(name) == value for name, value in given)


# -- blobs


def blob_path(home: str, sha: str) -> str:
    """Return where a blob is kept. Raises Refused (invalid) for what is no SHA-256."""
    if len(sha) != 64 or not set(sha) <= set("0123456789abcdef"):
        raise Refused("invalid", f"{sha!r} is not a SHA-256")
    return os.path.join(home, "blobs", sha)


# -- looking


def attempts(home: str, digest: str) -> list[int]:
    """Return the attempt numbers that exist for a key's digest, in order."""
    try:
        return sorted(int(name) for name in os.listdir(os.path.join(home, "tasks", digest)) if name.isdigit())
    except FileNotFoundError:
        return []


def find(home: str, digest: str) -> str | None:
    """Return the id of the newest attempt at the key with this digest, None when there is none."""
    for number in reversed(attempts(home, digest)):
        spec = task.read_json(os.path.join(home, "tasks", digest, str(number)), "spec.json")
        if spec is not None:
            return str(spec["task_id"])
    return None


def find_many(home: str, digests: list[str]) -> dict[str, str]:
    """Return the ids of the newest attempts at the keys with these digests, those that exist."""
    found = {digest: find(home, digest) for digest in digests}
    return {digest: task_id for digest, task_id in found.items() if task_id is not None}


def newest(home: str, limit: int) -> list[tuple[float, str]]:
    """Return (time of submission, id) of up to `limit` tasks, the newest first."""
    try:
        keys = sorted(
            os.scandir(os.path.join(home, "tasks")), key=lambda entry: entry.stat().st_mtime, reverse=True
        )
    except FileNotFoundError:
        return []
    found: list[tuple[float, str]] = []
    for entry in keys[:limit]:  # a key's folder is as new as its newest attempt
        for number in attempts(home, entry.name):
            spec = task.read_json(os.path.join(entry.path, str(number)), "spec.json")
            if spec is not None:
                found.append((spec["submitted_at"], spec["task_id"]))
    return sorted(found, reverse=True)[:limit]


def poll(home: str, task_ids: list[str]) -> dict[str, dict[str, Any] | None]:
    """Return the facts of each task (`task.probe`), None for those that nobody knows.

    Raises Refused (unavailable) when the records cannot be read: this process has no descriptor left, the disk does
    not answer.
    """
    facts: dict[str, dict[str, Any] | None] = {}
    for task_id in task_ids:
        try:
            facts[task_id] = task.probe(place(home, task_id))
        except Refused:
            facts[task_id] = None
        except OSError as error:
            message = f"the records of task {task_id} cannot be read: {error}"
            raise Refused("unavailable", message) from error
    return facts


def locate(home: str, task_id: str, name: str) -> str:
    """Return the path of a file in a task's folder. Raises Refused (task-not-found, not-found, invalid)."""
    folder = existing(home, task_id)
    path = os.path.join(folder, inside(name))
    real = os.path.realpath(path)
    if not real.startswith(os.path.realpath(folder) + os.sep):
        raise Refused("invalid", f"{name!r} is a link that leaves the task's folder")
    if not os.path.isfile(real):
        raise Refused("not-found", f"the task's folder has no file {name!r}")
    return path


def survey(home: str, devices: list[str]) -> dict[str, int]:
    """Count what goes on: GPUs that are held, GPUs that are waited for, tasks whose runner lives."""
    waiting = slots.waiting(os.path.join(home, "queue"))
    return {
        "busy": len(slots.busy(os.path.join(home, "gpus"), devices)),
        "waiting": sum(int(label.rpartition(".")[2]) for label in waiting),
        "tasks": _living(home),
        "cpus": os.cpu_count() or 1,
    }


def _living(home: str) -> int:
    """Count the tasks that have a living runner, by its command line."""
    start, folders = os.fsencode(os.path.join(home, "tasks")) + b"/", set()
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            for door, folder in zip(words, words[1:]):
                if door.endswith(b"/call.py") and folder.startswith(start):
                    folders.add(folder)
    return len(folders)


# -- ending


def cancel(home: str, task_ids: list[str]) -> list[str]:
    """Ask tasks to stop (`task.ask_to_stop`); unknown ids are left alone. Return those that have been moved away."""
    return [task_id for task_id, folder in _known(home, task_ids) if not task.ask_to_stop(folder)]


def release(home: str, task_ids: list[str]) -> list[str]:
    """Remove all but the records of ended tasks; others are left alone. Return those that have been moved away."""
    elsewhere = []
    for task_id, folder in _known(home, task_ids):
        if os.path.exists(os.path.join(folder, "exit.json")):
            strip(folder)
        elif task.moved(folder) is not None:
            elsewhere.append(task_id)
    return elsewhere


def strip(folder: str) -> None:
    """Remove all but the records of a task; the mark comes first, so an interrupted release is repeated."""
    os.close(os.open(os.path.join(folder, "released"), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    remove_all_but(RECORDS, folder)


def remove_all_but(kept: frozenset[str], folder: str) -> None:
    """Remove what is in a folder, all but these names."""
    for entry in os.scandir(folder):
        if entry.name in kept:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            remove(entry.path)


def _known(home: str, task_ids: list[str]) -> list[tuple[str, str]]:
    folders = []
    for task_id in task_ids:
        try:
            folders.append((task_id, existing(home, task_id)))
        except Refused:
            continue
    return folders


def remove(path: str) -> None:
    """Remove a file, if it is there."""
    try:
        os.unlink(path)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
