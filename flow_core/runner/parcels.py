"""Values as bytes and shared memory: what is small travels in the frame, what is large is mapped by both sides.

A parcel is (codec, body). A plain one is the JSON text or the pickle itself; PLAIN is a pickle of values that JSON has
as well, which is how the many small ones of a map travel. With STAYS the body says in JSON which file of the task's
folder holds the value, as `objects.Resolver` is told. A large one (codec | PARTS) begins with a table of its parts,
of which the first is the text or the pickle and the others are the pickle's out-of-band buffers; each part lies in the
body, or in a segment: a piece of anonymous memory that one side owns and both have mapped. A segment is used again once
the receiver has let go of every view on it, so a value that somebody still holds is never overwritten. Standard library
only, Python 3.8+.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
import struct
import threading
from collections import deque

from .strict_json import from_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

JSON, PICKLE, PLAIN, STAYS, PARTS = 1, 2, 3, 4, 0x80
"""Codec of a parcel; PARTS is a flag."""

LARGE_BYTES = 128 * 1024
"""From here on a value is worth a piece of shared memory."""

STAY_BYTES = 1024 * 1024
"""From here on a value is worth a file, where another call waits for it and no memory is shared."""

_PART = struct.Struct("<QQQ")  # segment number (0: in the body), offset, length
_COUNT = struct.Struct("<I")
_ALIGN = 64
_IDLE_LIMIT_BYTES = 512 * 1024 * 1024
_MAP = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # has a name since Python 3.10


def _closing(owner: Any, fd: int) -> None:
    """Have a descriptor closed when its owner is gone."""
    import weakref

    weakref.finalize(owner, os.close, fd).atexit = False


class Segment:
    """A piece of memory that its owner writes once per use and the other side reads.

    The first time it is written as a file: then the kernel need not clear the pages that it gives us, nor give us each
    by a page fault, which together take longer than the copy. From the second time on it is mapped. The memory goes
    when nobody here holds the segment, and nobody there has a view on it.
    """

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.told = False  # whether the other side has it
        self.fd = os.memfd_create(f"flow-{number}", os.MFD_CLOEXEC)
        _closing(self, self.fd)
        os.ftruncate(self.fd, size)
        self._written = False
        self._memory: mmap.mmap | None = None

    def write(self, parts: Sequence[memoryview], begins: Sequence[int]) -> None:
        """Write buffers of bytes to where they begin. Raises OSError where there is no memory."""
        if self._written and self._memory is None:
            self._memory = mmap.mmap(self.fd, self.size, flags=_MAP)
        for begin, part in zip(begins, parts):
            if self._memory is None:
                self._write_as_file(part, begin)
            else:
                self._memory[begin : begin + part.nbytes] = part
        self._written = True

    def _write_as_file(self, part: memoryview, at: int) -> None:
        while part:
            written = os.pwrite(self.fd, part, at)
            part, at = part[written:], at + written


class Arena:
    """The segments that one side of a stream owns: taken for one value, given back, used again. Thread-safe.

    At most `most` at a time: each costs two descriptors on either side, and a process may have few of them.
    """

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._free: list[Segment] = []
        self._used: dict[int, Segment] = {}
        self._number = 0
        self.retired: list[int] = []

    def write(self, parts: Sequence[memoryview]) -> tuple[Segment, list[int]] | None:
        """Write buffers of bytes into a segment; return it, and where each begins. None where there is no room."""
        *begins, size = itertools.accumulate(
            (-(-part.nbytes // _ALIGN) * _ALIGN for part in parts), initial=0
        )
        segment = self._take(max(size, 1))
        if segment is None:
            return None
        try:
            segment.write(parts, begins)
        except OSError:
            self.give_back(segment.number)
            return None
        return segment, begins

    def _take(self, size: int) -> Segment | None:
        with self._lock:
            fitting = [one for one in self._free if size <= one.size <= 4 * size + LARGE_BYTES]
            if fitting:
                segment = min(fitting, key=lambda one: one.size)
                self._free.remove(segment)
            elif len(self._used) >= self.most:
                return None
            else:
                if len(self._used) + len(self._free) >= self.most:
                    self._retire()
                self._number += 1
                try:
                    segment = Segment(self._number, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
                except OSError:  # no descriptor
                    return None
            self._used[segment.number] = segment
            return segment

    def _retire(self) -> int:
        oldest = self._free.pop(0)
        self.retired.append(oldest.number)
        return oldest.size

    def give_back(self, number: int) -> None:
        """The other side uses the segment no more. Segments beyond what is worth keeping are retired."""
        with self._lock:
            segment = self._used.pop(number, None)
            if segment is None:
                return
            self._free.append(segment)
            idle = sum(one.size for one in self._free)
            while idle > _IDLE_LIMIT_BYTES:
                idle -= self._retire()

    def close(self) -> None:
        """Give up all segments."""
        with self._lock:
            self._free.clear()
            self._used.clear()


class Mapped:
    """A segment of the other side's, mapped here. Its descriptor is kept for handing the segment on.

    One that is handed on (its number has the highest bit) is read by others too: what is written here stays here.
    """

    def __init__(self, number: int, fd: int) -> None:
        self.number = number
        self.fd = fd
        _closing(self, fd)
        access = mmap.ACCESS_COPY if number >> 63 else mmap.ACCESS_WRITE
        self.memory = mmap.mmap(fd, os.fstat(fd).st_size, access=access)
        self._window: Any = None

    def view(self, holds: Any) -> Any:
        """Return a writable view of all of it that holds `holds`, and so does all that is made of the view."""
        if self._window is None:
            import ctypes

            self._window = ctypes.c_ubyte * len(self.memory)  # a type, which takes longer to make than a view
        window = self._window.from_buffer(self.memory)
        window.holds = holds
        return memoryview(window).cast("B")


class Loan:
    """One use of a mapped segment. When the loan and every view made of it are gone, `returned` gets its number."""

    __slots__ = ("__weakref__", "mapped")

    def __init__(self, mapped: Mapped, returned: deque[int]) -> None:
        import weakref

        self.mapped = mapped
        weakref.finalize(self, returned.append, mapped.number).atexit = False

    def view(self) -> Any:
        """Return a writable view of the segment: what is made of it (a NumPy array) keeps the loan."""
        return self.mapped.view(self)


class Parcel:
    """An encoded value as it has arrived: decoded when somebody asks, forwarded without being decoded.

    `loans` are the segments its parts lie in, by number.
    """

    __slots__ = ("body", "codec", "loans")

    def __init__(self, codec: int, body: Any, loans: dict[int, Loan] | None = None) -> None:
        self.codec = codec
        self.body = body
        self.loans = loans

    def parts(self) -> tuple[Any, list[Any]]:
        """Return the text or pickle, and the out-of-band buffers, as buffers that keep their memory alive."""
        if not self.codec & PARTS:
            return self.body, []
        views = {number: loan.view() for number, loan in (self.loans or {}).items()}
        head, *buffers = [
            views[number][offset : offset + length] if number else self._copy(offset, length)
            for number, offset, length in table(self.body)
        ]
        return head, buffers

    def _copy(self, offset: int, length: int) -> memoryview:
        return memoryview(bytearray(memoryview(self.body)[offset : offset + length]))


def table(body: Any) -> list[tuple[int, int, int]]:
    """Return the parts of a parcel's body as (segment number, offset, length)."""
    (count,) = _COUNT.unpack_from(body)
    return [_PART.unpack_from(body, _COUNT.size + index * _PART.size) for index in range(count)]


