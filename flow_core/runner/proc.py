"""Processes as the runner sees them: who is alive, who belongs to a task, how they die. Stdlib only, Python 3.8+."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from .light import libc, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Every process of a task carries this variable, so that what is left of a task can be found without its runner.
MARKER = "FLOW_TASK_DIR"

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000

#: What the system says of a process that is gone or not ours to see. Anything else, such as a caller without a free
#: descriptor, tells nothing about a process and must not bury its task.
_NOT_THERE = (FileNotFoundError, NotADirectoryError, ProcessLookupError, PermissionError)

#: What a file system without locks between machines says.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def boot_id() -> str:
    """Name this boot of the machine; "" where the system does not tell (then a reboot looks like a dead process)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except _NOT_THERE:
        return ""


def start_time(pid: int) -> str | None:
    """Return the start time of a *living* process in the system's own words, None for a zombie or nobody.

    A pid alone proves nothing: it is used again, and ``kill -0`` answers for a zombie.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except _NOT_THERE:
        return None if os.path.isdir("/proc/self") else _start_time_by_ps(pid)
    fields = text[text.rindex(b")") + 2 :].split()  # the command name may hold spaces and parentheses
    return None if fields[0] in (b"Z", b"X", b"x") else fields[19].decode()


def _start_time_by_ps(pid: int) -> str | None:
    """The same for systems without /proc (macOS)."""
    import subprocess

    out = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)],
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C",
            "TZ": "UTC0",
        },  # the same words for everybody
        stdout=subprocess.PIPE,
        check=False,
    ).stdout.decode()
    return None if not out.strip() or out.split()[0].startswith("Z") else " ".join(out.split()[1:])


def place() -> str:
    """Name the set of processes that we can see: this machine's, or those of our container."""
    try:
        return f"{os.uname().nodename} {os.readlink('/proc/self/ns/pid')}"
    except _NOT_THERE:
        return os.uname().nodename


def identity(pid: int) -> dict[str, Any]:
    """Describe a process so that another one can later tell whether it is still the same."""
    return {"pid": pid, "start": start_time(pid), "boot": boot_id(), "place": place()}


def nobody() -> dict[str, Any]:
    """Describe an owner that is gone already: a task that it claims can only be given its record."""
    return {"pid": 0, "start": "never", "boot": boot_id(), "place": place()}


def state(claim: dict[str, Any]) -> str:
    """Tell what became of the process that `identity` described: "alive", "gone", "reboot", or "elsewhere".

    The last one says that it cannot be told from here: the home is shared with another container or machine.
    """
    here = place()
    if claim.get("place", here) != here:
        return "elsewhere"
    if claim.get("boot") != boot_id():
        return "reboot"
    return "alive" if start_time(int(claim["pid"])) == claim.get("start") else "gone"


def members(folder: str) -> list[int]:
    """Return the pids of all living processes that belong to the task of `folder`, except the caller."""
    needle = (f"{MARKER}={folder}").encode("utf-8", "surrogateescape")
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if needle in file.read().split(b"\0") and start_time(int(name)) is not None:
                    found.append(int(name))
        except OSError:  # another user's process, or one that has just ended
            continue
    return found


def kill_members(folder: str, *, settle_s: float = 0.3, limit_s: float = 10.0) -> None:
    """SIGKILL whatever is left of a task. After return nobody has been seen for `settle_s`, or `limit_s` is over.

    A process that is between fork and exec appears late, hence the second look.
    """
    deadline, quiet_since = time.monotonic() + limit_s, None
    while time.monotonic() < deadline:
        pids = members(folder)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        now = time.monotonic()
        quiet_since = None if pids else (quiet_since or now)
        if quiet_since is not None and now - quiet_since >= settle_s:
            return
        time.sleep(0.02)


def of_another_task(pid: int, folder: str) -> bool:
    """Whether a process belongs to a task that a process of the task of `folder` has submitted."""
    start = f"{MARKER}=".encode()
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            marks = [item[len(start) :] for item in file.read().split(b"\0") if item.startswith(start)]
    except OSError:
        return False
    own = folder.encode("utf-8", "surrogateescape")
    return any(mark != own and os.path.exists(os.path.join(mark, b"job.json")) for mark in marks)


def lock_if_possible(fd: int) -> None:
    """Wait for a file's lock. Some shared file systems have none: there, names that are made once must do."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def unlock(fd: int) -> None:
    """Give a file's lock back and close it. Closing alone leaves it to the copies that a fork has made meanwhile."""
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    finally:
        os.close(fd)


def children() -> list[int]:
    """Return the pids whose parent is this process (zombies included)."""
    pid = os.getpid()
    try:
        return [child for thread in os.listdir(f"/proc/{pid}/task") for child in _children_of(pid, thread)]
    except OSError:  # a kernel that keeps no such list
        pass
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    text = file.read()
            except OSError:
                continue
            if int(text[text.rindex(b")") + 2 :].split()[1]) == pid:
                found.append(int(name))
    return found


def _children_of(pid: int, thread: str) -> list[int]:
    with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
        return [int(child) for child in file.read().split()]


def adopt_orphans() -> None:
    """Make this process the parent of its orphaned descendants (Linux), so that a daemonized child cannot slip away."""
    if os.path.isdir("/proc/self"):
        libc("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when its parent dies (Linux)."""
    if os.path.isdir("/proc/self"):
        libc("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def oom_kills() -> int:
    """Count the kernel's out-of-memory kills since boot (all cgroups); 0 where it does not tell."""
    try:
        with open("/proc/vmstat") as file:
            return int(next((line.split()[1] for line in file if line.startswith("oom_kill ")), "0"))
    except OSError:
        return 0


class MemoryWatch:
    """Tells a process that was killed for want of memory from one that was killed otherwise.

    The kernel's count is the machine's, and others share it: so only kills of the last seconds are thought to be ours,
    and each of them once. `look` has to be called now and then, and before the dead are collected.
    """

    SPAN_S = 5.0

    def __init__(self) -> None:
        self._before = self._latest = oom_kills()
        self._at = time.monotonic()

    def look(self) -> None:
        """Forget what is long ago."""
        now = time.monotonic()
        if now - self._at >= self.SPAN_S:
            self._before, self._latest, self._at = self._latest, oom_kills(), now

    def has_struck(self) -> bool:
        """Whether a process that has just died by SIGKILL may have died for want of memory."""
        if oom_kills() <= self._before:
            return False
        self._before += 1
        self._latest = max(self._latest, self._before)
        return True


def bind_mount(mounts: list[list[str]]) -> None:
    """Show each (source, target) folder under its target, for this process and its children alone (Linux, root).

    Raises OSError that names the target when the system refuses.
    """
    import ctypes

    system = ctypes.CDLL(None, use_errno=True)

    def check(code: int, what: str) -> None:
        if code != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), what)

    check(system.unshare(_CLONE_NEWNS), "unshare")
    check(system.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "/")
    for source, target in mounts:
        shelf = os.path.dirname(target)
        os.makedirs(shelf, exist_ok=True)
        if not os.path.exists(target) and not os.listdir(shelf):
            # Mount points are made in memory where that hides nothing, so that the machine is not littered with them.
            check(system.mount(b"none", os.fsencode(shelf), b"tmpfs", 0, None), shelf)
        os.makedirs(target, exist_ok=True)
        check(system.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND | _MS_REC, None), target)
