"""What no system can beat: one round trip through a Unix socket, and one copy of the bytes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from tests.benchmarks import work

MESSAGE = b"x" * 64


class PingPong:
    """A process that sends back what it gets, over a Unix socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX)
        self.pid = os.fork()
        if self.pid == 0:
            self.socket.close()
            while got := theirs.recv(4096):
                theirs.sendall(got)
            os._exit(0)
        theirs.close()

    def once(self) -> None:
        """One message there and back."""
        self.socket.sendall(MESSAGE)
        assert self.socket.recv(4096) == MESSAGE

    def close(self) -> None:
        """End the other process."""
        self.socket.shutdown(socket.SHUT_RDWR)  # closing is not enough: workers forked since hold a copy
        os.waitpid(self.pid, 0)


class Copy:
    """Copies an array into memory that is already there."""

    def __init__(self, size: int) -> None:
        self.source, self.target = work.array(size), work.array(size)

    def once(self) -> None:
        """Copy."""
        np.copyto(self.target, self.source)

    def once_and_read(self) -> None:
        """Copy, then read every byte."""
        self.once()
        work.read_all(self.target)


@contextmanager
def ping_pong() -> Iterator[PingPong]:
    """A PingPong, ended at the end."""
    floor = PingPong()
    try:
        yield floor
    finally:
        floor.close()
