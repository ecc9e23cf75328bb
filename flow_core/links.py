"""A client's connections to a warm session: how they are opened, and what goes over them. No policy, no waiting.

The first connection is the control: it renews the lease and brings the news of workers. Each further one is a line to
one worker. The protocol is `flow_core.runner.wire`.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from flow_core.errors import ProviderUnavailable, PythonVersionMismatchError, SessionClosedError
from flow_core.runner import parcels, wire

if TYPE_CHECKING:
    from flow_core.definitions import Definition
    from flow_core.engine import Engine
    from flow_core.futures import Future

_HANDSHAKE_S = 15.0
_READ_BYTES = 64 * 1024  # more than that, and the C library maps the buffer anew for every read


class Door:
    """The way into one session's task, for one client, whose name nobody else may have."""

    def __init__(self, engine: Engine, task_id: str, client: str) -> None:
        self.engine = engine
        self.task_id = task_id
        self.client = client
        sessions = engine.provider.sessions
        assert sessions is not None
        self.sessions = sessions
        self._key: bytes | None = None

    def check(self) -> None:
        """Read what the session says of itself.

        Raises ProviderUnavailable or ResourceNotFoundError while it does not listen yet, PythonVersionMismatchError.
        """
        import sys

        about = json.loads(self.engine.collect(self.task_id, "session.json"))
        if about["v"] != wire.VERSION:
            raise SessionClosedError(
                f"session {self.task_id} speaks version {about['v']!r} of the session protocol, this side version "
                f"{wire.VERSION}",
                suggestions=["Open a new session with this release of flow-gpu."],
            )
        theirs, ours = tuple(about["python"]), sys.version_info
        if theirs[:2] != ours[:2]:
            raise PythonVersionMismatchError(
                "the workers run Python {}.{}.{} and this is Python {}.{}.{}: a function that is sent by value only "
                "works in the same minor version".format(*theirs, *ours[:3]),
                suggestions=[
                    "Choose an image= or a `python` setting with this Python, or run the caller with theirs.",
                    "invoke() calls a function by its file and name, which works across versions.",
                ],
            )
        self._key = bytes.fromhex(self.engine.collect(self.task_id, "session.key").decode())

    def open(self, role: str, **more: Any) -> tuple[socket.socket, dict[str, Any]]:
        """Return a connection that has proved itself, and what the session said. Raises ProviderUnavailable."""
        connection = self.sessions.connect(self.task_id)
        try:
            connection.settimeout(_HANDSHAKE_S)
            welcome = self._greet(connection, {"role": role, **more})
        except (OSError, wire.ProtocolError) as error:
            connection.close()
            raise ProviderUnavailable(f"session {self.task_id} refuses the connection: {error}") from error
        connection.setblocking(False)
        return connection, welcome

    def _greet(self, connection: socket.socket, wish: dict[str, Any]) -> dict[str, Any]:
        """Prove that we know the key, and have it proved; return the welcome. Raises ProtocolError."""
        assert self._key is not None
        greeting = _line(connection)
        if greeting.get("flow") != wire.VERSION:
            raise wire.ProtocolError(f"it speaks version {greeting.get('flow')!r}, this side {wire.VERSION}")
        ours, theirs = wire.nonce(), str(greeting.get("nonce"))
        proof = wire.proof(self._key, "client", ours, theirs)
        who = {"flow": wire.VERSION, "nonce": ours, "proof": proof, "client": self.client}
        connection.sendall(wire.line({**who, "memory": self.sessions.shares_memory, **wish}))
        welcome = _line(connection)
        if not welcome.get("ok"):
            raise wire.ProtocolError(str(welcome.get("error")))
        if not wire.proves(welcome.get("proof"), self._key, "session", ours, theirs):
            raise wire.ProtocolError("it does not know the session's key")
        return welcome


def _line(connection: socket.socket) -> dict[str, Any]:
    """Read one line and not a byte more: what follows is for the frames' reader."""
    said = b""
    while not said.endswith(b"\n"):
        piece = connection.recv(1)
        if not piece or len(said) > wire.MAX_LINE_BYTES:
            raise wire.ProtocolError("it ended the connection" if not piece else "it talks too much")
        said += piece
    message: dict[str, Any] = wire.parse_line(said)
    return message


