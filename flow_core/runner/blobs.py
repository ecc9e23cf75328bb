"""Blobs that are put together from parts of earlier ones: of an archive only what has changed travels.

Beside a blob lies the list of its parts, each with its SHA-256 and size. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Dict, List, Tuple

from . import machine, task
from .machine import Refused

Parts = List[List[Any]]
_Index = Dict[str, Tuple[str, int, int]]


def missing_blobs(home: str, shas: list[str]) -> list[str]:
    """Return those that are not here; the others are kept for a while longer."""
    absent = []
    for sha in shas:
        try:
            os.utime(machine.blob_path(home, sha))
        except FileNotFoundError:
            absent.append(sha)
    return absent


def keep_blob(home: str, sha: str, *, draft: str, offset: int, total: int, data: bytes) -> bool:
    """Store a piece of a blob, in any order; return True when it is whole, checked and there under its name.

    `draft` is the sender's own name for this transfer. Raises Refused (invalid) when the content is another one.
    """
    target = machine.blob_path(home, sha)
    machine.private(os.path.dirname(target))
    path = os.path.join(os.path.dirname(target), ".new-" + machine.inside(draft).replace("/", "_"))
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)
    if offset + len(data) < total:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    if digest.hexdigest() != sha:
        os.unlink(path)
        raise Refused("invalid", f"what arrived as {sha} has another content", ("Send it again.",))
    os.rename(path, target)
    return True


def missing_parts(home: str, parts: Parts) -> list[str]:
    """Return the SHA-256 of those parts that no blob here has, each once, in their order."""
    known = _index(home)
    return list(dict.fromkeys(sha for sha, _ in parts if sha not in known))


def _index(home: str) -> _Index:
    """Say for each known part where it is: (blob, offset, size)."""
    folder, index = os.path.join(home, "blobs"), {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        blob = os.path.join(folder, name[: -len(".parts")])
        if not name.endswith(".parts") or not os.path.exists(blob):
            continue
        at = 0
        for sha, size in (task.read_json(folder, name) or {}).get("parts", ()):
            index[sha] = (blob, at, size)
            at += size
    return index


def join_blob(home: str, sha: str, parts: Parts, patch: str) -> None:
    """Make the blob `sha` of its parts: those that were missing come one after the other in the blob `patch`.

    With `patch` the same as `sha` all of it is there, and only the list is written. Raises Refused (invalid) when the
    outcome is another one, because something here was changed: then send it whole.
    """
    target = machine.blob_path(home, sha)
    if patch != sha:
        _join(home, target, sha, parts, machine.blob_path(home, patch))
    draft = f"{target}.{os.urandom(6).hex()}"
    with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump({"parts": parts}, file)
    os.rename(draft, target + ".parts")


def _join(home: str, target: str, sha: str, parts: Parts, patch: str) -> None:
    index, at = _index(home), 0
    for part, size in parts:
        if part not in index:
            index[part] = (patch, at, size)
            at += size
    draft, whole = f"{target}.{os.urandom(6).hex()}", hashlib.sha256()
    try:
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            for part, _ in parts:
                data = _piece(*index[part])
                whole.update(data)
                file.write(data)
        if whole.hexdigest() != sha:
            raise Refused("invalid", f"the parts of {sha} make something else")
        os.rename(draft, target)
    finally:
        for path in (draft, patch):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass


def _piece(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
