"""Where objects are kept: a folder, or any storage that fsspec knows. Named by content, written whole or not at all.

    <root>/<lifetime>/<first two digits>/<sha256>.<codec>

`lifetime` is `for-ever`, or `for-<seconds>s` counted from the last time that the object was put; a rule of the bucket
can take it as a prefix. Only files with such names are ever read or removed: what else lies in the storage is not ours.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import re
import secrets
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from flow_core.errors import ConfigError, FlowError, ObjectError, ObjectNotFoundError, ProviderUnavailable
from flow_core.runner import objects as files
from flow_core.runner.execute import write_file
from flow_core.runner.machine import private
from flow_core.runner.pickles import PythonVersionMismatch

FOR_EVER = "for-ever"

_NAME = re.compile(r"(for-ever|for-[0-9]{1,12}s)/[0-9a-f]{2}/[0-9a-f]{64}\.(json|pickle|bytes)")
_DRAFT = re.compile(r"(for-ever|for-[0-9]{1,12}s)/[0-9a-f]{2}/\.new-[a-z0-9_]+")
# To make the folders there would be to make the bucket.
_WITHOUT_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"})
_DRAFT_S = 86400.0  # a put that still writes is younger


def lifetime_of(name: str) -> float | None:
    """Return how many seconds after its last put the object `name` is kept, None for ever."""
    lifetime = name.partition("/")[0]
    return None if lifetime == FOR_EVER else float(lifetime[len("for-") : -1])


class ObjectStorage(ABC):
    """One place for objects. `root` is its address, without a slash at the end."""

    root: str

    @abstractmethod
    def put(self, name: str, pieces: Iterable[Any]) -> None:
        """Write an object. After return it is there whole, as if put at this moment, however many put it at once."""

    @abstractmethod
    def open(self, name: str, size: int) -> AbstractContextManager[Any]:
        """The open file of an object. Raises ObjectNotFoundError, ObjectError where its size is another."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is fine."""

    @abstractmethod
    def clear(self, *, now: float, older_than_s: float | None) -> int:
        """Remove what is past its lifetime or, where given, was put longer ago than this; return how many objects."""

    @abstractmethod
    def path(self, name: str) -> Path | None:
        """Return the file of an object in this machine's file system, None where the storage is elsewhere."""


def storage_at(url: str, *, private: Path | None = None) -> ObjectStorage:
    """Return the storage with this address; at the folder `private` it is for its owner alone. Raises ConfigError."""
    if url.startswith("file://"):
        folder = Path(url.removeprefix("file://"))
        return FolderStorage(folder, is_private=folder == private)
    return FsspecStorage(url)


# -- a folder


