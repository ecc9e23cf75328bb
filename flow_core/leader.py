"""Reads many connections in whatever thread waits for something that comes over one of them.

A thread that waits takes the lead and reads for all; the others follow, that is, sleep until theirs has come or the
lead is free. So an answer reaches the one who waits for it without a change of threads. Knows no calls and no wire.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

SLICE_S = 0.1
"""A waiting call returns to Python at least this often, so that a host's timeout or signal can get at it."""


class Waiter:
    """A thread that sleeps until somebody wakes it; waking it twice is waking it once."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        """Let it go on."""
        with contextlib.suppress(RuntimeError):
            self._lock.release()

    def sleep(self, timeout_s: float) -> None:
        """Wait until woken, or for `timeout_s`."""
        self._lock.acquire(timeout=timeout_s)


class Leader:
    """The lead over a set of descriptors. Thread-safe."""

    def __init__(self) -> None:
        self.leads = 0
        self._lead = threading.Lock()
        self._thread = 0
        self._stands_in = False
        self._followers: deque[Waiter] = deque()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._poller = select.epoll()
        self._bell, self._ring = os.pipe()
        weakref.finalize(self, _close, self._bell, self._ring)
        for fd in (self._bell, self._ring):
            os.set_blocking(fd, False)
        self.register(self._bell, self._rung)

    # -- what is read

    def register(self, fd: int, handler: Callable[[], None]) -> None:
        """Have `handler()` called, in a thread that leads, when there is something to read, or room to write."""
        self._handlers[fd] = handler
        self._poller.register(fd, select.EPOLLIN)

    def expect(self, fd: int, *, room: bool) -> None:
        """Say whether it is worth while to tell that `fd` can be written to."""
        with contextlib.suppress(OSError, ValueError):  # it is closed
            self._poller.modify(fd, select.EPOLLIN | (select.EPOLLOUT if room else 0))

    def forget(self, fd: int) -> None:
        """Look at it no more. To be called before it is closed."""
        self._handlers.pop(fd, None)
        with contextlib.suppress(OSError, ValueError):
            self._poller.unregister(fd)

    def _rung(self) -> None:
        with contextlib.suppress(OSError):
            os.read(self._bell, 4096)

    def nudge(self) -> None:
        """Wake whoever leads from its sleep."""
        with contextlib.suppress(OSError):
            os.write(self._ring, b".")

    # -- who reads

    @property
    def is_me(self) -> bool:
        """Whether the calling thread leads: something that it reads has called back."""
        return self._thread == threading.get_ident()

    def wait(
        self,
        ready: Callable[[], bool],
        deadline: float | None,
        follow: Callable[[Waiter], bool] | None = None,
    ) -> None:
        """Return once `ready()`, or at the deadline (`time.monotonic()`); read meanwhile, or let others read.

        `follow(waiter)` arranges that the waiter is woken when it may be ready; it returns False when it is already.
        """
        while not ready():
            if deadline is not None and time.monotonic() >= deadline:
                return
            if self._lead.acquire(False):
                self.leads += 1
                self._lead_until(ready, deadline)
            elif self.is_me:
                self._turn(_slice(deadline))
            else:
                self._follow(follow, deadline)

    def help(self, timeout_s: float = 0.0) -> bool:
        """Read what there is, waiting for it for `timeout_s`, if nobody else leads. Return whether nobody did.

        One who stands in for others leaves the lead to whoever has asked like this, for the next time.
        """
        if not self._lead.acquire(blocking=False):
            if self._stands_in:
                self._stands_in = False
                self.nudge()
            return False
        self.leads += 1
        self._thread = threading.get_ident()
        try:
            self._turn(timeout_s)
        finally:
            self._pass_on()
        return True

    def stand_in(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Lead until `ready()`, for `timeout_s` at most, or until somebody waits who can do it instead."""
        if self._lead.acquire(blocking=False):
            self._stands_in = True
            self._lead_until(
                lambda: not self._stands_in or bool(self._followers) or ready(), time.monotonic() + timeout_s
            )

    def _lead_until(self, ready: Callable[[], bool], deadline: float | None) -> None:
        self._thread = threading.get_ident()
        try:
            while not ready() and (deadline is None or time.monotonic() < deadline):
                self._turn(_slice(deadline))
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        self._thread = 0
        self._stands_in = False
        self._lead.release()
        if self._followers:
            with contextlib.suppress(IndexError):  # the only one has just gone
                self._followers.popleft().wake()

    def _follow(self, follow: Callable[[Waiter], bool] | None, deadline: float | None) -> None:
        waiter = Waiter()
        if follow is not None and not follow(waiter):
            return
        self._followers.append(waiter)
        if self._stands_in:
            self._stands_in = False
            self.nudge()
        if self._lead.locked():  # or it was passed on before we were there to take it
            waiter.sleep(_slice(deadline))
        with contextlib.suppress(ValueError):
            self._followers.remove(waiter)

    def _turn(self, timeout_s: float) -> None:
        """Wait for news, and have it worked in."""
        handlers = self._handlers
        for fd, _ in self._poller.poll(timeout_s):
            handler = handlers.get(fd)
            if handler is not None:
                handler()


def _slice(deadline: float | None) -> float:
    return SLICE_S if deadline is None else max(0.0, min(SLICE_S, deadline - time.monotonic()))


def _close(*descriptors: int) -> None:
    for fd in descriptors:
        os.close(fd)
