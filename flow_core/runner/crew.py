"""The worker processes of a session, as its supervisor sees them: forked when wanted, watched, interrupted, killed.

The supervisor is a Python that has run nothing of the user's, so a worker is a fork of it: it starts in about a
millisecond, shares its memory, and knows no other call's modules. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import struct
import sys

from . import proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_SLOT = struct.Struct("<QQQQ")  # stream, call, how many calls were begun, whether one is running
_SLOT_BYTES = 64
MAX_WORKERS = 1024
"""The most workers of one session."""
_TAIL_BYTES = 4000


class Page:
    """What each worker is doing at the moment, in memory that outlives it: written by the worker, at no cost."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, MAX_WORKERS * _SLOT_BYTES)

    def read(self, index: int) -> tuple[int, int, int, bool]:
        """Return (stream, call, calls begun so far, whether that call is running)."""
        stream, number, begun, busy = _SLOT.unpack_from(self.memory, index * _SLOT_BYTES)
        return stream, number, begun, bool(busy)

    def clear(self, index: int) -> None:
        """Forget what the worker before this one did."""
        _SLOT.pack_into(self.memory, index * _SLOT_BYTES, 0, 0, 0, 0)


class Slot:
    """A worker's own place in the page."""

    def __init__(self, page: Page, index: int) -> None:
        self._memory = page.memory
        self._at = index * _SLOT_BYTES
        self.begun = 0

    def begin(self, stream: int, number: int) -> None:
        """Write down, before it starts, that a call of the user's runs."""
        self.begun += 1
        _SLOT.pack_into(self._memory, self._at, stream, number, self.begun, 1)

    def end(self) -> None:
        """Write down that its outcome has been sent."""
        self._memory[self._at + 24] = 0


class Process:
    """One worker process."""

    def __init__(self, index: int, pid: int, control: socket.socket, *, dedicated: bool) -> None:
        self.index = index
        self.pid = pid
        self.control = control
        self.dedicated = dedicated
        self.streams: dict[int, str] = {}  # stream: client
        self.killed_for: dict[tuple[int, int], str] = {}

    def hand_over(self, stream: int, client: str, connection: socket.socket, *, memory: bool) -> None:
        """Give the worker a client's connection, over which memory can be shared or not. Raises OSError."""
        message = json.dumps({"stream": stream, "client": client, "memory": memory}).encode()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", connection.fileno()))
        self.streams[stream] = client  # before it is sent: should the worker die now, its client is told
        self.control.sendmsg([message], [rights])

    def interrupt(self, stream: int, number: int, why: str, begun: int) -> None:
        """Ask the worker to give up a call, also one that it has not begun; with `begun` only this attempt of it."""
        try:
            message = {"interrupt": [stream, number], "why": why, "begun": begun}
            self.control.send(json.dumps(message).encode())
            os.kill(self.pid, signal.SIGINT)
        except OSError:  # it is dead, or so stuck that its mailbox is full: the kill is next
            pass

    def signal(self, number: int) -> None:
        """Signal the worker and what it has started."""
        for send in (os.killpg, os.kill):
            try:
                send(self.pid, number)
            except (ProcessLookupError, PermissionError):
                pass


class Crew:
    """All workers of a session. `let_go(control)` is called before a dead worker's control is closed."""

    def __init__(
        self, folder: str, config: dict[str, Any], page: Page, let_go: Callable[[socket.socket], object]
    ) -> None:
        self.folder = folder
        self.let_go = let_go
        self.config = config
        self.page = page
        self.by_index: dict[int, Process] = {}
        self.by_pid: dict[int, Process] = {}
        self.memory = proc.MemoryWatch()
        os.makedirs(os.path.join(folder, "logs"), mode=0o700, exist_ok=True)

    def want(self, index: int, *, dedicated: bool) -> Process:
        """Return the worker of this number, a new one when there is none."""
        found = self.by_index.get(index)
        return found if found is not None else self._fork(index, dedicated)

    def _fork(self, index: int, dedicated: bool) -> Process:
        self.page.clear(index)
        ours, theirs = socket.socketpair(socket.AF_UNIX, getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM))
        pid = os.fork()
        if pid == 0:
            self._be_worker(index, theirs, dedicated)  # does not return
        theirs.close()
        ours.setblocking(False)
        process = Process(index, pid, ours, dedicated=dedicated)
        self.by_index[index] = self.by_pid[pid] = process
        return process

    def _be_worker(self, index: int, control: socket.socket, dedicated: bool) -> None:
        """Live as a worker. Does not return."""
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.setpgid(0, 0)
            proc.die_with_parent()
            log = os.open(self.log(index), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            for target in (1, 2):
                os.dup2(log, target)
            kept = control.fileno()
            os.closerange(3, kept)
            os.closerange(kept + 1, 4096)
            os.environ["FLOW_WORKER"] = str(index)
            gpus = self._gpus(index, dedicated)
            if gpus is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus
            from . import worker

            worker.main(self.folder, control, Slot(self.page, index), ordered=dedicated)
        except BaseException:  # noqa: BLE001 - whatever it is, this process ends here and says why
            import traceback

            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(1)

    def _gpus(self, index: int, dedicated: bool) -> str | None:
        """A pool's workers share the task's GPUs evenly, in turn; a worker of its own sees them all."""
        each = int(self.config.get("gpus_each") or 0)
        names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if not each or dedicated or len(names) < each:
            return None
        begin = index % (len(names) // each) * each
        return ",".join(names[begin : begin + each])

    def log(self, index: int) -> str:
        """Return the path of a worker's output."""
        return os.path.join(self.folder, "logs", str(index))

    def tail(self, index: int) -> str:
        """Return the end of a worker's output."""
        try:
            with open(self.log(index), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def reap(self) -> list[dict[str, Any]]:
        """Collect workers that have ended; return what each was doing, as messages for its clients."""
        self.memory.look()
        gone: list[dict[str, Any]] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return gone
            if pid == 0:
                return gone
            process = self.by_pid.pop(pid, None)
            if process is not None:
                gone.append(self._bury(process, status))

    def _bury(self, process: Process, status: int) -> dict[str, Any]:
        process.signal(signal.SIGKILL)  # what it has started goes with it
        if self.by_index.get(process.index) is process:
            del self.by_index[process.index]
        self.let_go(process.control)
        process.control.close()
        stream, number, _, busy = self.page.read(process.index)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        reason = process.killed_for.get((stream, number), "") if busy else ""
        if not reason and killed == signal.SIGKILL and self.memory.has_struck():
            reason = "out-of-memory"
        return {
            "event": "gone",
            "worker": process.index,
            "streams": sorted(process.streams),
            "clients": sorted(set(process.streams.values())),
            "stream": stream,
            "number": number,
            "busy": busy,
            "code": None if killed else os.WEXITSTATUS(status),
            "signal": killed,
            "reason": reason or ("killed" if killed else "exit"),
            "tail": self.tail(process.index),
        }
