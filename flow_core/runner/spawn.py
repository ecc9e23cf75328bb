"""Starting one process of the user's: fork, a gate, and then exec, or going on with the interpreter that is running.

Standard library only, Python 3.8+.
"""

from __future__ import annotations

import gc
import os
import sys

from . import proc
from .light import signal


class StartFailed(Exception):
    """The command could not be started; the text says why."""


class Reborn(BaseException):
    """Raised in a child that is to be the user's process: it unwinds to where this program began."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def begin(self) -> None:
        """Wait until the user's code may run."""
        self._gate.enter()
        _close_what_exec_would_close()


class Gate:
    """Where processes that have been started wait until all is there that they rely on.

    They end if whoever has started them is gone before that.
    """

    def __init__(self) -> None:
        self._inside, self._outside = os.pipe()
        self.waiting = 0

    def open(self) -> None:
        """Let all through."""
        os.write(self._outside, b"." * self.waiting)
        os.close(self._outside)
        os.close(self._inside)

    def enter(self) -> None:
        """Wait, as a process that was forked since the gate was made."""
        os.close(self._outside)
        if not os.read(self._inside, 1):
            os._exit(127)


class Beginning:
    """Between the fork and the user's program: a pipe on which the child says why it cannot go on."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tell, self._told = os.pipe()

    def fail(self, error: BaseException) -> None:
        """Say so, as the child."""
        reason = str(error)
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.strerror}: {error.filename}"
        os.write(self._told, reason.encode("utf-8", "replace")[:4000])

    def close(self) -> None:
        """Leave it to the other side to speak; as the child, say that all is well."""
        os.close(self._told)

    def confirm(self) -> None:
        """Wait for the child's word. Raises StartFailed."""
        trouble = b""
        while True:
            piece = os.read(self._tell, 4096)
            if not piece:
                break
            trouble += piece
        os.close(self._tell)
        if trouble:
            raise StartFailed(self._what + trouble.decode(errors="replace"))


def spawn(
    log_path: str,
    argv: list[str],
    gate: Gate,
    begun: Beginning,
    *,
    env: dict[str, str],
    cwd: str,
    mounts: list[list[str]],
) -> int:
    """Start one process in a session of its own, output to its log, up to the gate; return its pid.

    Fork and exec by hand: the child needs its mounts and its tie to the runner before the user's program begins. Where
    that program is the one that runs here, the child goes on with it instead (Reborn): to start Python once more takes
    longer than all else that a call needs.
    """
    log = os.open(log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
    gate.waiting += 1
    here = _runs_here(argv)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            proc.die_with_parent()
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            if mounts:
                proc.bind_mount(mounts)
            os.chdir(cwd)
            _reset_signals()
            if here:
                _go_on(argv, env, gate, begun)
            gate.enter()
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.execvpe(argv[0], argv, env)
        except Reborn:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told and this child ends
            begun.fail(error)
        os._exit(127)
    os.close(log)
    begun.close()
    return pid


def _go_on(argv: list[str], env: dict[str, str], gate: Gate, begun: Beginning) -> None:
    _look_new(argv, env)
    begun.close()
    raise Reborn(gate)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)


def _runs_here(argv: list[str]) -> bool:
    """Whether this process began as the wanted one would (`machine.begins_as_its_runner` saw to the rest)."""
    if argv != [sys.executable, os.path.abspath(sys.argv[0])] or sys.flags.no_site:
        return False
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return False
    return len(threads) == 1  # one that a start-up file has started would not come along


def _look_new(argv: list[str], env: dict[str, str]) -> None:
    """Make this process look like one that was just started with these arguments and variables."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in set(os.environ).difference(env):
        del os.environ[name]
    os.environ.update(env)
    sys.argv[:] = argv[1:]
    if hasattr(sys, "orig_argv"):
        sys.orig_argv[:] = argv
    gc.freeze()  # what is here by now is nobody's garbage: the collections at the end need not look at it


def _close_what_exec_would_close() -> None:
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and not os.get_inheritable(int(name)):
                os.close(int(name))
        except OSError:  # the one of this listing
            pass
