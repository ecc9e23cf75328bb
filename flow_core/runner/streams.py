"""A worker's side of one client's connection: what came over it, and how answers leave. Standard library only, 3.8+."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import socket
import struct
import threading
from collections import deque

from . import parcels, pickles, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_READ_BYTES = 64 * 1024  # more than that, and the C library maps the buffer anew for every read
_MOST_SEGMENTS = 32  # of each worker, in one client


class Gone(Exception):
    """The client's connection has ended."""


class Definition:
    """A function as a client has sent it: loaded when it is first called, so that its errors are the call's."""

    def __init__(self, number: int, head: dict[str, Any], payload: bytes) -> None:
        self.number = number
        self.kind: str = head["kind"]
        self.name: str = head["name"]
        self.codec = parcels.JSON if head["codec"] == "json" else parcels.PICKLE
        self.streams: bool = head.get("generator", False)
        self.of: int = head.get("of", 0)
        self._sources = head.get("sources") or {}
        sizes = head.get("sizes") or [len(payload)]
        ends = list(itertools.accumulate(sizes))
        self._payload, *self._values = [payload[end - size : end] for size, end in zip(sizes, ends)]
        self._objects: list[dict[str, Any]] = head.get("objects") or []
        self.function: Callable[..., Any] | None = None

    def resolve(self, stream: Stream) -> Callable[..., Any]:
        """Return what is to be called. Raises what loading it raises."""
        if self.kind == "method":
            target = stream.object_of(self.of)
            function: Callable[..., Any] = getattr(target, self.name) if self.name else target
        elif self.kind == "touch":
            stream.object_of(self.of)
            function = _nothing
        else:
            function = pickles.loads_captured(self._payload, self._sources, self._loads())
        self.function = function
        return function

    def _loads(self) -> Callable[[bytes], Any]:
        """Return what unpickles it, with values in place of references."""
        if not self._objects:
            return pickle.loads
        from .objects import Resolver

        return Resolver("", self._objects, self._values).loads


def _nothing() -> None:
    """Be called in place of a method, when an object is only to be made."""


class Stream:
    """One client's connection."""

    def __init__(self, number: int, client: str, connection: socket.socket, *, shares_memory: bool) -> None:
        self.number = number
        self.client = client
        self.connection = connection
        self.frames = wire.Frames()
        self.definitions: dict[int, Definition] = {}
        self.made: dict[int, Any] = {}
        self.unmade: dict[int, BaseException] = {}
        self.kept: set[int] = set()
        self.staying: set[int] = set()
        self.credit: dict[int, int] = {}
        self.descriptors: deque[int] = deque()
        self.mapped: dict[int, parcels.Mapped] = {}
        self.returned: deque[int] = deque()
        self.shares = shares_memory
        self.arena = parcels.Arena(_MOST_SEGMENTS) if self.shares else None
        self.lock = threading.Lock()
        self.broken = False

    def hang_up(self) -> None:
        """Have the connection's end seen by whoever reads it next: its client does not keep to the protocol."""
        self.broken = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def object_of(self, number: int) -> Any:
        """Return the object of a service, made now if every worker makes its own. Raises what making it raised."""
        if number in self.unmade:
            raise self.unmade[number]
        if number not in self.made:
            maker = self.definitions[number]
            if maker.kind != "each":
                raise RuntimeError("the service has no object: the call that should make it was not made")
            self.made[number] = maker.resolve(self)()
        return self.made[number]

    def receive(self) -> list[wire.Frame]:
        """Return the frames that have come, without waiting for any. Raises Gone at the connection's end."""
        try:
            if self.shares:
                data, rights, _, _ = self.connection.recvmsg(_READ_BYTES, 1024, socket.MSG_DONTWAIT)
                for level, kind, packed in rights:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        count = len(packed) // 4
                        self.descriptors.extend(struct.unpack(f"{count}i", packed[: count * 4]))
            else:
                data = self.connection.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise Gone
        return self.frames.cut(data)

    def send(self, data: bytes) -> None:
        """Send frames; a client that is gone is noticed when its connection is read."""
        try:
            with self.lock:
                self.connection.sendall(data)
        except OSError:
            pass

    def answer(
        self, kind: int, number: int, codec: int, body: bytes, *, more: int = 0, before: bytes = b""
    ) -> None:
        """Send a frame of a call after `before`, and what has been let go of meanwhile."""
        if self.returned:
            before += self.releases()
        self.send(before + wire.frame(kind, number, body, codec, more))

    def releases(self) -> bytes:
        """Return the frames that give back the segments which nobody here looks at any more."""
        frames = b""
        while self.returned:
            number = self.returned.popleft()
            if number >> 63:
                self.mapped.pop(number, None)
            frames += wire.frame(wire.RELEASE, number)
        return frames

    def retire(self) -> None:
        """Have the client give up the segments that we have given up."""
        while self.arena is not None and self.arena.retired:
            self.send(wire.frame(wire.RETIRE, self.arena.retired.pop()))

    def hand_over(self, segment: parcels.Segment) -> None:
        """Let the client map a segment."""
        segment.told = True
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", segment.fd))
        data = wire.frame(wire.SEGMENT, segment.number)
        try:
            with self.lock:
                sent = self.connection.sendmsg([data], [rights])
                self.connection.sendall(data[sent:])
        except OSError:
            pass

    def parcel(self, codec: int, body: bytes) -> parcels.Parcel:
        """Return a value that has arrived, holding the segments that it lies in."""
        return parcels.arrived(codec, body, self.mapped, self.returned)

    def close(self) -> None:
        """Forget the client."""
        self.connection.close()
        while self.descriptors:
            os.close(self.descriptors.popleft())
        if self.arena is not None:
            self.arena.close()
