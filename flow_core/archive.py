"""Writing a tree's archive in parts that stay the same where the files do. Owns the format, not what goes into it.

An archive is a tar.gz of several gzip members, each of a few entries; which entries share one depends on their names
alone. So after a change only the parts of changed files differ: they are packed anew, and only they travel to a machine
that has an earlier archive of the tree. Beside an archive lies a list of its parts.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import stat
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

#: A part ends after an entry that is larger than this, and after every 16th by its name.
_LARGE_BYTES = 65536
_ONE_IN = 16

#: A file that was changed less than this before it was packed may have been changed once more in the same instant (s).
_RACY_S = 2.0


@dataclass(frozen=True)
class Entry:
    """A file, a folder, or a link (then `link` is where it leads)."""

    name: str
    status: os.stat_result
    link: str = ""

    @property
    def version(self) -> list[Any]:
        """What changes with the entry's content."""
        now = self.status
        return [self.name, self.link, now.st_mode, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]

    @property
    def settled(self) -> bool:
        """Whether its next change will show in its version."""
        return max(self.status.st_mtime, self.status.st_ctime) < time.time() - _RACY_S


@dataclass(frozen=True)
class Part:
    """A gzip member: `size` bytes, their SHA-256, and that of what it unpacks to."""

    sha256: str
    size: int
    digest: str


def write(
    top: str, entries: Sequence[Entry], folder: Path, content: Callable[[str, str], bytes]
) -> tuple[str, Path]:
    """Write the archive of a tree into `folder`: (SHA-256 that names its content, path).

    `content(top, name)` reads a file. What has not changed since the last archive of `top` here is taken from that one.
    """
    before, groups = _Last.read(folder, top), list(_groups(entries))
    unchanged = before.archive_of(groups)
    if unchanged is not None:
        return unchanged.name.partition(".")[0], unchanged
    descriptor, draft = tempfile.mkstemp(prefix=".packing-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file, before:
            parts = [_part(file, before, top, group, content) for group in groups]
            parts.append(_add(file, bytes(2 * tarfile.BLOCKSIZE)))
        digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
        path = folder / f"{digest}.tar.gz"
        _replace(_list_of(path), [[part.sha256, part.size] for part in parts])
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    _Last.write(folder, top, path, groups, parts)
    return digest, path


def parts_of(path: Path) -> list[tuple[str, int]] | None:
    """Return (SHA-256, size) of each part of an archive, in order; None for one that was not written here."""
    try:
        listed = json.loads(_list_of(path).read_text())
        parts = [(str(sha), int(size)) for sha, size in listed]
        return parts if sum(size for _, size in parts) == path.stat().st_size else None
    except (OSError, ValueError, TypeError):
        return None


def _list_of(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


def _replace(path: Path, value: Any) -> None:
    descriptor, draft = tempfile.mkstemp(prefix=".packing-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(value, file)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _groups(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in entries:
        group.append(entry)
        large = stat.S_ISREG(entry.status.st_mode) and entry.status.st_size > _LARGE_BYTES
        if large or zlib.crc32(os.fsencode(entry.name)) % _ONE_IN == 0:
            yield group
            group = []
    if group:
        yield group


def _part(
    file: BinaryIO, before: _Last, top: str, group: list[Entry], content: Callable[[str, str], bytes]
) -> Part:
    known = before.find(group)
    if known is not None:
        part, data = known
        file.write(data)
        return part
    return _add(file, b"".join(block for entry in group for block in _blocks(top, entry, content)))


def _add(file: BinaryIO, data: bytes) -> Part:
    # Level 1: three times faster than the default and a fifth larger.
    packed = gzip.compress(data, compresslevel=1, mtime=0)
    file.write(packed)
    return Part(hashlib.sha256(packed).hexdigest(), len(packed), hashlib.sha256(data).hexdigest())


def _blocks(top: str, entry: Entry, content: Callable[[str, str], bytes]) -> Iterator[bytes]:
    info = tarfile.TarInfo(entry.name)
    data = b""
    if entry.link:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link, 0o777
    elif stat.S_ISDIR(entry.status.st_mode):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    else:
        data = content(top, entry.name)
        info.size = len(data)
        info.mode = 0o755 if entry.status.st_mode & 0o111 else 0o644
    yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    yield data
    yield bytes(-len(data) % tarfile.BLOCKSIZE)


class _Last:
    """The archive that was made of a tree last time, and where its parts are in it."""

    def __init__(self, archive: Path | None, parts: Mapping[str, tuple[int, Part]]) -> None:
        self._archive = archive
        self._parts = parts
        self._file: BinaryIO | None = None

    @staticmethod
    def _place(folder: Path, top: str) -> Path:
        return folder / f".last-{hashlib.sha256(os.fsencode(top)).hexdigest()[:24]}"

    @classmethod
    def read(cls, folder: Path, top: str) -> _Last:
        """Return what is known; nothing where nothing is."""
        try:
            said = json.loads(cls._place(folder, top).read_text())
            parts = {key: (int(at), Part(*part)) for key, at, part in said["parts"]}
            return cls(folder / said["archive"], parts)
        except (OSError, ValueError, TypeError, KeyError):
            return cls(None, {})

    @classmethod
    def write(
        cls, folder: Path, top: str, archive: Path, groups: Sequence[list[Entry]], parts: Sequence[Part]
    ) -> None:
        """Remember an archive for the next time."""
        at, kept = 0, []
        for group, part in zip(groups, parts, strict=False):  # the last part is the end of the archive
            if all(entry.settled for entry in group):
                kept.append([cls._key(group), at, [part.sha256, part.size, part.digest]])
            at += part.size
        with contextlib.suppress(OSError):  # it only saves time
            _replace(cls._place(folder, top), {"archive": archive.name, "parts": kept})

    @staticmethod
    def _key(group: Sequence[Entry]) -> str:
        return hashlib.sha256(json.dumps([entry.version for entry in group]).encode()).hexdigest()

    def archive_of(self, groups: Sequence[Sequence[Entry]]) -> Path | None:
        """Return the archive where it holds exactly these entries as they are now; it is kept for longer then."""
        if self._archive is None or [*self._parts] != [self._key(group) for group in groups]:
            return None
        if parts_of(self._archive) is None:
            return None
        for path in (self._archive, _list_of(self._archive)):
            os.utime(path)
        return self._archive

    def find(self, group: Sequence[Entry]) -> tuple[Part, bytes] | None:
        """Return a part that holds exactly these entries as they are now."""
        known = self._parts.get(self._key(group)) if self._parts else None
        if known is None or self._file is None:
            return None
        at, part = known
        self._file.seek(at)
        data = self._file.read(part.size)
        return (part, data) if hashlib.sha256(data).hexdigest() == part.sha256 else None

    def __enter__(self) -> None:
        if self._archive is not None:
            with contextlib.suppress(OSError):
                self._file = open(self._archive, "rb")

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
