"""Unpacks uploaded code, and nothing that reaches outside its folder. Standard library only, Python 3.8+."""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib


class BadArchive(Exception):
    """The archive is damaged, or a member of it does not stay inside the folder."""


def extract(archive: str, into: str) -> None:
    """Unpack a tar.gz into the folder `into`, which may hold files already: those of the archive win.

    Afterwards every path of the archive is there with its executable bit, and nothing was written elsewhere. Raises
    BadArchive for a member with an absolute path or `..`, a link that leads outside, a hard link, a device or a pipe,
    and for an archive that is cut; OSError where the disk fails. Some members may be there then.
    """
    root = os.path.realpath(into)
    os.makedirs(root, exist_ok=True)
    links: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for member in packed:
                parts = _checked(member)
                if member.issym():
                    links.append(member)  # last, so that nothing is written through a link
                elif member.isdir():
                    _folder(root, parts)
                elif member.isreg():
                    _file(packed, member, _folder(root, parts[:-1]), parts[-1])
                else:
                    raise BadArchive(f"{member.name!r} is neither a file, a folder nor a symbolic link")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadArchive(f"{archive} is damaged: {error}") from error
    for member in links:
        _link(root, member)


def _checked(member: tarfile.TarInfo) -> list[str]:
    """Return the parts of the member's path. Raises BadArchive where it may lead out of the folder."""
    parts = member.name.split("/")
    if member.name.startswith("/") or "\0" in member.name or ".." in parts:
        raise BadArchive(f"{member.name!r} does not stay inside the folder")
    parts = [part for part in parts if part not in ("", ".")]
    if not parts and not member.isdir():
        raise BadArchive(f"{member.name!r} is no name for a file")
    return parts


def _folder(root: str, parts: list[str]) -> str:
    """Make the folder; return its path. What an earlier run has put in its way is removed."""
    path = root
    for part in parts:
        path = os.path.join(path, part)
        try:
            os.mkdir(path)
        except FileExistsError:
            if os.path.islink(path) or not os.path.isdir(path):
                os.unlink(path)
                os.mkdir(path)
    return path


def _file(packed: tarfile.TarFile, member: tarfile.TarInfo, folder: str, name: str) -> None:
    path = os.path.join(folder, name)
    _remove(path)
    mode = 0o755 if member.mode & 0o100 else 0o644
    source = packed.extractfile(member)
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode), "wb") as file:
        left = member.size
        while source is not None and left:
            data = source.read(min(left, 1024 * 1024))
            if not data:
                raise BadArchive(f"{member.name!r} is cut")
            file.write(data)
            left -= len(data)


def _link(root: str, member: tarfile.TarInfo) -> None:
    parts = _checked(member)
    path = os.path.join(_folder(root, parts[:-1]), parts[-1])
    _remove(path)
    os.symlink(member.linkname, path)
    if not (os.path.realpath(path) + os.sep).startswith(root.rstrip(os.sep) + os.sep):
        os.unlink(path)
        raise BadArchive(f"the link {member.name!r} leads out of the folder, to {member.linkname!r}")


def _remove(path: str) -> None:
    """Remove what an earlier run has left here."""
    if os.path.isdir(path) and not os.path.islink(path):
        import shutil

        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