class Connection:
    """A connection that never blocks: what cannot be sent at once is sent when it can be."""

    def __init__(self, connection: socket.socket, *, shares_memory: bool) -> None:
        self.socket = connection
        self.fd = connection.fileno()
        self.shares_memory = shares_memory
        self.frames = wire.Frames()
        self.descriptors: deque[int] = deque()
        self._outbox: deque[tuple[Any, int | None]] = deque()

    @property
    def crowded(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._outbox)

    def write(self, data: bytes, descriptor: int | None = None) -> bool:
        """Send, in order. Return whether all of it has gone. A dead connection is noticed when it is read."""
        if not self._outbox and descriptor is None:
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                return True
            if sent == len(data):
                return True
            data = data[sent:]
        self._outbox.append((memoryview(data), descriptor))
        return self.flush()

    def flush(self) -> bool:
        """Send what waits. Return whether all of it has gone."""
        try:
            while self._outbox:
                data, descriptor = self._outbox[0]
                if descriptor is None:
                    sent = self.socket.send(data)
                else:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))
                    sent = self.socket.sendmsg([data], [rights])
                if sent == len(data):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = (data[sent:], None)
        except BlockingIOError:
            return False
        except OSError:
            self._outbox.clear()
        return True

    def drain(self, timeout_s: float) -> None:
        """Send what waits, for as long as that may take."""
        if self._outbox:
            self.socket.settimeout(timeout_s)
            self.flush()

    def read(self) -> list[wire.Frame] | None:
        """Return the frames that have come, None when the connection has ended."""
        try:
            if self.shares_memory:
                data, rights, _, _ = self.socket.recvmsg(_READ_BYTES, 1024)
                for level, kind, packed in rights:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        count = len(packed) // 4
                        self.descriptors.extend(struct.unpack(f"{count}i", packed[: count * 4]))
            else:
                data = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        try:
            return self.frames.cut(data) if data else None
        except wire.ProtocolError:
            return None

    def close(self) -> None:
        """End the connection. Its descriptor may be another's after this, so it must not be polled any more."""
        self.socket.close()
        while self.descriptors:
            os.close(self.descriptors.popleft())


class Line(Connection):
    """The connection to one worker, and the calls that are there."""

    def __init__(
        self, index: int, connection: socket.socket, welcome: dict[str, Any], *, shares_memory: bool
    ) -> None:
        super().__init__(connection, shares_memory=shares_memory)
        self.index = index
        self.worker: int = welcome[
            "worker"
        ]  # another number than ours where we share the workers with others
        self.stream: int = welcome["stream"]
        self.pid: int = welcome["pid"]
        self.inflight: dict[int, Future] = {}
        self.load = 0.0  # microseconds that the calls there will probably take
        self.known: dict[int, weakref.ref[Definition]] = {}
        self.told: set[int] = set()
        self.lent: set[int] = set()
        self.foreign: dict[int, parcels.Loan] = {}
        self.forwarded: dict[int, list[int]] = {}  # by call: the foreign segments that were sent for it
        self.mapped: dict[int, parcels.Mapped] = {}
        self.returned: deque[int] = deque()
        self.report: dict[str, Any] | None = None
        self.ended_at = 0.0
        self._foreign_numbers = 0

    def introduce(self, definition: Definition) -> bytes:
        """Return what tells the worker of a definition, and of the one that it needs."""
        unknown = [
            one for one in (definition.of, definition) if one is not None and one.number not in self.known
        ]
        self.known.update((one.number, weakref.ref(one)) for one in unknown)
        return b"".join(one.frame for one in unknown)

    def tell(self, segment: parcels.Segment) -> None:
        """Let the worker read one of our segments."""
        if segment.number not in self.told:
            self.told.add(segment.number)
            self.write(wire.frame(wire.SEGMENT, segment.number), segment.fd)
        self.lent.add(segment.number)

    def forward(self, parcel: parcels.Parcel, future: Future) -> bytes:
        """Return the body with which the worker can read a value that another worker has made, for a call."""
        if not parcel.loans:
            return bytes(parcel.body)
        numbers = {}
        for number, loan in parcel.loans.items():
            self._foreign_numbers += 1
            here = numbers[number] = 1 << 63 | self._foreign_numbers
            self.foreign[here] = loan
            self.write(wire.frame(wire.SEGMENT, here), loan.mapped.fd)
        self.forwarded.setdefault(future.number, []).extend(numbers.values())
        return parcels.renumber(parcel.body, numbers)

    def take_back(self, future: Future) -> None:
        """A call comes back that the worker has not begun: what was lent for it is ours again."""
        for segment in future.body.segments:
            self.lent.discard(segment.number)
        for number in self.forwarded.pop(future.number, ()):
            self.foreign.pop(number, None)
            self.write(wire.frame(wire.RETIRE, number))

    def forget_definitions(self) -> None:
        """Tell the worker which functions nobody here can call any more."""
        for number in [number for number, definition in self.known.items() if definition() is None]:
            del self.known[number]
            self.write(wire.frame(wire.FORGET, number))

    def parcel(self, codec: int, body: bytes) -> parcels.Parcel:
        """Return a value that has arrived, holding the segments that it lies in."""
        return parcels.arrived(codec, body, self.mapped, self.returned)

    def give_back(self) -> None:
        """Tell the worker which of its segments nobody here looks at any more."""
        frames = []
        while self.returned:
            frames.append(wire.frame(wire.RELEASE, self.returned.popleft()))
        if frames:
            self.write(b"".join(frames))


def logged(body: bytes) -> tuple[int, int]:
    """Return the range of bytes in a worker's log that a LOGGED frame tells of."""
    begin, end = struct.unpack("<QQ", body)
    return begin, end
