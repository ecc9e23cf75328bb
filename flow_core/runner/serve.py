"""The supervisor of a warm session: lets clients in, gives each a worker to speak with, ends when nobody is left.

It runs as the command of a task, in place of one function call (``call.json`` of kind "serve"). It listens on a Unix
socket in the task's folder, checks the session's key, and hands the accepted connection to a worker process: calls and
results never pass through here. What does: leases, deadlines, wishes to cancel, deaths. Standard library only, 3.8+.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import selectors
import signal
import socket
import sys
import time

from . import crew, stdlib, wire
from .door import Door

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KEY_FILE = "session.key"
ABOUT_FILE = "session.json"
"""Beside the door in the task's folder: the shared key, and what a client needs to know beforehand."""

_TICK_S = 1.0
_END_GRACE_S = 2.0
_CONTROL_LIMIT_BYTES = 128 * 1024 * 1024
_LOG_BYTES = 8 * 1024 * 1024
_NONSENSE = (wire.ProtocolError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError)
_NAME = re.compile(r"[0-9a-f]{1,32}-[0-9]{1,20}")


class Client:
    """A connection that controls: it renews its owner's lease, cancels, reads logs, closes."""

    def __init__(self, connection: socket.socket, name: str, now: float) -> None:
        self.connection = connection
        self.name = name
        self.frames = wire.Frames()
        self.heard = now
        self.unsent = b""
        self.blobs: dict[int, bytes] = {}

    def say(self, message: dict[str, Any], number: int = 0, blob: bytes | None = None) -> None:
        """Send a message; what the socket does not take now goes later."""
        self.unsent += wire.frame(wire.SAY, number, json.dumps(message).encode())
        if blob is not None:
            self.unsent += wire.frame(wire.BLOB, number, blob)
        self.send()

    def send(self) -> None:
        """Send what is left. Raises OSError when the client is gone."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.connection.send(self.unsent) :]
        except BlockingIOError:
            pass


class Supervisor:
    """One session, from the opening of its door to the last worker's end."""

    def __init__(self, folder: str, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.lease_s = float(config["lease_s"])
        self.page = crew.Page()
        self.crew = crew.Crew(folder, config, self.page, self._stop_listening)
        self.selector = selectors.DefaultSelector()
        self.door = Door(folder, self.selector, self._let_in)
        self.clients: dict[str, Client] = {}
        self.timers: list[tuple[float, int, int, int, int, int, str]] = []
        self.streams = 0
        self.ending = ""
        now = time.monotonic()
        self.alone_since: float | None = now
        self.active_at = now
        self.begun: dict[int, int] = {}

    def open(self) -> None:
        """Begin to serve. The file that says so comes last."""
        self._write(KEY_FILE, self.door.key.hex().encode())
        self.door.open()
        self._bell, ring = os.pipe()
        for fd in (self._bell, ring):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self._bell, selectors.EVENT_READ, self._rung)
        about = {"v": wire.VERSION, "python": list(sys.version_info[:3]), "pid": os.getpid()}
        self._write(ABOUT_FILE, json.dumps(about).encode())

    def _write(self, name: str, data: bytes) -> None:
        path = os.path.join(self.folder, name)
        draft = f"{path}.{os.getpid()}"
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(file, "wb") as out:
                out.write(data)
            os.replace(draft, path)
        except OSError:
            os.unlink(draft)
            raise

    # -- who comes in

    def _let_in(self, connection: socket.socket, hello: dict[str, Any], welcome: dict[str, Any]) -> None:
        role, client = hello["role"], str(hello["client"])
        if role == "control":
            self._admit(Client(connection, client, time.monotonic()), welcome)
        elif role == "worker":
            self._introduce(connection, hello, welcome)
        else:
            raise wire.ProtocolError(f"the role {role!r} is not known")

    def _introduce(self, connection: socket.socket, hello: dict[str, Any], welcome: dict[str, Any]) -> None:
        """Hand a client's connection to a worker, which is started if it is not there."""
        client = str(hello["client"])
        index = self._least_taken() if hello.get("any") is True else int(hello["worker"])
        if not 0 <= index < crew.MAX_WORKERS:
            raise wire.ProtocolError(f"there is no worker {index}")
        if client not in self.clients:
            raise wire.ProtocolError("a client's first connection is its control")
        process = self.crew.want(index, dedicated=bool(hello.get("dedicated")))
        self.streams += 1
        connection.setblocking(True)
        try:
            about = {"stream": self.streams, "pid": process.pid, "worker": index}
            connection.sendall(wire.line({**welcome, **about}))
            self._listen_to_worker(process)
            process.hand_over(self.streams, client, connection, memory=hello.get("memory") is True)
        except OSError:  # the client or the worker is gone; the client sees the end of its connection
            pass
        connection.close()

    def _least_taken(self) -> int:
        """Return the worker that the fewest connections lead to."""

        def taken(index: int) -> int:
            process = self.crew.by_index.get(index)
            return 0 if process is None else len(process.streams)

        return min(range(int(self.config["workers"])), key=taken)

    def _stop_listening(self, control: socket.socket) -> None:
        """Forget a worker's connection, before its descriptor is closed and can be another's."""
        try:
            self.selector.unregister(control)
        except (KeyError, ValueError):
            pass

    def _listen_to_worker(self, process: crew.Process) -> None:
        try:
            self.selector.get_key(process.control)
        except KeyError:
            self.selector.register(
                process.control, selectors.EVENT_READ, lambda _: self._hear_worker(process)
            )

    def _admit(self, client: Client, welcome: dict[str, Any]) -> None:
        former = self.clients.pop(client.name, None)
        if former is not None:
            self._lose(former)
        self._stop_calls_of(client.name)
        self.clients[client.name] = client
        self.alone_since = None
        try:
            client.connection.send(wire.line(welcome))
        except OSError:
            pass  # its end is seen next
        self.selector.register(
            client.connection,
            selectors.EVENT_READ | selectors.EVENT_WRITE,
            lambda events: self._hear(client, events),
        )

    def _stop_calls_of(self, name: str) -> None:
        """Kill workers in the middle of a call of a client that lost its connection: it may make the call again."""
        for process in self.crew.by_index.values():
            stream, _, _, busy = self.page.read(process.index)
            if busy and process.streams.get(stream) == name:
                process.signal(signal.SIGKILL)

    # -- what is said

    def _hear(self, client: Client, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                client.send()
            self._expect(client)
            if events & selectors.EVENT_READ:
                data = client.connection.recv(256 * 1024)
                if not data:
                    raise ConnectionResetError
                client.heard = time.monotonic()
                for kind, _, _, number, body in client.frames.cut(data):
                    self._obey(client, kind, number, body)
                self._expect(client)
        except BlockingIOError:
            pass
        except (OSError, *_NONSENSE):
            self._lose(client)

    def _expect(self, client: Client) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        if self.selector.get_key(client.connection).events != wanted:
            self.selector.modify(client.connection, wanted, self.selector.get_key(client.connection).data)

    def _lose(self, client: Client) -> None:
        if self.clients.get(client.name) is client:
            del self.clients[client.name]
        try:
            self.selector.unregister(client.connection)
        except (KeyError, ValueError):
            pass
        client.connection.close()
        if not self.clients and self.alone_since is None:
            self.alone_since = time.monotonic()

    def _obey(self, client: Client, kind: int, number: int, body: bytes) -> None:
        if kind == wire.BLOB:
            client.blobs[number] = body
            return
        if kind != wire.SAY or len(body) > _CONTROL_LIMIT_BYTES:
            raise wire.ProtocolError(f"a frame of kind {kind} on a control connection")
        message = json.loads(body)
        wishes = {
            "cancel": self._cancel,
            "close": self._close,
            "dismiss": self._dismiss,
            "drop": self._drop,
            "leave": self._leave,
            "log": self._send_log,
            "ping": self._pong,
            "store": self._store,
        }
        wishes[message["do"]](client, number, message)

    def _pong(self, *_: Any) -> None:
        """Nothing is to be done: that it was heard is what counts."""

    def _cancel(self, _client: Client, _number: int, message: dict[str, Any]) -> None:
        self._interrupt(int(message["worker"]), int(message["stream"]), int(message["number"]), "cancelled")

    def _close(self, *_: Any) -> None:
        self.ending = "closed"

    def _dismiss(self, _client: Client, _number: int, message: dict[str, Any]) -> None:
        process = self.crew.by_index.get(int(message["worker"]))
        if process is not None:
            process.signal(signal.SIGKILL)

    def _leave(self, client: Client, *_: Any) -> None:
        self._lose(client)

    def _send_log(self, client: Client, number: int, message: dict[str, Any]) -> None:
        client.say({"reply": number}, number, self._log(message))

    def _store(self, client: Client, number: int, message: dict[str, Any]) -> None:
        name, data = str(message["name"]), client.blobs.pop(number)
        if not _NAME.fullmatch(name):
            raise wire.ProtocolError(f"{name!r} is no name of a call")
        os.makedirs(os.path.join(self.folder, wire.CALLS_FOLDER), mode=0o700, exist_ok=True)
        if _is_value(data) and _is_value(self._first_line(os.path.join(wire.CALLS_FOLDER, name))):
            return  # the worker has written it, and there may be references to just these bytes
        try:
            self._write(os.path.join(wire.CALLS_FOLDER, name), data)
        except OSError as error:
            sys.stderr.write(f"the outcome of call {name} could not be written: {error}\n")

    def _drop(self, client: Client, _number: int, message: dict[str, Any]) -> None:
        """Forget values that stayed here and that their client, who alone knew of them, needs no more."""
        for name in map(str, message["names"]):
            if not _NAME.fullmatch(name) or not name.startswith(f"{client.name}-"):
                raise wire.ProtocolError(f"{name!r} is no name of a call of {client.name}")
            try:
                os.unlink(os.path.join(self.folder, wire.CALLS_FOLDER, name))
            except OSError:
                pass

    def _first_line(self, name: str) -> bytes:
        try:
            with open(os.path.join(self.folder, name), "rb") as file:
                return file.readline()
        except OSError:
            return b""

    def _log(self, message: dict[str, Any]) -> bytes:
        begin, end = message["range"]
        try:
            with open(self.crew.log(int(message["worker"])), "rb") as file:
                file.seek(begin)
                return file.read(max(0, min(_LOG_BYTES, _LOG_BYTES if end is None else end - begin)))
        except OSError:
            return b""

    def _hear_worker(self, process: crew.Process) -> None:
        try:
            data = process.control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._stop_listening(process.control)
            return
        try:
            self._heed(process, json.loads(data))
        except _NONSENSE:  # of a client's that reached us through its worker: a time limit that is no number
            pass

    def _heed(self, process: crew.Process, message: dict[str, Any]) -> None:
        if "deadline" in message:
            stream, number, seconds, begun = message["deadline"]
            process.killed_for.pop((stream, number), None)  # an attempt before this one
            when = time.monotonic() + seconds
            if when == when:  # not a number is neither early nor late, and would hide all timers behind it
                self._at(when, process, (stream, number, begun), "timeout")
        if "left" in message:
            name = process.streams.pop(message["left"], "")
            self._tell(name, {"event": "left", "streams": [message["left"]]})
            if process.dedicated and not process.streams:
                process.signal(signal.SIGKILL)  # its state was that client's

    # -- time

    def _at(self, when: float, process: crew.Process, attempt: tuple[int, int, int], what: str) -> None:
        heapq.heappush(self.timers, (when, process.index, process.pid, *attempt, what))

    def _interrupt(self, index: int, stream: int, number: int, why: str, begun: int = 0) -> None:
        """Stop a call; with `begun` only this attempt of it, which another one may follow."""
        process = self.crew.by_index.get(index)
        if process is None:
            return
        process.interrupt(stream, number, why, begun)
        process.killed_for[stream, number] = why
        self._at(time.monotonic() + float(self.config["grace_s"]), process, (stream, number, begun), "kill")

    def _fire(self, now: float) -> None:
        while self.timers and self.timers[0][0] <= now:
            _, index, pid, stream, number, begun, what = heapq.heappop(self.timers)
            process = self.crew.by_index.get(index)
            if process is None or process.pid != pid:
                continue
            at = self.page.read(index)
            if at != (stream, number, begun or at[2], True):
                process.killed_for.pop((stream, number), None)
            elif what == "kill":
                process.signal(signal.SIGKILL)
            else:
                self._interrupt(index, stream, number, what, begun)

    def _rung(self, _: Any) -> None:
        try:
            os.read(self._bell, 4096)
        except BlockingIOError:
            pass

    def _bury_the_dead(self) -> None:
        for message in self.crew.reap():
            for name in message.pop("clients"):
                self._tell(name, message)

    def _tell(self, name: str, message: dict[str, Any]) -> None:
        client = self.clients.get(name)
        if client is not None:
            try:
                client.say(message)
                self._expect(client)
            except OSError:
                self._lose(client)

    def _look_around(self, now: float) -> None:
        """Notice who has been silent for too long, and whether anything is still wanted."""
        self.door.look_around(now)
        for client in [one for one in self.clients.values() if now - one.heard > self.lease_s]:
            self._lose(client)
        if self.config["owned"] and self.alone_since is not None and now - self.alone_since > self.lease_s:
            self.ending = self.ending or "lease"
        for index in list(self.crew.by_index):
            _, _, begun, busy = self.page.read(index)
            if busy or begun != self.begun.get(index):
                self.begun[index] = begun
                self.active_at = now
        idle = self.config.get("idle_limit_s")
        if idle is not None and now - self.active_at > idle:
            self.ending = self.ending or "idle"

    # -- the run

    def run(self) -> str:
        """Serve until somebody closes the session, its owners are gone, or it has idled; return which."""
        self.open()
        looked = 0.0
        while not self.ending:
            now = time.monotonic()
            wait = _TICK_S if not self.timers else max(0.0, min(_TICK_S, self.timers[0][0] - now))
            for key, events in self.selector.select(wait):
                key.data(events)
            now = time.monotonic()
            self._bury_the_dead()
            self._fire(now)
            if now - looked >= _TICK_S / 4:
                looked = now
                self._look_around(now)
        self._end()
        return self.ending

    def _end(self) -> None:
        self.door.close()
        try:
            os.unlink(os.path.join(self.folder, ABOUT_FILE))
        except OSError:
            pass
        for client in list(self.clients.values()):
            try:
                client.say({"event": "ending", "reason": self.ending})
            except OSError:
                pass
        for process in list(self.crew.by_pid.values()):
            process.signal(signal.SIGTERM)
        deadline = time.monotonic() + _END_GRACE_S
        while self.crew.by_pid and time.monotonic() < deadline:
            self._bury_the_dead()  # a client may just have sent a call: it is told that the call was not begun
            time.sleep(0.005)
        for process in list(self.crew.by_pid.values()):
            process.signal(signal.SIGKILL)
        while self.crew.by_pid:
            self._bury_the_dead()
            time.sleep(0.005)
        for client in list(self.clients.values()):
            client.connection.close()


def run(folder: str, config: dict[str, Any]) -> dict[str, str]:
    """Be the session of a task; return what ended it."""
    import ctypes  # noqa: F401 - loaded once, for all workers, as what follows

    from . import pickles, provision, worker  # noqa: F401

    pickles.prepare(folder, config)
    provision.provide(folder, dependencies=config["dependencies"], package=config["package"])
    work = os.path.join(folder, "work")
    roots = list(dict.fromkeys(root for root in (work, os.getcwd()) if os.path.isdir(root)))
    stdlib.put_first([*roots, *config.get("paths", ())])
    return {"ended": Supervisor(folder, config).run()}


def _is_value(data: bytes) -> bool:
    """Whether the content of a file that tells how a call has ended tells of a value."""
    try:
        return bool(json.loads(data.partition(b"\n")[0])["ok"])
    except (ValueError, LookupError):
        return False
