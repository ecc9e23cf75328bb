"""Messages between an agent and whom it serves: a JSON head and bytes, each with its length. Stdlib only, Python 3.8+.

A stream is a socket on one side, carried in messages to a socket on the other; many share one connection.
"""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
from typing import Any, Callable, Dict, Iterator, Tuple

_LENGTHS = struct.Struct("!II")

#: The longest message; what is larger travels in pieces.
MAX_BYTES = 64 * 1024 * 1024

Message = Tuple[Dict[str, Any], bytes]


class Garbled(Exception):
    """What arrives is no message."""


def pack(head: dict[str, Any], data: bytes = b"") -> bytes:
    """Return a message as it travels."""
    text = json.dumps(head, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(data)) + text + data


class Parser:
    """Takes bytes as they come, gives whole messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete now. Raises Garbled."""
        self._held += data
        while len(self._held) >= _LENGTHS.size:
            head, body = _LENGTHS.unpack_from(self._held)
            if head + body > MAX_BYTES:
                raise Garbled(f"these are no messages: {bytes(self._held[:200])!r}")
            start, end = _LENGTHS.size + head, _LENGTHS.size + head + body
            if len(self._held) < end:
                return
            with memoryview(self._held) as view:
                text, content = bytes(view[_LENGTHS.size : start]), bytes(view[start:end])
            del self._held[:end]
            try:
                yield json.loads(text), content
            except ValueError as error:
                raise Garbled(f"this head is no JSON: {text[:200]!r}") from error


class Stream:
    """Carries the bytes of a socket over a connection that others share: at most `WINDOW` of them on the way.

    Who reads slowly thus holds up nobody else. It closes the socket when both directions have ended.
    """

    WINDOW = 1024 * 1024
    _PIECE = 65536

    def __init__(
        self, number: int, end: socket.socket, send: Callable[..., None], ended: Callable[[int], None]
    ) -> None:
        self.number = number
        self._socket = end
        self._send = send
        self._ended = ended
        self._may_send = threading.Condition()
        self._on_the_way = 0
        self._arrived: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._open = 2
        self._closed = False

    def start(self) -> None:
        """Begin to carry."""
        for work in (self._outward, self._inward):
            threading.Thread(target=work, name="flow-stream", daemon=True).start()

    def take(self, head: dict[str, Any], data: bytes) -> None:
        """Take a message for this stream from the other side. Never blocks."""
        if "ack" in head:
            with self._may_send:
                self._on_the_way -= head["ack"]
                self._may_send.notify()
        elif head.get("eof"):
            self._arrived.put(None)
        else:
            self._arrived.put(data)

    def cut(self) -> None:
        """End both directions: the connection is gone."""
        with self._may_send:
            self._closed = True
            self._may_send.notify()
        self._arrived.put(None)
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _outward(self) -> None:
        while True:
            with self._may_send:
                self._may_send.wait_for(lambda: self._on_the_way < self.WINDOW or self._closed)
            try:
                data = b"" if self._closed else self._socket.recv(self._PIECE)
            except OSError:
                data = b""
            with self._may_send:
                self._on_the_way += len(data)
            self._tell({} if data else {"eof": True}, data)
            if not data:
                return self._end()

    def _inward(self) -> None:
        while True:
            data = self._arrived.get()
            try:
                if data is None:
                    self._socket.shutdown(socket.SHUT_WR)
                    return self._end()
                self._socket.sendall(data)
            except OSError:  # nobody reads there any more: the other side must not wait for us
                if data is None:
                    return self._end()
                try:
                    self._socket.shutdown(socket.SHUT_RD)
                except OSError:
                    pass
            self._tell({"ack": len(data)})

    def _tell(self, head: dict[str, Any], data: bytes = b"") -> None:
        try:
            self._send({"stream": self.number, **head}, data)
        except Exception:  # noqa: BLE001 - whatever is wrong with the connection ends this stream as well
            self.cut()

    def _end(self) -> None:
        with self._may_send:
            self._open -= 1
            last = self._open == 0
        if last:
            self._socket.close()
            self._ended(self.number)


def connect_program(argv: list[str], env: dict[str, str]) -> socket.socket:
    """Start a program whose input and output are the other end of the socket that is returned. Raises OSError."""
    import subprocess

    ours, theirs = socket.socketpair()
    try:
        with theirs:
            end, none = theirs.fileno(), subprocess.DEVNULL
            process = subprocess.Popen(
                argv, env=env, stdin=end, stdout=end, stderr=none, start_new_session=True
            )
    except OSError:
        ours.close()
        raise
    threading.Thread(target=process.wait, daemon=True).start()
    return ours


def connect_unix(path: str) -> socket.socket:
    """Connect to a Unix socket, also where its path is longer than the system allows in one piece."""
    import os

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if len(os.fsencode(path)) <= 100:  # the limit is 107 bytes on Linux, 103 on macOS
            connection.connect(path)
            return connection
        here = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{here}/{os.path.basename(path)}")
        finally:
            os.close(here)
    except BaseException:
        connection.close()
        raise
    return connection
