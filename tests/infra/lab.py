"""A lab: namespaces of its own on this machine, in which whole clusters and hosts live and die together.

Processes, mounts and the network of a lab are its own; its network has no way out. It ends when the process that
started it does, however that happens, and takes everything in it along: see `lab_init`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.infra import lab_init
from tests.infra.packages import Unavailable

#: Accounts that exist only in a lab: nobody's start-up files slow a login down, and nothing is written to /etc.
USER = "ada"
_USER_ID = 64200

#: Where the programs of a lab look for others: not where the tests do.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: The network that machines are plugged into. The addresses are reserved for documentation (RFC 5737).
NET, BRIDGE = "198.51.100", "br0"

_PREFIX = "flow-lab-"
_PARENT = Path("/var/tmp")  # the paths must be short (sockets), the file system may hold device files
_CLONE_NEWNET = 0x40000000


class Lab:
    """One lab; `folder` is visible inside and outside under the same path."""

    def __init__(self) -> None:
        self.folder, lock = _new_folder()
        self.home = self.folder / "home"
        names = (
            os.uname().nodename,
            "controller",
            *(f"n{number}" for number in range(1, 10)),
        )  # hosts that share the lab's network
        write_accounts(self.folder / "etc", self.home, dict.fromkeys(names, "127.0.0.1"))
        try:
            self._process = self._start(lock)
        finally:
            os.close(lock)
        self.init = child_of(self._process.pid)
        # With nothing but a loopback, the resolver finds no address for any name (AI_ADDRCONFIG).
        for line in (f"link add {BRIDGE} type bridge", f"addr add {NET}.1/24 dev {BRIDGE}"):
            self.inside("ip", *line.split())
        for device in ("lo", BRIDGE):
            self.inside("ip", "link", "set", device, "up")

    def _start(self, lock: int) -> subprocess.Popen[bytes]:
        isolate = ["unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        setup = self.folder / "setup.sh"
        setup.write_text(f'set -e\n{own_files(self.folder)}exec "$@"\n')
        init = [sys.executable, "-I", "-S", str(Path(lab_init.__file__).resolve()), str(self.folder)]
        process = subprocess.Popen(
            [*isolate, "sh", str(setup), *init],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C is for the tests, which then close the lab
        )
        assert process.stdout is not None and process.stderr is not None
        if process.stdout.readline() != b"ready\n":
            reason = process.stderr.read().decode().strip()
            shutil.rmtree(self.folder)
            raise Unavailable(f"this machine does not let us make namespaces: {reason}")
        return process

    def close(self) -> None:
        """End everything that lives in the lab. After return no process, mount or file of it is left."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    # -- being inside

    def command(self, *argv: str, net: int | None = None, target: int | None = None) -> list[str]:
        """Return the command that runs `argv` inside: with the lab's processes, mounts and network.

        `net`: with the network of this process instead. `target`: with the processes and mounts of this one.
        """
        target = target or self.init
        spaces = [
            f"--target={target}",
            "--mount",
            "--pid",
            "--ipc",
            "--uts",
            f"--net=/proc/{net or target}/ns/net",
        ]
        return ["nsenter", *spaces, "--", *argv]

    def inside(self, *argv: str, net: int | None = None, target: int | None = None) -> str:
        """Run a command inside and return what it printed. Raises AssertionError with its complaint."""
        return output(self.command(*argv, net=net, target=target))

    def start(
        self, *argv: str, log: Path, env: Mapping[str, str] | None = None, net: int | None = None
    ) -> int:
        """Start a program inside, which outlives this call, and return its pid as seen from here.

        What it prints goes to `log`. It is a child of the lab's first process.
        """
        with log.open("ab") as file:
            launcher = subprocess.Popen(
                self.command(*argv, net=net),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd="/",
                env={"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", **(env or {})},
                start_new_session=True,
            )
        try:
            return child_of(launcher.pid, log=log)
        finally:
            launcher.kill()  # nsenter would wait for its child, and stop whenever that is stopped
            launcher.wait()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread, and what it starts, live in the lab's network."""
        with open("/proc/thread-self/ns/net") as before, open(f"/proc/{self.init}/ns/net") as ours:
            _setns(ours.fileno())
            try:
                yield
            finally:
                _setns(before.fileno())


def own_files(folder: Path) -> str:
    """Shell lines that put a folder's own accounts, host names, logs and boot id in the place of the machine's."""
    etc = folder / "etc"
    (etc / "log").mkdir(exist_ok=True)
    lines = [f"mount --bind {etc}/{name} /etc/{name}\n" for name in ("passwd", "shadow", "group", "hosts")]
    lines.append(
        f"mount --bind {etc}/log /var/log\n"
    )  # logins are not written into the machine's own records
    return "".join(lines) + new_boot_id(etc / "boot_id")


