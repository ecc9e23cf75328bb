"""The supervisor of a warm session: it lets clients in, gives each a worker to speak with, and ends when nobody is left.

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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DOOR = "door"
KEY_FILE = "session.key"
ABOUT_FILE = "session.json"
"""Beside each other in the task's folder: the socket, the shared key, and what a client needs to know beforehand."""

CALLS_FOLDER = "calls"
"""Where outcomes lie that another process may ask for: files as `result`, named by client and number."""

_HANDSHAKE_S = 10.0
_MAX_STRANGERS = 64
_TICK_S = 1.0
_END_GRACE_S = 2.0
_CONTROL_LIMIT_BYTES = 128 * 1024 * 1024
_NAME = re.compile(r"[0-9a-f]{1,32}-[0-9]{1,20}")


class Stranger:
    """A connection that has not proved anything yet."""

    def __init__(self, connection: socket.socket, now: float) -> None:
        self.connection = connection
        self.nonce = wire.nonce()
        self.said = b""
        self.deadline = now + _HANDSHAKE_S


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
        self.crew = crew.Crew(folder, config, self.page)
        self.selector = selectors.DefaultSelector()
        self.strangers: list[Stranger] = []
        self.clients: dict[str, Client] = {}
        self.timers: list[tuple[float, int, int, int, int, str]] = []
        self.streams = 0
        self.ending = ""
        now = time.monotonic()
        self.alone_since: float | None = now
        self.active_at = now
        self.begun: dict[int, int] = {}

    # -- the door

    def open(self) -> None:
        """Begin to listen. The file that says so comes last."""
        self.key = os.urandom(32)
        self._write(KEY_FILE, self.key.hex().encode())
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.setblocking(False)
        here = os.getcwd()
        try:  # a socket's path may have 107 bytes, a task's folder has more
            os.chdir(self.folder)
            old = os.umask(0o177)
            try:
                self.listener.bind(DOOR)
            finally:
                os.umask(old)
        finally:
            os.chdir(here)
        self.listener.listen(128)
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
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

    def _accept(self, _: Any) -> None:
        try:
            connection, _address = self.listener.accept()
        except OSError:  # it has gone again, or we have no descriptor left
            return
        connection.setblocking(False)
        stranger = Stranger(connection, time.monotonic())
        try:
            connection.send(wire.line({"flow": wire.VERSION, "nonce": stranger.nonce}))
        except OSError:
            connection.close()
            return
        self.strangers.append(stranger)
        self.selector.register(connection, selectors.EVENT_READ, lambda _: self._listen_to(stranger))
        if len(self.strangers) > _MAX_STRANGERS:
            self._dismiss(self.strangers[0])

    def _listen_to(self, stranger: Stranger) -> None:
        try:
            data = stranger.connection.recv(wire.MAX_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        stranger.said += data
        try:
            if not data or len(stranger.said) > wire.MAX_LINE_BYTES:
                raise wire.ProtocolError("said nothing, or too much")
            if not stranger.said.endswith(b"\n"):
                return
            hello = wire.parse_line(stranger.said)
            if hello.get("flow") != wire.VERSION:
                raise wire.ProtocolError(
                    f"the client speaks version {hello.get('flow')!r} of the session protocol, this session "
                    f"version {wire.VERSION}"
                )
            if not wire.proves(
                hello.get("proof"), self.key, "client", str(hello.get("nonce")), stranger.nonce
            ):
                raise wire.ProtocolError("the key is not this session's")
            self._let_in(stranger, hello)
        except (wire.ProtocolError, LookupError, ValueError, TypeError) as error:
            self._dismiss(stranger, str(error))

    def _dismiss(self, stranger: Stranger, error: str = "") -> None:
        self._forget(stranger)
        try:
            if error:
                stranger.connection.send(wire.line({"ok": False, "error": error}))
        except OSError:
            pass
        stranger.connection.close()

    def _forget(self, stranger: Stranger) -> None:
        self.strangers.remove(stranger)
        self.selector.unregister(stranger.connection)

    def _let_in(self, stranger: Stranger, hello: dict[str, Any]) -> None:
        role, client = hello["role"], str(hello["client"])
        welcome = {
            "ok": True,
            "proof": wire.proof(self.key, "session", str(hello["nonce"]), stranger.nonce),
        }
        if role == "control":
            self._forget(stranger)
            self._admit(Client(stranger.connection, client, time.monotonic()), welcome)
        elif role == "worker":
            index = int(hello["worker"])
            if not 0 <= index < crew.MAX_WORKERS:
                raise wire.ProtocolError(f"there is no worker {index}")
            if client not in self.clients:
                raise wire.ProtocolError("a client's first connection is its control")
            process = self.crew.want(index, dedicated=bool(hello.get("dedicated")))
            self._forget(stranger)
            self.streams += 1
            stranger.connection.setblocking(True)
            try:
                stranger.connection.sendall(
                    wire.line({**welcome, "stream": self.streams, "pid": process.pid})
                )
                self._listen_to_worker(process)
                process.hand_over(
                    self.streams, client, stranger.connection, memory=hello.get("memory") is True
                )
            except OSError:  # the client or the worker is gone; the client sees the end of its connection
                pass
            stranger.connection.close()
        else:
            raise wire.ProtocolError(f"the role {role!r} is not known")

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
        except (OSError, wire.ProtocolError, ValueError, LookupError, TypeError):
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
        wish = message["do"]
        if wish == "cancel":
            self._interrupt(
                int(message["worker"]), int(message["stream"]), int(message["number"]), "cancelled"
            )
        elif wish == "dismiss":
            process = self.crew.by_index.get(int(message["worker"]))
            if process is not None:
                process.signal(signal.SIGKILL)
        elif wish == "log":
            client.say({"reply": number}, number, self._log(message))
        elif wish == "store":
            self._store(str(message["name"]), client.blobs.pop(number))
        elif wish == "leave":
            self._lose(client)
        elif wish == "close":
            self.ending = "closed"
        elif wish != "ping":
            raise wire.ProtocolError(f"the wish {wish!r} is not known")

    def _log(self, message: dict[str, Any]) -> bytes:
        begin, end = message["range"]
        try:
            with open(self.crew.log(int(message["worker"])), "rb") as file:
                file.seek(begin)
                return file.read(min(8 * 1024 * 1024, 8 * 1024 * 1024 if end is None else end - begin))
        except OSError:
            return b""

    def _store(self, name: str, data: bytes) -> None:
        if not _NAME.fullmatch(name):
            raise wire.ProtocolError(f"{name!r} is no name of a call")
        os.makedirs(os.path.join(self.folder, CALLS_FOLDER), mode=0o700, exist_ok=True)
        try:
            self._write(os.path.join(CALLS_FOLDER, name), data)
        except OSError as error:
            sys.stderr.write(f"the outcome of call {name} could not be written: {error}\n")

    def _hear_worker(self, process: crew.Process) -> None:
        try:
            data = process.control.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(process.control)
            return
        message = json.loads(data)
        if "deadline" in message:
            stream, number, seconds = message["deadline"]
            self._at(time.monotonic() + seconds, process, stream, number, "timeout")
        if "left" in message:
            process.streams.pop(message["left"], None)
            if process.dedicated and not process.streams:
                process.signal(signal.SIGKILL)  # its state was that client's

    # -- time

    def _at(self, when: float, process: crew.Process, stream: int, number: int, what: str) -> None:
        heapq.heappush(self.timers, (when, process.index, process.pid, stream, number, what))

    def _interrupt(self, index: int, stream: int, number: int, why: str) -> None:
        process = self.crew.by_index.get(index)
        if process is None:
            return
        process.interrupt(stream, number, why)
        process.killed_for[stream, number] = why
        self._at(time.monotonic() + float(self.config["grace_s"]), process, stream, number, "kill")

    def _fire(self, now: float) -> None:
        while self.timers and self.timers[0][0] <= now:
            _, index, pid, stream, number, what = heapq.heappop(self.timers)
            process = self.crew.by_index.get(index)
            if process is None or process.pid != pid:
                continue
            at = self.page.read(index)
            if (at[0], at[1], at[3]) != (stream, number, True):
                process.killed_for.pop((stream, number), None)
            elif what == "kill":
                process.signal(signal.SIGKILL)
            else:
                self._interrupt(index, stream, number, what)

    def _rung(self, _: Any) -> None:
        try:
            os.read(self._bell, 4096)
        except BlockingIOError:
            pass

    def _bury_the_dead(self) -> None:
        for message in self.crew.reap():
            for name in message.pop("clients"):
                client = self.clients.get(name)
                if client is not None:
                    try:
                        client.say(message)
                        self._expect(client)
                    except OSError:
                        self._lose(client)

    def _look_around(self, now: float) -> None:
        """Notice who has been silent for too long, and whether anything is still wanted."""
        for stranger in [one for one in self.strangers if one.deadline <= now]:
            self._dismiss(stranger, "said nothing for too long")
        for client in [one for one in self.clients.values() if now - one.heard > self.lease_s]:
            self._lose(client)
        if self.alone_since is not None and now - self.alone_since > self.lease_s:
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
        for name in (ABOUT_FILE, DOOR):
            try:
                os.unlink(os.path.join(self.folder, name))
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
            self.crew.reap()
            time.sleep(0.005)
        for process in list(self.crew.by_pid.values()):
            process.signal(signal.SIGKILL)
        while self.crew.by_pid:
            self.crew.reap()
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
