"""Our terminal, connected with a program on another machine: its size, its keys, and its state afterwards."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any

import paramiko

#: How often the terminal's size is looked at (seconds).
_TICK_S = 0.25

#: What ssh returns when it cannot tell how the program ended.
_UNKNOWN = 255


def is_terminal() -> bool:
    """Whether somebody sits in front of us."""
    try:
        return os.isatty(0) and os.isatty(1)
    except OSError:
        return False


def attach(channel: paramiko.Channel, command: str, *, terminal: bool) -> int:
    """Run `command` on a new channel, with our standard streams; return its exit code.

    With `terminal` ours becomes that of the program: every key goes there, and what it was before is restored whatever
    happens. Without, what we read is sent until its end, and an interrupt ends the program there.
    """
    try:
        if not terminal:
            channel.exec_command(command)
            return _carry(channel, size=None)
        size = _size()
        channel.get_pty(os.environ.get("TERM", "xterm"), *size)
        channel.exec_command(command)
        with _raw():
            return _carry(channel, size=size)
    finally:
        channel.close()


def _size() -> tuple[int, int]:
    try:
        columns, lines = os.get_terminal_size(1)
    except OSError:
        return 80, 24
    return columns, lines


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Pass every key on, also those that would stop or end us; afterwards the terminal is as it was."""
    before = termios.tcgetattr(0)

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handled = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, leave) for number in handled}
    try:
        tty.setraw(0, termios.TCSADRAIN)  # what has been typed already is for the program
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _carry(channel: paramiko.Channel, *, size: tuple[int, int] | None) -> int:
    channel.settimeout(0.0)
    reading = [0]
    unsent = b""
    while True:
        watched: list[Any] = [channel, *([] if unsent else reading)]
        ready = select.select(watched, [], [], 0.02 if unsent else _TICK_S)[0]
        if size is not None and _size() != size:
            size = _size()
            channel.resize_pty(*size)
        if 0 in ready:
            unsent = _read(0)
            if not unsent:
                reading = []
                channel.shutdown_write()
        unsent = _sent(channel, unsent)
        if _received(channel) and channel.exit_status_ready():
            code = channel.recv_exit_status()
            return code if code >= 0 else _UNKNOWN


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 32768)
    except OSError:  # a terminal that is gone
        return b""


def _sent(channel: paramiko.Channel, data: bytes) -> bytes:
    """Send what can be sent now; return the rest."""
    while data:
        try:
            data = data[channel.send(data) :]
        except TimeoutError:
            break
        except OSError:  # the program reads no more
            return b""
    return data


def _received(channel: paramiko.Channel) -> bool:
    """Show what has come; return whether nothing more can."""
    while channel.recv_ready():
        _show(sys.stdout.fileno(), channel.recv(32768))
    while channel.recv_stderr_ready():
        _show(sys.stderr.fileno(), channel.recv_stderr(32768))
    return bool(channel.eof_received or channel.closed)


def _show(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
