"""The door of a session: a Unix socket where a connection is let in once it has proved that it knows the key.

What is said before that is bounded in length and in time, and so is the number of those who say it. Standard library
only, Python 3.8+.
"""

from __future__ import annotations

import os
import selectors
import socket
import time

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    LetIn = Callable[[socket.socket, dict[str, Any], dict[str, Any]], None]

DOOR = "door"
"""The socket's name in the task's folder."""

_HANDSHAKE_S = 10.0
_MAX_STRANGERS = 64


class Stranger:
    """A connection that has not proved anything yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.nonce = wire.nonce()
        self.said = b""
        self.deadline = time.monotonic() + _HANDSHAKE_S

    def hear(self, key: bytes) -> dict[str, Any] | None:
        """Return what it wants once it has said all of it and proved the key. Raises ProtocolError."""
        try:
            data = self.connection.recv(wire.MAX_LINE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        self.said += data
        if not data or len(self.said) > wire.MAX_LINE_BYTES:
            raise wire.ProtocolError("said nothing, or too much")
        if not self.said.endswith(b"\n"):
            return None
        hello: dict[str, Any] = wire.parse_line(self.said)
        if hello.get("flow") != wire.VERSION:
            raise wire.ProtocolError(
                f"the client speaks version {hello.get('flow')!r} of the session protocol, this session version "
                f"{wire.VERSION}"
            )
        if not wire.proves(hello.get("proof"), key, "client", str(hello.get("nonce")), self.nonce):
            raise wire.ProtocolError("the key is not this session's")
        return hello

    def dismiss(self, error: str) -> None:
        """Say why it is not let in, and hang up."""
        try:
            self.connection.send(wire.line({"ok": False, "error": error}))
        except OSError:
            pass
        self.connection.close()


class Door:
    """Listens in `folder`, and calls `let_in(connection, hello, welcome)` for those who know the key.

    `let_in` answers with the welcome, or raises ProtocolError, LookupError, ValueError, TypeError, ArithmeticError or
    OSError to refuse.
    """

    def __init__(self, folder: str, selector: selectors.BaseSelector, let_in: LetIn) -> None:
        self.key = os.urandom(32)
        self.folder = folder
        self.selector = selector
        self.let_in = let_in
        self.strangers: list[Stranger] = []

    def open(self) -> None:
        """Begin to listen. Only the owner of the folder can connect."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.setblocking(False)
        here = os.getcwd()
        try:  # a socket's path may have 107 bytes, a task's folder has more
            os.chdir(self.folder)
            old = os.umask(0o177)
            try:
                if os.path.lexists(
                    DOOR
                ):  # of a supervisor that was killed: this is the task's next incarnation
                    os.unlink(DOOR)
                self.listener.bind(DOOR)
            finally:
                os.umask(old)
        finally:
            os.chdir(here)
        self.listener.listen(128)
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Let nobody in any more."""
        self.selector.unregister(self.listener)
        self.listener.close()
        try:
            os.unlink(os.path.join(self.folder, DOOR))
        except OSError:
            pass

    def look_around(self, now: float) -> None:
        """Send away who has said nothing for too long."""
        for stranger in [one for one in self.strangers if one.deadline <= now]:
            self._dismiss(stranger, "said nothing for too long")

    def _accept(self, _: int) -> None:
        try:
            connection, _address = self.listener.accept()
        except OSError:  # it has gone again, or we have no descriptor left
            return
        connection.setblocking(False)
        stranger = Stranger(connection)
        try:
            connection.send(wire.line({"flow": wire.VERSION, "nonce": stranger.nonce}))
        except OSError:
            connection.close()
            return
        self.strangers.append(stranger)
        self.selector.register(connection, selectors.EVENT_READ, lambda _: self._listen_to(stranger))
        if len(self.strangers) > _MAX_STRANGERS:
            self._dismiss(self.strangers[0], "too many wait at the door")

    def _listen_to(self, stranger: Stranger) -> None:
        try:
            hello = stranger.hear(self.key)
            if hello is None:
                return
            nonce = str(hello.get("nonce"))
            welcome = {"ok": True, "proof": wire.proof(self.key, "session", nonce, stranger.nonce)}
            self._forget(stranger)
        except (wire.ProtocolError, ValueError) as error:  # a nonce that is no text
            self._dismiss(stranger, str(error))
            return
        try:
            self.let_in(stranger.connection, hello, welcome)
        except (
            wire.ProtocolError,
            LookupError,
            ValueError,
            TypeError,
            ArithmeticError,
            OSError,
        ) as error:  # no process, no descriptor
            stranger.dismiss(str(error))

    def _dismiss(self, stranger: Stranger, error: str) -> None:
        self._forget(stranger)
        stranger.dismiss(error)

    def _forget(self, stranger: Stranger) -> None:
        self.strangers.remove(stranger)
        self.selector.unregister(stranger.connection)
