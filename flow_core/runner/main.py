"""The runner: claims one task, waits its turn, runs the user's command, and records how it ended.

It runs on the machine that does the work, needs a Python (3.8+) and nothing else, and depends on nobody being alive:
it enforces the time limit, obeys a wish to stop, kills every process of the task, and writes the exit record last.
Started as ``python call.py <task folder> <go> [ticket name, ticket descriptor]``; `go` is the descriptor of a pipe, on
which it hears that the folder is there.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import time

from . import proc, task
from .light import signal, signal_name
from .ranks import Rank, start
from .spawn import Gate, StartFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, Callable

    from .gpu_use import Sampler

#: How often a waiting runner looks for a wish to stop that its signal did not bring (seconds).
_LOOK_S = 2.0

#: A submit that takes longer to write the task's folder is stuck or gone (seconds); whoever repeats it starts a runner.
_FOLDER_S = 60.0


class Stopped(Exception):
    """Somebody asked the task to stop, or sent the runner a signal."""


class Runner:
    """One task, from claim to exit record."""

    def __init__(self, folder: str, lock: int | None) -> None:
        self.folder = folder
        self.locks = [] if lock is None else [lock]
        self.job: dict[str, Any] = task.read_json(folder, "job.json") or {}
        self.ranks: list[Rank] = []
        self.signal: int | None = None
        self.waiting = False
        self.peak_kb = 0
        self.guard: Guard | None = None
        self.sampler: Sampler | None = None
        self.granted_at: float | None = None
        self.started_at: float | None = None
        self._bell, self._ring = os.pipe()
        for fd in (self._bell, self._ring):
            os.set_blocking(fd, False)

    @property
    def nodes(self) -> int:
        """The number of nodes of the whole task."""
        return len(self.ranks)

    def listen(self) -> None:
        """Turn signals into a flag, and into an exception while blocked in the queue."""
        signal.set_wakeup_fd(self._ring, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        for number in (signal.SIGCHLD, signal.SIGALRM):
            signal.signal(number, self._on_tick)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell that starts us in the background ignores it
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a submitting thread may have blocked some, or all

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._on_tick(number, _frame)

    def _on_tick(self, _number: int, _frame: FrameType | None) -> None:
        if self.waiting and (self.signal or self.asked_to_stop() or task.moved(self.folder)):
            self.waiting = False
            raise Stopped

    def asked_to_stop(self) -> bool:
        """Whether somebody has asked the task to stop."""
        return os.path.exists(os.path.join(self.folder, "cancel"))

    # -- before the start

    def wait_for_start(self, ticket: tuple[str, int] | None) -> list[str]:
        """Return the names of our GPUs once it is our turn and the attempt before this one is gone. Raises Stopped."""
        # A signal that comes just before a blocking call would be lost: this one comes again.
        signal.setitimer(signal.ITIMER_REAL, _LOOK_S, _LOOK_S)
        try:
            self.waiting = True
            if self.signal or self.asked_to_stop():
                raise Stopped
            if self.job.get("after"):
                self._wait_for_the_last_of(self.job["after"])
            return self._wait_for_gpus(ticket) if ticket else []
        finally:
            self.waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _wait_for_the_last_of(self, earlier: str) -> None:
        try:
            fd = os.open(os.path.join(earlier, "alive"), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # it never started, or it was swept long ago
            return
        try:
            while True:
                task.bury(earlier)  # its runner may be killed at any time, and maybe nobody else looks
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    time.sleep(0.05)
        finally:
            os.close(fd)

    def _wait_for_gpus(self, ticket: tuple[str, int]) -> list[str]:
        from . import slots

        gpu = self.job["gpu"]
        try:
            slots.wait_for_turn(gpu["queue"], ticket[0])
            pool = slots.Slots(gpu["slots"], gpu["devices"])
            granted = pool.acquire(gpu["count"])
            self.granted_at = (
                time.time()
            )  # still at the head of the queue: these times are in order of arrival
        finally:
            slots.leave(gpu["queue"], *ticket)
        self.locks += pool.held.values()
        return granted

    # -- the run

    def run(self, ticket: tuple[str, int] | None) -> dict[str, Any]:
        """Do the task and return its exit record; every process of it is gone by then."""
        try:
            granted = self.wait_for_start(ticket)
        except Stopped:
            return self.end(*self._why_stopped())
        if not task.stay(self.folder):  # moved at this very moment: it starts there, and ends there
            return self.end("moved", None, None, "")
        try:
            self.begin(granted)
        except StartFailed as error:
            self.stop(0)
            return self.end("start-failed", 127, None, str(error))
        outcome = self.watch()
        self.stop(
            self.job["kill_grace_s"] if outcome[0] in ("cancelled", "time-limit", "runner-died") else 1.0
        )
        return self.end(*outcome)

    def begin(self, granted: list[str]) -> None:
        """Start all ranks. Raises StartFailed with the reason in words."""
        for fd in self.locks:
            os.set_inheritable(fd, True)
        proc.adopt_orphans()
        gate = Gate()
        if os.path.exists(os.path.join(self.folder, "code.tar.gz")):
            self.mark_start(granted)  # to unpack takes time
        self.ranks = self.start(granted, gate)
        self.mark_start(granted)  # while they get ready
        gate.open()
        for rank in self.ranks:
            rank.confirm()
        if granted:
            self._watch_gpus(granted)

    def _watch_gpus(self, granted: list[str]) -> None:
        from . import gpu_use

        tool = gpu_use.find_tool(self.job["env"].get("PATH", os.defpath))
        if tool is not None:
            self.sampler = gpu_use.Sampler(self.folder, tool, granted)

    def mark_start(self, granted: list[str]) -> None:
        """Put the start on record. What follows is protected."""
        if self.guard is None:
            self.protect()
            task.write_json(self.folder, "started.json", self.started(granted))

    def protect(self) -> None:
        """See to it that nothing of what follows can get lost, and note what its end is compared with."""
        self.guard = Guard(self.folder, self.locks, self.bury)
        self.memory = proc.MemoryWatch()
        self.started_at = time.time()
        self.clock = time.monotonic()

    def bury(self) -> bool:
        """End the task in place of a runner that is gone; return whether nothing is left to do."""
        return task.bury(self.folder)

    def started(self, granted: list[str]) -> dict[str, Any]:
        """Build the record of the start."""
        return {"at": self.started_at, "granted_at": self.granted_at, "gpus": granted}

    def start(self, granted: list[str], gate: Gate) -> list[Rank]:
        """Start the command on every node, up to the gate. Raises StartFailed."""
        return start(self.folder, self.job, granted, gate)

    def watch(self) -> tuple[str, int | None, int | None, str]:
        """Wait for the end of the ranks, the time limit or a wish to stop: (reason, code, signal, message)."""
        limit = self.job.get("max_run_time_s")
        while True:
            self.memory.look()
            self.reap()
            failed = next((rank for rank in self.ranks if rank.failed), None)
            if failed is not None:
                return self._why_failed(failed)
            if all(rank.status is not None for rank in self.ranks):
                return "exit", 0, None, ""
            if self.signal is not None or self.asked_to_stop():
                return self._why_stopped()
            left = _LOOK_S if limit is None else self.clock + limit - time.monotonic()
            if left <= 0:
                return "time-limit", None, None, f"stopped at its limit of {limit:g} s"
            self._sleep(min(left, _LOOK_S))

    def _sleep(self, seconds: float) -> None:
        """Wait until a signal comes (a child has ended, somebody asks us to stop)."""
        select.select([self._bell], [], [], seconds)
        try:
            os.read(self._bell, 512)
        except BlockingIOError:
            pass

    def reap(self) -> bool:
        """Collect ended children. Return whether any child is left that is ours."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return bool(self.left())
            if self.sampler is not None and pid == self.sampler.pid:
                continue
            self.peak_kb = max(self.peak_kb, usage.ru_maxrss // (1024 if sys.platform == "darwin" else 1))
            for rank in self.ranks:
                if rank.pid == pid:
                    rank.status = status

    def left(self) -> list[int]:
        """Return the children that are ours to end: no helper, nor the runner of a task that this one submitted."""
        if not os.path.isdir("/proc/self"):  # a system that does not tell adopts nobody either
            return [rank.pid for rank in self.ranks if rank.status is None]
        helpers = [one.pid for one in (self.guard, self.sampler) if one is not None]
        return [
            pid
            for pid in proc.children()
            if pid not in helpers and not proc.of_another_task(pid, self.folder)
        ]

    def stop(self, grace_s: float) -> None:
        """End all that is left of the task: SIGTERM, `grace_s` seconds, SIGKILL. Returns when nobody is left."""
        for rank in self.ranks:
            rank.kill(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self.reap() and time.monotonic() < deadline:
            self._sleep(0.02)
        give_up = time.monotonic() + 30  # a process in an uninterruptible sleep dies when the kernel lets it
        while self.reap() and time.monotonic() < give_up:
            for rank in self.ranks:
                rank.kill(signal.SIGKILL)
            for pid in self.left():
                _kill(pid)
            time.sleep(0.01)
        for rank in self.ranks:
            rank.clean_up()

    # -- how it ended, in words

    def _why_stopped(self) -> tuple[str, int | None, int | None, str]:
        if self.asked_to_stop():
            when = "while it ran" if self.ranks else "before it started"
            return "cancelled", None, None, f"cancelled {when}"
        return "runner-died", None, self.signal, f"the runner was ended from outside by signal {self.signal}"

    def _why_failed(self, rank: Rank) -> tuple[str, int | None, int | None, str]:
        where = "" if self.nodes == 1 else f"node {rank.index} of {self.nodes}: "
        code, number = rank.ended
        if number is None:
            refused = rank.refusal(code)
            if refused:
                return "start-failed", code, None, where + refused
            if self.job["entry"] == "call" and self._is_unwritten(code):
                disk = os.statvfs(self.folder)
                free = f"{disk.f_bavail * disk.f_frsize:,} bytes of space are left"
                return "storage", code, None, f"{where}its result could not be written: {free}"
            return "exit", code, None, f"{where}exit code {code}"
        name = signal_name(number)
        if number == signal.SIGKILL and self.memory.has_struck():
            message = f"{where}the kernel killed it because memory ran out"
            return "out-of-memory", 128 + number, number, message
        return "killed", 128 + number, number, f"{where}killed by {name}"

    @staticmethod
    def _is_unwritten(code: int | None) -> bool:
        from .execute import EXIT_NOT_WRITTEN  # rarely needed, and not cheap to import

        return code == EXIT_NOT_WRITTEN

    def end(self, reason: str, code: int | None, number: int | None, message: str) -> dict[str, Any]:
        """Build the exit record."""
        more: dict[str, Any] = {
            "started_at": self.started_at,
            "peak_memory_bytes": self.peak_kb * 1024 or None,
        }
        if self.started_at is not None:
            more["run_s"] = time.monotonic() - self.clock
        if self.sampler is not None:
            more["gpu_use"] = task.read_json(self.folder, "gpu-use.json")
        return task.exit_record(reason, code=code, signal=number, message=message, **more)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Guard:
    """A process that outlives a SIGKILL of this runner.

    Then it ends the task by `bury`, at once and with nobody looking. It holds the task's locks until then: a process
    that has closed all its files holds none.
    """

    def __init__(self, folder: str, locks: list[int], bury: Callable[[], bool]) -> None:
        theirs, self._ours = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _guard(folder, theirs, locks, bury)
        os.close(theirs)

    def dismiss(self) -> None:
        """Tell it that all has ended well."""
        os.write(self._ours, b".")


def _guard(folder: str, pipe: int, locks: list[int], bury: Callable[[], bool]) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    first = 0
    for kept in sorted((pipe, *locks)):
        os.closerange(first, kept)
        first = kept + 1
    os.closerange(first, 256)
    if os.read(pipe, 1) == b"":
        while not bury():  # a dying process closes its pipes a moment before it is dead
            if not os.path.isdir(folder):  # somebody has removed it all
                proc.kill_members(folder)
                break
            time.sleep(0.01)
    os._exit(0)


def run(argv: list[str]) -> None:
    """Do what `main` does, then end this process at once: nothing here needs the interpreter's own end.

    Raises Reborn in a process that is to be the user's.
    """
    code = 1
    try:
        code = main(argv)
    except Exception:  # noqa: BLE001 - there is nobody above
        import traceback

        traceback.print_exc()
    os._exit(code)


def main(argv: list[str]) -> int:
    """Run the task in the folder `argv[1]`; return 0 when its end is on record, or when another runner has it."""
    if argv[1] in ("batch", "node", "beside", "relay", "visit"):
        from . import batch, beside, gang, relay, visit

        modes = {
            "batch": batch.main,
            "node": gang.main,
            "beside": beside.main,
            "relay": relay.main,
            "visit": visit.main,
        }
        return modes[argv[1]](argv[2:])
    folder = argv[1]
    ticket = (argv[3], int(argv[4])) if len(argv) > 4 else None
    lock = task.claim(folder) if _is_there(folder, int(argv[2])) else None
    if lock is None:
        return 0
    os.chdir(folder)
    runner = Runner(folder, lock)
    if "team" in runner.job:
        from .team import TeamRunner

        runner = TeamRunner(folder, lock)
    runner.listen()
    try:
        record = runner.run(ticket)
    except Exception as error:  # noqa: BLE001 - the task must end with a record, whatever is wrong here
        import traceback

        traceback.print_exc()
        runner.stop(0)
        reason = "storage" if isinstance(error, OSError) else "runner-died"
        record = runner.end(reason, None, None, f"the runner failed: {type(error).__name__}: {error}")
    task.finish(folder, record)
    if runner.guard is not None:
        runner.guard.dismiss()
    return 0


def _is_there(folder: str, go: int) -> bool:
    """Wait until whoever has started us says so or is gone; return whether there is a task to run."""
    if select.select([go], [], [], _FOLDER_S)[0]:
        os.read(go, 1)
    os.close(go)
    return os.path.exists(os.path.join(folder, "unclaimed"))
