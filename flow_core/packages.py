"""A `Runner`'s folder as a package: packed, and put into a storage that the workers read where one is set.

A package is named by its content, so what a worker gets is what was packed, whatever lies in the storage beside it. Its
name appears only when the whole of it is there. It stays, so that the next Runner of the same folder uploads nothing;
on a shared file system, what no Runner has asked for in `KEPT_S` is removed by the next upload.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flow_core import bundle
from flow_core.errors import ConfigError, ProviderUnavailable
from flow_core.models import SpecFile
from flow_core.providers.folder import ARCHIVE

KEPT_S = 30 * 86400.0

#: Left out beyond what stays out of every upload.
EXCLUDES = (".gitignore", "venv/")

_SHARED = "It must be a folder on a file system that the workers share, such as NFS."


@dataclass(frozen=True)
class Package:
    """A packed folder, and how it comes to the workers."""

    sha256: str
    """Of the archive."""
    files: tuple[SpecFile, ...]
    """What goes into the task's folder."""
    source: dict[str, str] | None
    """Where the worker gets it: `path` or `url`, and `sha256`; None where it is among `files`."""


def make(root: Path, *, name: str, storage: str | None, excludes: Iterable[str]) -> Package:
    """Pack the folder `root` and bring it to where the workers find it. Nothing is written into `root`.

    Raises ValidationError for a folder that cannot be packed, ConfigError for a storage that cannot be used,
    ProviderUnavailable where the storage failed.
    """
    archive = bundle.pack(root, excludes=(*EXCLUDES, *excludes)).path
    sha256 = _hash(archive)
    if storage is None:
        return Package(sha256, (SpecFile(name=ARCHIVE, path=archive),), None)
    target = f"{name}-{sha256}.tar.gz"
    if storage.startswith("file://"):
        path = _share(archive, Path(storage.removeprefix("file://")), target, sha256)
        return Package(sha256, (), {"path": str(path), "sha256": sha256})
    return Package(sha256, (), {"url": _upload(archive, storage, target), "sha256": sha256})


def _hash(path: Path) -> str:
    known = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1024 * 1024):
            known.update(piece)
    return known.hexdigest()


# -- a shared file system


def _share(archive: Path, folder: Path, name: str, sha256: str) -> Path:
    """Put the archive into the folder unless it is there, whole; return its path."""
    target = folder / name
    if not folder.is_dir():
        raise ConfigError(
            f"Storage directory does not exist: the package storage file://{folder} is no folder on this machine",
            suggestions=[f"Create it: mkdir -p {folder}", _SHARED],
        )
    try:
        if target.is_file() and _hash(target) == sha256:
            with contextlib.suppress(PermissionError):  # another user's
                os.utime(target)
            return target
        _sweep(folder)
        _copy(archive, target)
    except OSError as error:
        raise ConfigError(
            f"Storage directory is not writable: {target} could not be written: {error.strerror}",
            suggestions=["Give this user the right to write there, and free some space.", _SHARED],
        ) from error
    return target


def _copy(archive: Path, target: Path) -> None:
    descriptor, draft = tempfile.mkstemp(prefix=".new-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file, open(archive, "rb") as source:
            shutil.copyfileobj(source, file, 1024 * 1024)
            os.fchmod(file.fileno(), 0o644)  # the workers may be another user's
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        raise


def _sweep(folder: Path) -> None:
    """Remove packages that nobody has asked for in a long time, and what killed uploads have left."""
    limit = time.time() - KEPT_S
    for path in (*folder.glob(f"*-{'[0-9a-f]' * 64}.tar.gz"), *folder.glob(".new-*")):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if path.stat().st_mtime < limit:
                path.unlink()


# -- any other storage


def _upload(archive: Path, storage: str, name: str) -> str:
    """Put the archive under a URL unless it is there; return its address."""
    try:
        import fsspec
    except ImportError:
        raise ConfigError(
            f"the package storage {storage} needs fsspec, which is not installed",
            suggestions=["Install it: pip install 'flow-gpu[fsspec]'", "Use a file:// storage."],
        ) from None
    url = f"{storage}/{name}"
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a package that the protocol needs, or no such protocol
        raise ConfigError(f"the package storage {storage} cannot be used: {error}") from error
    try:
        if not (system.exists(path) and system.size(path) == archive.stat().st_size):
            draft = f"{path}.{secrets.token_hex(8)}"
            system.put_file(str(archive), draft)
            system.mv(draft, path)
    except Exception as error:
        raise ProviderUnavailable(
            f"the package could not be written to {url}: {type(error).__name__}: {error}",
            suggestions=["Look at the URL and at what this user may do there."],
        ) from error
    return url
