"""The calls that a worker has read and not begun, and the thread that gives them back when the one before does not end.

While the worker's own thread is in the middle of a call that takes long, this one reads the connections in its place,
so that nothing lies behind that call: not in our memory, and not in the sockets. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import time
from collections import deque

from . import wire
from .streams import Gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .streams import Stream

_STUCK_S = 0.002
_SLOWEST_S = 0.02
_IDLE_TICKS = 100


class Chunk:
    """The items of a call that stands for many: one thread runs them, the other gives back those that are left."""

    def __init__(self, stream: Stream, number: int, items: list[Any]) -> None:
        self.stream = stream
        self.number = number
        self.size = len(items)
        self.items = iter(
            items
        )  # a list's, which both threads may use: what one has taken the other does not get
        self.done: list[Any] = []
        self._cutting = threading.Lock()

    def cut(self) -> None:
        """Give back what has not been begun, but never all of it: the first item is about to be."""
        with self._cutting:
            if operator.length_hint(self.items) == self.size:
                return
            taken = len(list(self.items))
            if taken:
                self.size -= taken
                self.stream.send(wire.frame(wire.RETURNED, self.number, more=self.size))

    def end(self) -> None:
        """Give nothing back from now on, and have told of what was given back: the outcome is sent next."""
        with self._cutting:
            for _ in self.items:
                pass


class Ahead:
    """What is to be run next. `begun` tells how many calls were begun, `running` whether one of them runs.

    `let_in` takes in further clients while a call takes long.
    """

    def __init__(
        self,
        streams: dict[int, Stream],
        note: Callable[[Stream, wire.Frame], None],
        begun: Callable[[], int],
        let_in: Callable[[], object],
    ) -> None:
        self.calls: deque[tuple[Stream, wire.Frame]] = deque()
        self.chunk: Chunk | None = None
        self.running = False
        self._streams = streams
        self._note = note
        self._begun = begun
        self._let_in = let_in
        self._reading = threading.Lock()
        self._watched = False
        self._wake = threading.Event()

    def start(self) -> None:
        """Begin to watch over calls that take long."""
        threading.Thread(target=self._watch, name="flow-ahead", daemon=True).start()

    def watch(self) -> None:
        """A call begins: have an eye on it."""
        if not self._watched:
            self._watched = True
            self._wake.set()

    def take_in(self, stream: Stream) -> None:
        """Read what has come over a connection. Raises Gone, ProtocolError."""
        with self._reading:
            if stream.broken:
                raise Gone
            self._read(stream)

    def drop(self, stream: Stream) -> None:
        """Forget the calls of a client that is gone."""
        for call in [one for one in list(self.calls) if one[0] is stream]:
            with contextlib.suppress(ValueError, IndexError):  # the other thread has just given it back
                self.calls.remove(call)

    def give_back(self) -> None:
        """Return all calls that have not been begun to their clients."""
        back: dict[Stream, list[bytes]] = {}
        while self.calls:
            try:
                stream, frame = self.calls.pop()
            except IndexError:  # the other thread has begun it
                break
            back.setdefault(stream, []).insert(0, wire.frame(wire.RETURNED, frame[3]))
        for stream, frames in back.items():
            stream.send(b"".join(frames))

    def _watch(self) -> None:
        idle, pause = 0, _STUCK_S
        seen: tuple[int, int] | None = None
        while True:
            self._wake.wait()
            time.sleep(pause)
            chunk = self.chunk
            now = (self._begun(), len(chunk.done) if chunk is not None else 0)
            if not self.running:
                idle += 1
            elif now == seen:
                idle = 0
                pause = min(_SLOWEST_S, pause * 1.2)
                self._relieve(chunk)
            else:
                idle, pause = 0, _STUCK_S
            seen = now
            if idle > _IDLE_TICKS:
                idle = 0
                self._wake.clear()
                self._watched = False
                if self.running or self.calls:  # a call began at this very moment
                    self.watch()

    def _relieve(self, chunk: Chunk | None) -> None:
        """Take over from the thread that is in the middle of a call."""
        if chunk is not None:
            chunk.cut()
        self._let_in()
        if self._reading.acquire(blocking=False):
            try:
                for stream in list(self._streams.values()):
                    if not stream.broken:
                        self._read_beside(stream)
            finally:
                self._reading.release()
        self.give_back()

    def _read_beside(self, stream: Stream) -> None:
        try:
            self._read(stream)
        except Gone:  # the worker's own thread sees it next, and forgets the client
            pass
        except wire.ProtocolError:
            stream.hang_up()  # so that it is seen there as well

    def _read(self, stream: Stream) -> None:
        for frame in stream.receive():
            if frame[0] in (wire.CALL, wire.CALL_WITH):
                self.calls.append((stream, frame))
            else:
                self._note(stream, frame)
