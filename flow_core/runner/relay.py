"""Brings a byte stream to a session's door: what we read goes there, what it says is written.

Started on a session's own node as ``<runner> relay <task folder>``, where the socket of the door can be reached.
Standard library only, Python 3.8+.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

from .door import DOOR
from .frames import connect_unix

_PIECE_BYTES = 256 * 1024


def main(argv: list[str]) -> int:
    """Relay until the session hangs up; return 1 when nobody listens."""
    try:
        door = connect_unix(os.path.join(argv[0], DOOR))
    except OSError as error:
        sys.stderr.write(f"nobody listens at the door of {argv[0]}: {error.strerror}\n")
        return 1
    threading.Thread(target=_inwards, args=(door,), daemon=True).start()
    while True:
        try:
            data = memoryview(door.recv(_PIECE_BYTES))
        except OSError:
            data = memoryview(b"")
        if not data:
            return 0
        while data:
            data = data[os.write(1, data) :]


def _inwards(door: socket.socket) -> None:
    """Bring in what we are told; its end is the end of the connection."""
    try:
        while True:
            data = os.read(0, _PIECE_BYTES)
            if not data:
                break
            door.sendall(data)
    except OSError:
        pass
    try:
        door.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
