"""The way from triggers to their logs, which they share: who writes has to wait for room, or the event loop would.

A trigger's log line goes through a socket to Airflow's supervising process, and that takes 4 KiB of it in each pass of
its main loop, between queries to the database (Airflow 3.1 to 3.3). A write for which there is no room blocks the event
loop, and with it every trigger, for seconds. So triggers write in turn, and only while most of the socket is empty.
"""

from __future__ import annotations

import asyncio
import os
import select
import stat
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import structlog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_LOOK_S = 0.05


class Channel:
    """What the triggers of one event loop write their logs to. Without a descriptor there is always room."""

    def __init__(self, descriptor: int | None) -> None:
        self._turns = asyncio.Lock()
        self._poll: select.poll | None = None
        if descriptor is not None:
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLOUT)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[bool]:
        """Wait for one's turn and for room; yield whether that took long: then others wait too."""
        began = time.monotonic()
        async with self._turns:
            while not self._has_room():
                await asyncio.sleep(_LOOK_S)
            yield time.monotonic() - began > _LOOK_S

    def _has_room(self) -> bool:
        """Whether three quarters of the socket's buffer are free: that is what Linux calls writable."""
        return self._poll is None or bool(self._poll.poll(0))


def _descriptor() -> int | None:
    """Return the socket to which this process writes its logs, None where it writes them elsewhere."""
    file = getattr(structlog.get_config().get("logger_factory"), "io", None)
    try:
        number: int = file.fileno()  # type: ignore[union-attr]
        return number if stat.S_ISSOCK(os.fstat(number).st_mode) else None
    except (AttributeError, OSError, ValueError):
        return None


_channels: WeakKeyDictionary[asyncio.AbstractEventLoop, Channel] = WeakKeyDictionary()


def shared_channel() -> Channel:
    """Return the one of this event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _channels:
        _channels[loop] = Channel(_descriptor())
    return _channels[loop]