def arrived(codec: int, body: bytes, mapped: dict[int, Mapped], returned: deque[int]) -> Parcel:
    """Return a value that has come, holding the segments that it lies in until `returned` gets their numbers."""
    if not codec & PARTS:
        return Parcel(codec, body)
    numbers = {number for number, _, _ in table(body) if number}
    return Parcel(codec, body, {number: Loan(mapped[number], returned) for number in numbers})


def pack(
    codec: int, head: Any, buffers: Sequence[Any], arena: Arena | None
) -> tuple[int, bytes, list[Segment]]:
    """Return (codec, body, segments taken) for an encoded value; with no room in an arena all of it is in the body."""
    parts = [memoryview(head).cast("B"), *buffers]
    written = None if arena is None else arena.write(parts)
    if written is None:
        return codec | PARTS, _inline(parts), []
    segment, begins = written
    entries = [_PART.pack(segment.number, at, part.nbytes) for at, part in zip(begins, parts)]
    return codec | PARTS, b"".join([_COUNT.pack(len(parts)), *entries]), [segment]


def _inline(parts: Sequence[Any]) -> bytes:
    at = _COUNT.size + len(parts) * _PART.size
    entries = [_COUNT.pack(len(parts))]
    for part in parts:
        entries.append(_PART.pack(0, at, part.nbytes))
        at += part.nbytes
    return b"".join([*entries, *parts])


def renumber(body: bytes, numbers: dict[int, int]) -> bytes:
    """Return the body of a parcel whose segments have other numbers on the stream that it goes to next."""
    entries = [
        _PART.pack(numbers.get(number, number), offset, length) for number, offset, length in table(body)
    ]
    return body[: _COUNT.size] + b"".join(entries) + body[_COUNT.size + len(entries) * _PART.size :]


def pickled(value: Any, dump: Callable[..., bytes]) -> tuple[bytes, list[Any]]:
    """Return a value's pickle and its out-of-band buffers; `dump` is `pickle.dumps` or its like."""
    buffers: list[Any] = []
    head = dump(value, protocol=5, buffer_callback=buffers.append)
    if not buffers:
        return head, buffers
    try:
        return head, [one.raw() for one in buffers]
    except BufferError:  # a strided array has no flat buffer
        return dump(value, protocol=5), []


_SIMPLE = frozenset((int, float, str, bytes, bool, type(None), complex))


def is_simple(values: Any) -> bool:
    """Whether every one of `values` is of a type that pickles the same everywhere, at the first glance."""
    for value in values:
        kind = type(value)
        if kind not in _SIMPLE and not (
            kind.__module__ == "numpy" and kind.__name__ == "ndarray" and not value.dtype.hasobject
        ):
            return False
    return True


def are_simple(values: Any) -> bool:
    """The same, faster for many values and without arrays."""
    return _SIMPLE.issuperset(map(type, values))


class Restricted(pickle.Unpickler):
    """Reads pickles of plain values, and runs nothing: whatever names something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse it."""
        raise pickle.UnpicklingError(f"{module}.{name} in a pickle of plain values")


def plain(data: bytes) -> Any:
    """Return what a pickle of plain values holds, whoever wrote it. Raises UnpicklingError for any other."""
    return Restricted(io.BytesIO(data)).load()


def loads(parcel: Parcel, unpickle: Callable[..., Any] = pickle.loads) -> Any:
    """Return the value of a parcel of either codec. `unpickle` is `pickle.loads` or its like."""
    if parcel.codec == JSON:
        return from_json(parcel.body)
    head, buffers = parcel.parts()
    if parcel.codec & ~PARTS == JSON:
        return from_json(bytes(head))
    if parcel.codec & ~PARTS == PLAIN:
        return plain(head)
    return unpickle(head, buffers=buffers)
