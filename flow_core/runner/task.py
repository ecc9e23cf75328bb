"""The task folder as the runner's side knows it: claim, exit record, cancel, probe. Standard library only, Python 3.8+.

Names in the folder (the same on every provider that reaches a file system):

=============== ==================================================================================
spec.json       what was asked for, and when
job.json        what the runner is to do; readable by the owner alone, since it holds the environment
unclaimed       space kept for the claim; renamed to `claimed` by the one runner that may start the work
claimed         the runner: pid, start time, boot
alive           a lock that the runner and all processes of the task hold: free when the last is gone
started.json    when the user's command started, and on which GPUs
log.0 log.1 …   output of each node
result          the result of a call
gpu-use.json    how busy the GPUs have been so far, where that is known
cancel          somebody asked the task to stop
reserve         space kept for the exit record; a full disk cannot lose the end of a task
exit.json       the last word; written under another name, then renamed
incarnation.N   the scheduler's N-th restart of the task has been claimed
interrupted     a runner was ended by its scheduler, which alone knows why, and whether the task starts again
released        the host has stored the results; the folder holds no more than its records
here            space kept for `moved`, of a task that may go to another machine while it waits
stays           what `here` becomes before the command starts, or the task ends: it can never go any more
moved           what `here` becomes otherwise: where the task is now. It neither starts nor ends here
cleared         it has arrived there; the folder holds no more than its records
=============== ==================================================================================
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from . import proc
from .light import signal
from .strict_json import encode, from_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RESERVE_BYTES = 16384
_CLAIM_BYTES = 512

#: Of `here`.
MOVE_BYTES = 2048

#: How long after its submission a task may be without a runner, which takes a tenth of a second to start (seconds).
#: Later the runner has died before it could say so (a reboot, no memory), and nobody would ever tell.
UNCLAIMED_S = 120.0


def reserve(folder: str) -> None:
    """Set aside the blocks that the claim and the exit record will need. Raises OSError when there is no room."""
    for name, size in (("unclaimed", _CLAIM_BYTES), ("reserve", RESERVE_BYTES)):
        fd = os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b" " * size)  # real bytes: posix_fallocate does not exist everywhere
        finally:
            os.close(fd)


def read_json(folder: str, name: str) -> dict[str, Any] | None:
    """Return the record `name`, or None when it is not there (or not written to its end)."""
    try:
        with open(os.path.join(folder, name), "rb") as file:
            value = from_json(file.read())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(folder: str, name: str, value: dict[str, Any]) -> None:
    """Write a record so that it is there whole or not at all."""
    draft = os.path.join(folder, f".{name}.{os.getpid()}")
    with open(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(encode(value).encode())
    os.rename(draft, os.path.join(folder, name))


def owner_of(folder: str) -> dict[str, Any] | None:
    """Return who has claimed the task, None when nobody has.

    A claim that cannot be read is one that a loss of power has left without its content: its runner is gone.
    """
    try:
        with open(os.path.join(folder, "claimed"), "rb") as file:
            owner = from_json(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {**proc.nobody(), "boot": "another"}


def _overwrite(folder: str, reserved: str, name: str, value: dict[str, Any], *, durable: bool) -> None:
    """Put a record into space that was set aside, then give it its name. Needs no new block on the disk.

    Raises FileNotFoundError when another process has used the space: then the record exists already.
    """
    path = os.path.join(folder, reserved)
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        proc.lock_if_possible(fd)  # two witnesses of one death may write at once
        if not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        size = os.fstat(fd).st_size
        data = encode(value).encode()
        if len(data) > size:  # only free text can be this long
            data = encode({**value, "message": str(value.get("message", ""))[: size // 12]}).encode()
        os.write(fd, data)
        os.ftruncate(fd, len(data))
        if durable:
            os.fsync(fd)
        os.rename(path, os.path.join(folder, name))
    finally:
        proc.unlock(fd)


def lock_alive(folder: str, *, patience_s: float = 0.0) -> int | None:
    """Take the task's lock: a descriptor that children may inherit, or None when a process of the task holds it."""
    fd = os.open(os.path.join(folder, "alive"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(fd)
                return None
            time.sleep(0.01)


def claim(folder: str, owner: dict[str, Any] | None = None) -> int | None:
    """Become the one runner of this task: the descriptor of its lock, or None when another runner was first.

    Starting is exactly once: of all runners that a repeated submit launched, only one gets past this. With `owner`,
    that is written down in place of the caller.
    """
    fd = lock_alive(folder, patience_s=0.2)
    if fd is None:
        return None
    try:
        _overwrite(folder, "unclaimed", "claimed", owner or proc.identity(os.getpid()), durable=False)
    except FileNotFoundError:
        proc.unlock(fd)
        return None
    return fd


def claim_incarnation(folder: str, job: str, count: int) -> bool:
    """Become the one runner of the `count`-th restart of a task by its scheduler, whose name for it is `job`.

    A restart takes over what an earlier incarnation of the same job had claimed. A runner that another job has started
    (a submit was repeated), and a second one of the same incarnation, get False. Needs no lock of the file system,
    which may be one that many machines share.
    """
    if read_json(folder, "exit.json") is not None:
        return False
    owner = owner_of(folder)
    me = {**proc.identity(os.getpid()), "job": job, "incarnation": count}
    if owner is None:
        return claim_first(folder, me)
    if owner.get("job") != job or owner.get("incarnation", 0) >= count:
        return False
    if not _make(folder, f"incarnation.{count}", me):
        return False
    write_json(folder, "claimed", me)
    return True


def claim_first(folder: str, owner: dict[str, Any]) -> bool:
    """Write down the first claim of a task that a scheduler runs; False when somebody has claimed it."""
    return _make(folder, "claimed", owner)


def _make(folder: str, name: str, value: dict[str, Any]) -> bool:
    """Write a record that must not exist yet, whole; False when it does. A link is exclusive on every file system."""
    draft = f".{name}.{os.urandom(8).hex()}"
    write_json(folder, draft, value)
    path = os.path.join(folder, draft)
    try:
        os.link(path, os.path.join(folder, name))
    except OSError as error:
        if os.stat(path).st_nlink == 2:  # it was made, and the network file system has lost its answer
            return True
        if error.errno != errno.EEXIST:
            raise
        return False
    finally:
        os.unlink(path)
    return True


def stay(folder: str) -> bool:
    """Decide that the task stays in this folder, before it starts or ends. False: it has been moved away.

    Of this and `move_away` one wins: both rename the same file. Needs no space on the disk.
    """
    try:
        os.rename(os.path.join(folder, "here"), os.path.join(folder, "stays"))
    except FileNotFoundError:  # decided already, or one that never moves
        return not os.path.exists(os.path.join(folder, "moved"))
    return True


def move_away(folder: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """Decide that the task is somewhere else from now on; return where that is, None when it stays here.

    After return the decision survives a loss of power. Only the first one counts: it may not be the caller's.
    """
    try:
        _overwrite(folder, "here", "moved", record, durable=True)
    except FileNotFoundError:
        pass
    found = moved(folder)
    if found is not None:
        directory = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return found


def moved(folder: str) -> dict[str, Any] | None:
    """Return where the task has been moved to, None while it is here."""
    return read_json(folder, "moved")


def finish(folder: str, record: dict[str, Any]) -> bool:
    """Write the exit record if there is none. Return whether ours became the last word."""
    if not stay(folder):
        return False
    try:
        _overwrite(folder, "reserve", "exit.json", record, durable=True)
    except FileNotFoundError:
        return False
    return True


def exit_record(
    reason: str, *, code: int | None = None, signal: int | None = None, message: str = "", **more: Any
) -> dict[str, Any]:
    """Build an exit record; `reason` is one word of the vocabulary in flow_core.models.Snapshot."""
    return {
        "v": 1,
        "reason": reason,
        "code": code,
        "signal": signal,
        "message": message,
        "ended_at": time.time(),
        **more,
    }


def ask_to_stop(folder: str) -> bool:
    """Ask a task to stop. After return the wish is on the disk and the runner, if there is one, has been told.

    A task that no runner has claimed is ended here and now; one that has ended is left alone. Return False when the
    task has been moved away: it must be asked where it is now.
    """
    if read_json(folder, "exit.json") is not None:
        return True
    if moved(folder) is not None:
        return False
    with open(os.open(os.path.join(folder, "cancel"), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w"):
        pass
    if not stay(folder):  # it was moved meanwhile, and nobody there has seen the wish
        return False
    for _ in range(100):  # a runner that is between lock and claim needs a moment
        owner = owner_of(folder)
        if owner is not None:
            if proc.state(owner) == "alive":
                tell(owner, signal.SIGTERM)
            else:
                bury(folder)
            return True
        if _close(folder, exit_record("cancelled", message="cancelled before it started")):
            return True
        time.sleep(0.02)
    return True


def _close(folder: str, record: dict[str, Any]) -> bool:
    """End a task that no runner has claimed. Return False when one has, or is about to."""
    lock = claim(folder, proc.nobody())  # in our own name, the next who cancels would signal this process
    if lock is None:
        return False
    try:
        return finish(folder, record)
    finally:
        proc.unlock(lock)


def tell(owner: dict[str, Any], number: int) -> None:
    """Signal exactly the described process: with a pidfd where the system has it, so that no reused pid is hit."""
    pid = int(owner["pid"])
    try:
        if hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal"):
            fd = os.pidfd_open(pid)
            try:
                if proc.state(owner) == "alive":
                    signal.pidfd_send_signal(fd, number)
            finally:
                os.close(fd)
        elif proc.state(owner) == "alive":
            os.kill(pid, number)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise


def _fate(folder: str, owner: dict[str, Any]) -> str:
    """Tell "alive", "gone" or "reboot": by the process, or by the task's lock where the process cannot be seen."""
    fate = proc.state(owner)
    if fate != "elsewhere":
        return fate
    lock = lock_alive(folder)
    if lock is None:
        return "alive"
    proc.unlock(lock)
    return "gone" if owner.get("boot") == proc.boot_id() else "reboot"


def bury(folder: str) -> bool:
    """End a task whose runner is gone: kill what it left behind, then write the record that it could not write.

    Return False when there is nothing to bury yet: the runner lives, or none has claimed the task.
    """
    if read_json(folder, "exit.json") is not None:
        return True
    owner = owner_of(folder)
    fate = "alive" if owner is None else _fate(folder, owner)
    if owner is None or fate == "alive":
        return False
    if fate == "gone" and os.path.exists(os.path.join(folder, "started.json")):
        proc.kill_members(folder)
        _remove_containers(folder)
    asked = os.path.exists(os.path.join(folder, "cancel"))
    reason, message = {
        "reboot": ("reboot", "the machine was restarted while the task ran"),
        "gone": (
            "runner-died",
            "the process that looked after the task (pid {}) is gone without a record; it was probably killed".format(
                owner["pid"]
            ),
        ),
    }[fate]
    finish(folder, exit_record("cancelled" if asked else reason, message=message))
    return True


def _remove_containers(folder: str) -> None:
    job = read_json(folder, "job.json")
    if job is not None and job.get("container"):
        from .ranks import Container

        for index in range(job["num_instances"]):
            Container(job, index).remove()


def _close_unclaimed(folder: str) -> None:
    asked = os.path.exists(os.path.join(folder, "cancel"))
    message = f"no runner took the task within {UNCLAIMED_S:g} s of its submission"
    try:
        _close(folder, exit_record("cancelled" if asked else "runner-died", message=message))
    except FileNotFoundError:  # swept at this moment
        return


def probe(folder: str) -> dict[str, Any] | None:
    """Gather all that a snapshot is made of; None when there is no such task. A dead runner's task is buried first."""
    spec = read_json(folder, "spec.json")
    if spec is None:
        return None
    owner = owner_of(folder)
    if owner is not None and read_json(folder, "exit.json") is None and proc.state(owner) != "alive":
        bury(folder)
    if owner is None and time.time() - spec.get("moved_at", spec.get("submitted_at", 0.0)) > UNCLAIMED_S:
        _close_unclaimed(folder)
    return gather(folder)


def gather(folder: str) -> dict[str, Any] | None:
    """Read all that a snapshot is made of; None when there is no such task. Changes nothing."""
    spec = read_json(folder, "spec.json")
    if spec is None:
        return None
    ended = read_json(folder, "exit.json")  # before the rest, which is then all there
    if ended is None and not os.path.exists(os.path.join(folder, "spec.json")):
        return None  # swept at this moment
    started = read_json(folder, "started.json")
    return {
        "spec": spec,
        "claimed": os.path.exists(os.path.join(folder, "claimed")),
        "cancel": os.path.exists(os.path.join(folder, "cancel")),
        "moved": moved(folder) if started is None and ended is None else None,
        "started": started,
        "exit": ended,
        "released": os.path.exists(os.path.join(folder, "released")),
    }