class FolderStorage(ObjectStorage):
    """A folder: of one user's own, or on a file system that machines share."""

    def __init__(self, folder: Path, *, is_private: bool = False) -> None:
        self.folder = folder
        self.root = f"file://{folder}"
        self.is_private = is_private

    def path(self, name: str) -> Path:
        return self.folder / name

    def put(self, name: str, pieces: Iterable[Any]) -> None:
        target = self.path(name)
        try:
            self._make(target.parent)
            draft = target.parent / f".new-{secrets.token_hex(8)}"
            try:
                write_file(str(draft), pieces, 0o600 if self.is_private else 0o666)
                with self._lock():  # or `clear` would remove the new one for the age of the old one
                    os.replace(draft, target)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise ObjectError(
                f"the object could not be written to {target}: {error.strerror}",
                suggestions=["Free some space there, or set objects.storage to another place."],
            ) from error

    def _make(self, folder: Path) -> None:
        if self.is_private:
            private(str(folder))
        else:
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        fd = os.open(
            self.folder / ".lock",
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
            0o600 if self.is_private else 0o666,
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def open(self, name: str, size: int) -> Iterator[Any]:
        with told(f"{self.root}/{name}"):
            file = files.open_file(str(self.path(name)), size)
        with file:
            yield file

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def clear(self, *, now: float, older_than_s: float | None) -> int:
        removed = 0
        for path in self.folder.glob("for-*/[0-9a-f][0-9a-f]/*"):
            name = path.relative_to(self.folder).as_posix()
            if _NAME.fullmatch(name):
                limit_s = _shorter(lifetime_of(name), older_than_s)
            elif _DRAFT.fullmatch(name):  # of a put that was killed
                limit_s = _DRAFT_S
            else:
                continue
            if limit_s is not None and self._remove(path, now - limit_s):
                removed += _DRAFT.fullmatch(name) is None
        return removed

    def _remove(self, path: Path, limit: float) -> bool:
        """Remove a file that was written before `limit`, and nothing that has taken its place meanwhile."""
        with contextlib.suppress(FileNotFoundError), self._lock():
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mtime < limit:
                path.unlink()
                return True
        return False


def _shorter(one: float | None, other: float | None) -> float | None:
    given = [limit for limit in (one, other) if limit is not None]
    return min(given) if given else None


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Within this, what is wrong with a file is raised as an error of ours."""
    try:
        yield
    except files.ObjectMissing as error:
        raise ObjectNotFoundError(f"there is no object {what} any more") from error
    except (files.ObjectDamaged, PythonVersionMismatch) as error:
        raise ObjectError(f"the object {what} cannot be used: {error}") from error


# -- any other storage


class FsspecStorage(ObjectStorage):
    """Whatever fsspec reaches: S3, GCS, HDFS, SFTP …"""

    def __init__(self, url: str) -> None:
        self.root = url
        try:
            import fsspec
        except ImportError:
            raise ConfigError(
                f"the storage {url} needs fsspec, which is not installed",
                suggestions=["Install it: pip install 'flow-gpu[fsspec]'", "Use a file:// storage."],
            ) from None
        try:
            self.system, self.base = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:  # a package that the protocol needs, or no such protocol
            extra = ["Install it: pip install 'flow-gpu[s3]'"] if url.startswith("s3://") else []
            raise ConfigError(f"the storage {url} cannot be used: {error}", suggestions=extra) from error

    def put(self, name: str, pieces: Iterable[Any]) -> None:
        with tempfile.NamedTemporaryFile(prefix="flow-") as draft:
            write_file(draft.name, pieces)
            try:
                with self._asked(name):  # an object store shows an upload when it is complete
                    if self.root.partition("://")[0] not in _WITHOUT_FOLDERS:
                        self.system.makedirs(f"{self.base}/{name}".rpartition("/")[0], exist_ok=True)
                    self.system.put_file(draft.name, f"{self.base}/{name}")
            except ObjectNotFoundError as error:
                raise ConfigError(f"the storage {self.root} does not exist") from error

    @contextlib.contextmanager
    def open(self, name: str, size: int) -> Iterator[Any]:
        with self._asked(name):
            self.system.invalidate_cache()
            there = self.system.size(f"{self.base}/{name}")
            if there != size:
                raise ObjectError(f"the object {self.root}/{name} has {there:,} bytes in place of {size:,}")
            with self.system.open(f"{self.base}/{name}", "rb") as file:
                yield file

    def path(self, name: str) -> None:  # noqa: ARG002
        return None

    def delete(self, name: str) -> None:
        with contextlib.suppress(ObjectNotFoundError), self._asked(name):
            self.system.rm_file(f"{self.base}/{name}")

    def clear(self, *, now: float, older_than_s: float | None) -> int:
        removed = 0
        with self._asked(""):
            self.system.invalidate_cache()
            found = self.system.find(self.base, detail=True)
        for path, about in found.items():
            name = path[len(self.base) :].lstrip("/") if path.startswith(self.base) else ""
            limit_s = _shorter(lifetime_of(name), older_than_s) if _NAME.fullmatch(name) else None
            if limit_s is not None and self._put_at(path, about) < now - limit_s:
                self.delete(name)
                removed += 1
        return removed

    def _put_at(self, path: str, about: Mapping[str, Any]) -> float:
        known = (about.get(key) for key in ("LastModified", "last_modified", "updated", "mtime", "created"))
        when = next((one for one in known if one is not None), None) or self.system.modified(path)
        return when.timestamp() if isinstance(when, dt.datetime) else float(when)

    @contextlib.contextmanager
    def _asked(self, name: str) -> Iterator[None]:
        try:
            yield
        except FlowError:
            raise
        except FileNotFoundError as error:
            raise ObjectNotFoundError(f"there is no object {self.root}/{name} any more") from error
        except Exception as error:
            raise ProviderUnavailable(
                f"the storage {self.root} does not answer: {type(error).__name__}: {error}",
                suggestions=["Look at the address and at what this user may do there."],
            ) from error
