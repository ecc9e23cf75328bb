"""Brings to a session what its calls need before the first of them: its packages, and its folder from a storage.

Standard library only, Python 3.8+. A URL that is not a path needs fsspec on this machine.
"""

from __future__ import annotations

import os
import shutil

from . import installs, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

ENVS = "envs"
"""Beside the folder of the runners: what sessions have asked to be installed."""


class PackageNotFound(Exception):
    """The session's folder is not where it should be, or it is another one than was packed."""


def provide(folder: str, *, dependencies: Sequence[str], package: Mapping[str, str] | None) -> None:
    """Let this process import `dependencies`, and fill the working directory with `package`.

    After return the installed packages are on sys.path and the files in `<folder>/work`. Raises InstallFailed,
    PackageNotFound, unpack.BadArchive.
    """
    if dependencies:
        runners = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        # The lock stays open until this process ends: so long nobody removes the folder.
        installed, _ = installs.provide(dependencies, os.path.join(os.path.dirname(runners), ENVS))
        installs.activate(installed)
    if package is not None:
        _unpack(folder, package)


def _unpack(folder: str, package: Mapping[str, str]) -> None:
    archive = os.path.join(folder, "package.tar.gz")
    try:
        if "path" in package:
            _copy(package["path"], archive)
        else:
            _download(package["url"], archive)
        if _sha256(archive) != package["sha256"]:
            raise PackageNotFound(
                "{} is damaged: it is not the package that was uploaded. Remove it, and start again".format(
                    package.get("path") or package["url"]
                )
            )
        unpack.extract(archive, os.path.join(folder, "work"))
    finally:
        if os.path.exists(archive):
            os.unlink(archive)


def _copy(path: str, archive: str) -> None:
    try:
        shutil.copyfile(path, archive)
    except OSError as error:
        raise PackageNotFound(
            f"Package path not found: {path} cannot be read on {os.uname().nodename} ({error.strerror}). The package "
            "storage must be a folder on a file system that this machine shares with the one that uploads"
        ) from error


def _download(url: str, archive: str) -> None:
    """Read a URL in a process of its own: what fsspec loads and starts must not be in every worker."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        trouble = ""
        try:
            trouble = _downloaded(url, archive)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is told where the child was started
            trouble = f"{type(error).__name__}: {error}"
        finally:
            os.write(theirs, trouble.encode("utf-8", "replace")[:4000])
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        told = pipe.read().decode("utf-8", "replace")
    _, status = os.waitpid(pid, 0)
    if status != 0 or told:
        raise PackageNotFound(
            f"Package path not found: {url} cannot be read on {os.uname().nodename}: {told or 'the reader was killed'}"
        )


def _downloaded(url: str, archive: str) -> str:
    try:
        fsspec: Any = __import__("fsspec")
    except ImportError:
        return (
            "its Python has no fsspec. Name it among the dependencies, with what the URL needs (s3fs, gcsfs …), "
            "or use an image that has it"
        )
    system, path = fsspec.core.url_to_fs(url)
    system.get_file(path, archive)
    return ""


def _sha256(path: str) -> str:
    import hashlib

    known = hashlib.sha256()
    with open(path, "rb") as file:
        piece = file.read(1024 * 1024)
        while piece:
            known.update(piece)
            piece = file.read(1024 * 1024)
    return known.hexdigest()
