"""A source tree as one archive, named by its content. Owns what is left out and what is too much.

Left out are the usual caches and environments, and what `.flowignore` files say, with the rules of .gitignore. The same
tree gives the same archive, whoever owns the files and whenever they were written.
"""

from __future__ import annotations

import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flow_core import archive
from flow_core.archive import Entry
from flow_core.errors import ValidationError
from flow_core.ignore import IgnoreFile

IGNORE_FILE = ".flowignore"
MAX_BYTES = 512 * 1024 * 1024
"""The most that the files of a tree may hold together, before compression."""
MAX_FILES = 50_000

_DEFAULTS = IgnoreFile(
    b"""
.git
.hg
.svn
__pycache__/
*.py[co]
.venv/
.tox/
.nox/
.eggs/
*.egg-info/
node_modules/
.mypy_cache/
.pytest_cache/
.ruff_cache/
.hypothesis/
.ipynb_checkpoints/
.DS_Store
"""
)
_KEPT_S = 24 * 3600.0
_LEAVE_OUT = (
    f"Leave out what the function does not need: one pattern a line in {IGNORE_FILE}, as in a .gitignore."
)


_Rules = tuple[tuple[str, IgnoreFile], ...]  # (folder of the file with its slash, rules), the nearest first


@dataclass(frozen=True)
class Bundle:
    """A packed tree."""

    sha256: str
    """Of what the archive unpacks to: of the names, the content and the executable bits."""
    path: Path
    """A tar.gz, kept for a day after the last pack of the same tree: copy it."""
    files: tuple[str, ...]
    """The paths inside, sorted; folders are not listed."""
    size_bytes: int
    """Of the files' content together."""


def pack(root: str | Path, into: str | Path | None = None, *, excludes: Iterable[str] = ()) -> Bundle:
    """Pack the tree at `root` into the folder `into` (a private one in the system's place for temporary files).

    `excludes` are lines as in an ignore file at the root; what they say goes before what any file says.

    Raises ValidationError for a root that is no folder, a file that cannot be read, a link that leads out of the tree,
    and a tree over `MAX_BYTES` or `MAX_FILES`, where the message names its largest folders.
    """
    top = os.path.realpath(root)
    if not os.path.isdir(top):
        raise ValidationError(
            f"code_root={str(root)!r} is no folder", suggestions=["Give the folder of your code."]
        )
    rules = IgnoreFile("\n".join(excludes).encode("utf-8", "surrogateescape"))
    entries = sorted(_walk(top, rules), key=lambda entry: os.fsencode(entry.name))
    folder = Path(into) if into is not None else _own_folder()
    folder.mkdir(parents=True, exist_ok=True)
    digest, path = archive.write(top, entries, folder, _content)
    files = [entry for entry in entries if not stat.S_ISDIR(entry.status.st_mode)]
    size = sum(entry.status.st_size for entry in files if not entry.link)
    return Bundle(digest, path, tuple(entry.name for entry in files), size)


def _walk(top: str, excludes: IgnoreFile) -> list[Entry]:
    """Return what is to be packed, in no order. Excluded folders are not entered."""
    pending: list[tuple[str, _Rules]] = [("", (("", _DEFAULTS),))]
    found: list[Entry] = []
    while pending and len(found) < 4 * MAX_FILES:  # somebody's home folder: enough is known
        folder, rules = pending.pop()
        items = _scanned(top, folder)
        if any(item.name == IGNORE_FILE and item.is_file() for item in items):
            rules = ((folder, IgnoreFile(_content(top, folder + IGNORE_FILE))), *rules)
        for entry in _kept(top, folder, items, (("", excludes), *rules)):
            found.append(entry)
            if stat.S_ISDIR(entry.status.st_mode):
                pending.append((entry.name + "/", rules))
    _check_limits([entry for entry in found if not stat.S_ISDIR(entry.status.st_mode)])
    return found


def _kept(top: str, folder: str, items: list[os.DirEntry[str]], rules: _Rules) -> Iterator[Entry]:
    for item in items:
        name = folder + item.name
        status = item.stat(follow_symlinks=False)
        is_folder = stat.S_ISDIR(status.st_mode)
        if _is_excluded(name, is_folder, rules):
            continue
        if stat.S_ISLNK(status.st_mode):
            yield Entry(name, status, _link(top, name))
        elif stat.S_ISREG(status.st_mode):
            yield Entry(name, status)
        elif is_folder and not os.path.exists(os.path.join(item.path, "pyvenv.cfg")):
            yield Entry(name, status)  # not a virtual environment, whatever its name