def new_boot_id(file: Path) -> str:
    """Write a new boot id into a file; return the shell line that makes it the machine's."""
    file.write_text(f"{uuid.uuid4()}\n")
    return f"mount --bind {file} /proc/sys/kernel/random/boot_id\n"


def write_accounts(
    etc: Path, home: Path, hosts: Mapping[str, str] | None = None, *, homes: Path | None = None
) -> None:
    """Write passwd, shadow, group and hosts: the machine's accounts, root with an empty home, and `USER`.

    The homes are under `home`, and made under `homes` where that is another path to the same place.
    """
    etc.mkdir(parents=True)
    accounts = [
        f"{one.pw_name}:x:{one.pw_uid}:{one.pw_gid}:{one.pw_gecos}:{one.pw_dir}:{one.pw_shell}"
        for one in pwd.getpwall()
        if one.pw_uid != 0 and one.pw_name != USER
    ]
    accounts.insert(0, f"root:x:0:0:root:{home}/root:/bin/bash")
    accounts.append(f"{USER}:x:{_USER_ID}:{_USER_ID}::{home}/{USER}:/bin/bash")
    (etc / "passwd").write_text("\n".join(accounts) + "\n")
    # An asterisk is no password; an exclamation mark would lock the account, and sshd would refuse every login.
    (etc / "shadow").write_text("".join(f"{line.partition(':')[0]}:*:::::::\n" for line in accounts))
    (etc / "shadow").chmod(0o600)
    (etc / "group").write_text(Path("/etc/group").read_text() + f"{USER}:x:{_USER_ID}:\n")
    names = {"localhost": "127.0.0.1", **(hosts or {})}
    (etc / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    for name, owner in (("root", 0), (USER, _USER_ID)):
        made = (homes or home) / name
        made.mkdir(parents=True)
        os.chown(made, owner, owner)


# --- processes as seen from outside ----------------------------------------------------------------------------------


def child_of(parent: int, *, log: Path | None = None, within_s: float = 10.0) -> int:
    """Return the pid of the first child that a process has, as soon as it has one."""
    found: list[int] = []

    def look() -> bool:
        found.extend(_children(parent))
        return bool(found) or not Path(f"/proc/{parent}").exists() or _stat(parent)[0] == "Z"

    until(look, f"a child of process {parent}", within_s=within_s)
    assert found, f"process {parent} ended: {log.read_text() if log else 'no log'}"
    return found[0]


def _children(parent: int) -> list[int]:
    return [pid for pid in pids() if _stat(pid)[1] == str(parent)]


def pids() -> list[int]:
    """All pids that can be seen from here."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> list[str]:
    """State and parent of a process; "X" where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except (OSError, IndexError):
        return ["X", ""]


def parent(pid: int) -> int:
    """Return the pid of a process's parent; 0 where it is gone or out of sight."""
    return int(_stat(pid)[1] or 0)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return _stat(pid)[0] not in "XZ"


def namespace_members(init: int) -> list[int]:
    """All living processes of the process namespace whose first one is `init`."""
    with contextlib.suppress(OSError):
        space = os.readlink(f"/proc/{init}/ns/pid")
        return [pid for pid in pids() if _link(pid) == space and alive(pid)]
    return []


def _link(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""


def signal_all(init: int, number: signal.Signals) -> None:
    """Send a signal to every process of a namespace, also to those that appear meanwhile."""
    seen: set[int] = set()
    while new := set(namespace_members(init)) - seen:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        seen |= new


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal and wait until the process is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    until(lambda: not alive(pid), f"the end of process {pid}")


def until(seen: Callable[[], bool], what: str, *, within_s: float = 60.0) -> None:
    """Look again and again until something is so. Raises AssertionError after `within_s`."""
    deadline = time.monotonic() + within_s
    while not seen():
        assert time.monotonic() < deadline, f"waited {within_s:g} s for: {what}"
        time.sleep(0.01)


def output(argv: Sequence[str], *, env: Mapping[str, str] | None = None, within_s: float = 60.0) -> str:
    """Run a command and return what it printed. Raises AssertionError with its complaint."""
    run = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", **(env or {})},
        timeout=within_s,
    )
    assert run.returncode == 0, f"{' '.join(argv)}: exit code {run.returncode}\n{run.stdout}{run.stderr}"
    return run.stdout


# --- left-overs ------------------------------------------------------------------------------------------------------


def _new_folder() -> tuple[Path, int]:
    """Make a lab's folder and lock it for the lab's first process: who finds one unlocked finds a left-over."""
    parent = os.open(_PARENT, os.O_RDONLY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)  # nobody sweeps between the making and the locking
        _sweep()
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_PARENT))
        folder.chmod(0o755)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return folder, lock
    finally:
        os.close(parent)


def _sweep() -> None:
    """Remove the folders of labs whose first process is gone: only a SIGKILL of that one leaves any."""
    for folder in _PARENT.glob(f"{_PREFIX}*"):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its own first process has just removed it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
