"""Values in files: how they are written, and how a call gets those that it was given by reference.

A file holds JSON text, plain bytes, or a pickle with its large buffers beside it, so that an array is written from
where it lies and read to where it stays:

    "FLOWPKL1" | Python major, minor | number of parts | length of each | the pickle | buffer | buffer …

each part at a multiple of 64. Only files that the call's envelope lists are opened, and nothing is used whose size or
SHA-256 is another. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import os
import stat
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any

    Buffer = Any  # bytes, bytearray or a flat memoryview

MARK = "flow/ref"
"""The key by which the JSON form of a reference is known."""

LARGE_BUFFER_BYTES = 64 * 1024
CHUNK_BYTES = 1024 * 1024

RESTORE = ("flow_core.object_ref", "restore")
"""What a pickled reference is made with; the value goes in its place."""

_MAGIC = b"FLOWPKL1"
_HEAD = struct.Struct("<8sBBxxI")
_LENGTH = struct.Struct("<Q")
_ALIGN = 64
_ANOTHER = "{} does not hold what was written: its hash is another"


class ObjectMissing(Exception):
    """A value that was given by reference is not there any more."""


class ObjectDamaged(Exception):
    """A value by reference is not what was written."""


# -- writing


def pickled(value: Any, dump: Callable[..., bytes]) -> list[Buffer]:
    """Return the pieces of a file for `value`; `dump` is `pickle.dumps` or its like. Large buffers are not copied."""
    large: list[Buffer] = []

    def stays_inside(buffer: Any) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < LARGE_BUFFER_BYTES:
            return True
        large.append(raw)
        return False

    head = dump(value, protocol=5, buffer_callback=stays_inside)
    parts = [head, *large]
    lengths = [len(part) for part in parts]
    table = _HEAD.pack(_MAGIC, sys.version_info[0], sys.version_info[1], len(parts))
    pieces: list[Buffer] = [table + b"".join(map(_LENGTH.pack, lengths))]
    for part in parts:
        pieces.append(bytes(-len(pieces[-1]) % _ALIGN))
        pieces.append(part)
    return pieces


def describe(pieces: Iterable[Buffer]) -> tuple[int, str]:
    """Return (size, SHA-256) of what the pieces are together."""
    from hashlib import sha256

    digest, size = sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()


# -- reading


def open_file(path: str, size: int, *, tail: bool = False) -> Any:
    """Open the file of a value at the value; with `tail` the value is its last bytes.

    Raises ObjectMissing, ObjectDamaged where it cannot hold a value of this size.
    """
    try:
        # Somebody may have put a pipe there: opening that would wait.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        raise ObjectMissing(f"{path} is not there any more") from None
    except OSError as error:
        raise ObjectDamaged(f"{path} cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    wrong = ""
    if not stat.S_ISREG(status.st_mode):
        wrong = "is no file"
    elif status.st_size < size or (status.st_size > size and not tail):
        wrong = f"has {status.st_size:,} bytes in place of {size:,}"
    if wrong:
        os.close(fd)
        raise ObjectDamaged(f"{path} {wrong}")
    os.lseek(fd, status.st_size - size, os.SEEK_SET)
    return open(fd, "rb", 0)


def read(file: Any, size: int, sha256: str, name: str) -> bytearray:
    """Return the next `size` bytes, hashed while they are read. Raises ObjectDamaged."""
    data = bytearray(size)
    view = memoryview(data)
    for _ in _read_into(lambda at: view[at : at + CHUNK_BYTES], file, size, sha256, name):
        pass
    return data


def mapped(file: Any, size: int, sha256: str, name: str) -> Any:
    """Return the whole file as memory that is not copied before it is written to. Raises ObjectDamaged.

    For a file that nobody can cut or change meanwhile: what is read later is what is there then.
    """
    import hashlib
    import mmap

    data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    with memoryview(data) as view:
        if hashlib.sha256(view).hexdigest() != sha256:
            raise ObjectDamaged(_ANOTHER.format(name))
    return data


def checked(file: Any, size: int, sha256: str, name: str) -> Iterator[Buffer]:
    """Yield the next `size` bytes in pieces, each good until the next. Raises ObjectDamaged, maybe at the end."""
    room = memoryview(bytearray(min(size, CHUNK_BYTES)))
    return _read_into(lambda at: room[: size - at], file, size, sha256, name)


def _read_into(room: Callable[[int], Any], file: Any, size: int, sha256: str, name: str) -> Iterator[Buffer]:
    import hashlib

    digest, at = hashlib.sha256(), 0
    while at < size:
        into = room(at)
        count = file.readinto(into)
        if not count:
            raise ObjectDamaged(f"{name} is cut: {at:,} of {size:,} bytes are there")
        digest.update(into[:count])
        yield into[:count]
        at += count
    if digest.hexdigest() != sha256:
        raise ObjectDamaged(_ANOTHER.format(name))


def is_container(data: Buffer) -> bool:
    """Whether a pickle comes with its buffers beside it."""
    return bytes(data[: len(_MAGIC)]) == _MAGIC


def unpickled(
    data: Buffer, loads: Callable[..., Any], before_code: Callable[[], object] | None = None
) -> Any:
    """Return the value of a pickle, in a container or plain. Writable data gives arrays that can be written to.

    `before_code` is called where the pickle holds functions or classes by value. Raises ObjectDamaged,
    PythonVersionMismatch.
    """
    if not is_container(data):
        return loads(data)
    try:
        _, major, minor, count = _HEAD.unpack_from(data)
        at = _HEAD.size + count * _LENGTH.size
        if at > len(data) or not count:
            raise ObjectDamaged(f"a pickle of {count:,} parts does not fit into {len(data):,} bytes")
        lengths = [_LENGTH.unpack_from(data, _HEAD.size + index * _LENGTH.size)[0] for index in range(count)]
    except struct.error as error:
        raise ObjectDamaged(f"the pickle is cut: {error}") from None
    view, parts, begin = memoryview(data), [], at + -at % _ALIGN
    for length in lengths:
        at += -at % _ALIGN
        parts.append(view[at : at + length])
        at += length
    if at != len(data):
        raise ObjectDamaged(f"the parts of the pickle take {at:,} bytes, and there are {len(data):,}")
    if data.find(b"cloudpickle", begin, begin + lengths[0]) >= 0:
        if (major, minor) != sys.version_info[:2]:
            from .pickles import PythonVersionMismatch

            raise PythonVersionMismatch(
                f"the value holds functions or classes of Python {major}.{minor}, and this is Python "
                "{}.{}.{} ({})".format(*sys.version_info[:3], sys.executable)
            )
        if before_code is not None:
            before_code()
    return loads(parts[0], buffers=parts[1:])


# -- in a call


class Resolver:
    """The values that a call was given by reference: those that its envelope lists, and no others.

    Each is a dict with `uri`, `sha256`, `size`, `codec`, and `file` (in the task's folder), `path` (on this machine) or
    `part`, by which its bytes stand in `sent`: the sender has checked those. With `tail` the value is the last bytes of
    the file. A value is loaded once, when it is first needed.
    """

    def __init__(self, folder: str, listed: Sequence[dict[str, Any]], sent: Sequence[Buffer] = ()) -> None:
        self._folder = folder
        self._sent = sent
        self._listed = {(one["uri"], one["sha256"]): one for one in listed}
        self._values: dict[tuple[str, str], Any] = {}

    def in_json(self, value: Any) -> Any:
        """Return `value`, as JSON gives it, with the values in place of the references."""
        if isinstance(value, dict):
            if MARK in value:
                return self.value(value)
            return {key: self.in_json(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.in_json(part) for part in value]
        return value

    def loads(self, data: Buffer, **options: Any) -> Any:
        """Unpickle with the values in place of the references."""
        return _loads(data, self.value, **options)

    def value(self, mark: dict[str, Any]) -> Any:
        """Return the value that a reference stands for; one that is not listed stays as it is.

        Raises ObjectMissing, ObjectDamaged.
        """
        key = (mark.get("uri"), mark.get("sha256"))
        one = self._listed.get(key)
        if one is None:
            return mark
        if key not in self._values:
            self._values[key] = self._load(one)  # type: ignore[index]
        return self._values[key]  # type: ignore[index]

    def _load(self, one: dict[str, Any]) -> Any:
        if "part" in one:
            return self._decoded(one["codec"], bytearray(self._sent[one["part"]]))
        path = one["path"] if "path" in one else os.path.join(self._folder, one["file"])
        try:
            with open_file(path, one["size"], tail=one.get("tail", False)) as file:
                # What lies in the task's own folder is there, unchanged, for as long as the task runs.
                own = "file" in one and one["size"] > CHUNK_BYTES and file.tell() == 0
                data = (mapped if own else read)(file, one["size"], one["sha256"], path)
            return self._decoded(one["codec"], data)
        except (ObjectMissing, ObjectDamaged) as error:
            raise type(error)("the value of the reference {}: {}".format(one["uri"], error)) from None

    def _decoded(self, codec: str, data: Buffer) -> Any:
        if codec == "bytes":
            return bytes(data)
        if codec == "json":
            from .strict_json import from_json

            return from_json(bytes(data), nan=True)
        # A reference inside a value is data like any other.
        return unpickled(data, lambda head, **rest: _loads(head, dict, **rest), self._import_cloudpickle)

    def _import_cloudpickle(self) -> None:
        from .pickles import CLOUDPICKLE_ZIP

        if "cloudpickle" not in sys.modules:
            sys.path.insert(0, os.path.join(self._folder, CLOUDPICKLE_ZIP))
            __import__("cloudpickle")
            del sys.path[0]


def _loads(data: Buffer, restore: Callable[[dict[str, Any]], Any], **options: Any) -> Any:
    import io

    from .pickles import Unpickler as Base

    class Unpickler(Base):
        def find_class(self, module: str, name: str) -> Any:
            return restore if (module, name) == RESTORE else super().find_class(module, name)

    return Unpickler(io.BytesIO(data), **options).load()