def _is_excluded(name: str, is_folder: bool, rules: _Rules) -> bool:
    for folder, ignore in rules:  # the nearest ignore file has the last word
        verdict = ignore.verdict(os.fsencode(name[len(folder) :]), is_folder=is_folder)
        if verdict is not None:
            return verdict
    return False


def _scanned(top: str, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(os.path.join(top, folder)) as items:
            return list(items)
    except OSError as error:
        raise _unreadable(folder.rstrip("/"), error) from error


def _content(top: str, name: str) -> bytes:
    try:
        with open(os.path.join(top, name), "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> ValidationError:
    return ValidationError(
        f"{name!r} in code_root cannot be read: {error.strerror or error}",
        suggestions=["Make it readable.", f"Leave it out: write /{name} into {IGNORE_FILE}."],
    )


def _link(top: str, name: str) -> str:
    """Return where a link inside the tree leads, relative to its own folder; raise where it leads out of the tree."""
    path = os.path.join(top, name)
    target, real = os.readlink(path), os.path.realpath(path)
    folder = os.path.dirname(name)
    if not f"{real}/".startswith(f"{top}/".replace("//", "/")):
        raise ValidationError(
            f"the link {name!r} leads out of code_root, to {target!r}",
            suggestions=[
                f"Leave it out: write /{name} into {IGNORE_FILE}.",
                "Replace it with a copy, or make its target a volume or a data mount of the task.",
            ],
        )
    inside = os.path.normpath(os.path.join(folder, target))
    if os.path.isabs(target) or inside == ".." or inside.startswith("../"):
        return os.path.relpath(real, os.path.realpath(os.path.dirname(path)))
    return target


def _check_limits(files: list[Entry]) -> None:
    size = sum(entry.status.st_size for entry in files)
    if size <= MAX_BYTES and len(files) <= MAX_FILES:
        return
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for entry in files:
        for folder in _folders_of(entry.name):
            sizes[folder] = sizes.get(folder, 0) + entry.status.st_size
            counts[folder] = counts.get(folder, 0) + 1
    weights = sizes if size > MAX_BYTES else counts
    largest = sorted(_heaviest(weights), key=lambda folder: -weights[folder])[:5]
    named = ", ".join(
        f"{folder} ({counts[folder]:,} files, {_megabytes(sizes[folder])})" for folder in largest
    )
    raise ValidationError(
        f"code_root is too large to upload: {len(files):,} files of {_megabytes(size)} together, and at most "
        f"{MAX_FILES:,} files of {_megabytes(MAX_BYTES)} can travel. The largest folders: {named or 'none'}",
        suggestions=[_LEAVE_OUT, "Keep data in a volume or a data mount, and pass its path."],
    )


def _folders_of(name: str) -> Iterator[str]:
    end = name.find("/")
    while end >= 0:
        yield name[: end + 1]
        end = name.find("/", end + 1)


def _heaviest(weights: dict[str, int]) -> list[str]:
    """The folders that say most: of a folder that holds little more than one folder, the inner one."""
    inner: dict[str, str] = {}
    for folder, weight in weights.items():
        parent = folder[: folder.rstrip("/").rfind("/") + 1]
        if parent and weight > 0.8 * weights[parent]:
            inner[parent] = folder
    chosen = []
    for folder in (name for name in weights if name.count("/") == 1):
        while folder in inner:
            folder = inner[folder]  # noqa: PLW2901 - step inside
        chosen.append(folder)
    return chosen


def _megabytes(size: int) -> str:
    return f"{size / (1024 * 1024):,.1f} MB"


def _own_folder() -> Path:
    """A folder of this user's alone, without the archives that nobody has asked for in a day."""
    folder = Path(tempfile.gettempdir()) / f"flow-gpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ValidationError(
            f"{folder} should be a folder that only you can use, and is not: code is packed there",
            suggestions=["Remove it, or set TMPDIR to a folder of your own."],
        )
    limit = time.time() - _KEPT_S
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < limit:
                path.unlink()
        except FileNotFoundError:
            continue  # another process has removed it
    return folder
