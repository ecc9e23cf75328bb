"""Whose turn it is and who holds which GPU, by kernel locks alone. Standard library only, Python 3.8+.

There is no daemon and no table. A GPU is a file: whoever holds its lock has the GPU, and since every process of the
task inherits the lock, it is free exactly when the last of them is gone, whoever was killed. A place in the queue is
a file too, locked by the waiter for as long as it waits: a dead waiter's lock is gone, so it steps out by itself.
"""

from __future__ import annotations

import fcntl
import os
import time

from . import proc

_TURN = ".turn"

#: Tickets of submits that are under way in this process. Unlike every other lock they cannot be given back here: the
#: runner has them too by then. A child that a host's other thread forks meanwhile drops its copies at once.
_under_way: set[int] = set()


def _drop_copies() -> None:
    for ticket in _under_way:
        os.close(ticket)
    _under_way.clear()


os.register_at_fork(after_in_child=_drop_copies)


def take_ticket(queue: str, label: str) -> tuple[str, int]:
    """Join the end of the queue: return (ticket name, descriptor that holds its lock and may be inherited).

    The ticket appears under its name only once it is locked, so no one can mistake it for a dead one. The caller lets
    go of it with `hand_over`.
    """
    os.makedirs(queue, mode=0o700, exist_ok=True)
    turn = os.open(os.path.join(queue, _TURN), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        last = max((int(name.split(".")[0]) for name in _tickets(queue)), default=0)
        name = f"{last + 1:012d}.{label}"
        draft = os.path.join(queue, f".new-{os.getpid()}-{name}")
        ticket = os.open(draft, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        _under_way.add(ticket)
        try:
            fcntl.flock(ticket, fcntl.LOCK_EX)
            os.rename(draft, os.path.join(queue, name))
        except BaseException:
            hand_over(ticket)
            raise
        return name, ticket
    finally:
        proc.unlock(turn)


def hand_over(ticket: int) -> None:
    """Close a ticket that was taken in this process; whoever inherited it has the place now."""
    _under_way.discard(ticket)
    os.close(ticket)


def keep(ticket: int) -> None:
    """Say that the place of a ticket that was taken in this process is its own; `leave` gives it up."""
    _under_way.discard(ticket)


def _tickets(queue: str) -> list[str]:
    return sorted(name for name in os.listdir(queue) if name[0] != ".")


def line(queue: str) -> list[str]:
    """Return the names of the living tickets, in order."""
    names = _tickets(queue) if os.path.isdir(queue) else []
    return [name for name in names if is_held(os.path.join(queue, name))]


def label(ticket: str) -> str:
    """Return what a ticket was taken for."""
    return ticket.partition(".")[2]


def waiting(queue: str) -> list[str]:
    """Return the labels of the living tickets, in order."""
    return [label(name) for name in line(queue)]


def age_s(queue: str, ticket: str) -> float:
    """Return how long ago a ticket was taken; 0 for one that is gone."""
    try:
        return time.time() - os.stat(os.path.join(queue, ticket)).st_mtime
    except FileNotFoundError:
        return 0.0


def leave(queue: str, name: str, ticket: int) -> None:
    """Give the place up. The unlock is explicit: a copy of the descriptor in a forked process would keep the lock."""
    try:
        os.unlink(os.path.join(queue, name))
    except FileNotFoundError:
        pass
    proc.unlock(ticket)


def wait_for_turn(queue: str, name: str) -> None:
    """Block until nobody who came earlier is still waiting. Signals are served meanwhile (a handler may raise)."""
    while True:
        ahead = [other for other in _tickets(queue) if other < name]
        if not ahead:
            return
        path = os.path.join(queue, ahead[-1])
        try:
            previous = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(previous, fcntl.LOCK_SH)
            try:
                os.unlink(path)  # its owner left or died; either way the place is empty
            except FileNotFoundError:
                pass
        finally:
            os.close(previous)


class Slots:
    """The GPUs of one machine, shared by count."""

    def __init__(self, folder: str, devices: list[str]) -> None:
        self.folder = folder
        self.devices = devices
        self.held: dict[str, int] = {}
        os.makedirs(folder, mode=0o700, exist_ok=True)

    def acquire(self, count: int) -> list[str]:
        """Return the names of `count` devices that are now ours. Called only by the head of the queue.

        What is free is taken at once and kept: nobody behind us may have it, so holding a part cannot deadlock.
        """
        while True:
            for device in self.devices:
                if len(self.held) == count:
                    return sorted(self.held, key=self.devices.index)
                if device not in self.held:
                    self._try(device)
            if len(self.held) < count:
                time.sleep(0.02)

    def _try(self, device: str) -> None:
        lock = os.open(_file_of(self.folder, device), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            self.held[device] = lock


def _file_of(folder: str, device: str) -> str:
    return os.path.join(folder, device.replace("/", "_"))


def busy(folder: str, devices: list[str]) -> list[str]:
    """Return the devices that some task holds at this moment."""
    return [device for device in devices if is_held(_file_of(folder, device))]


def is_held(path: str) -> bool:
    """Whether somebody holds a file's lock. Looks, takes nothing for longer than the look."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        proc.unlock(lock)
    return False
