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
