"""What tasks in a home folder print: one in pieces, or what many have had added. Standard library, Python 3.8+."""

from __future__ import annotations

import os

from .machine import Refused, existing


def read_log(home: str, task_id: str, node: int, offset: int, limit: int) -> tuple[bytes, int, bool]:
    """Return (up to `limit` bytes of a node's output, where to go on, whether nothing will follow)."""
    folder = existing(home, task_id)
    # Looked at first: what is written before the end is then in the file.
    final = os.path.exists(os.path.join(folder, "exit.json"))
    try:
        with open(os.path.join(folder, f"log.{int(node)}"), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = max(0, size + offset) if offset < 0 else offset
            file.seek(start)
            data = file.read(limit)
    except FileNotFoundError:
        return b"", max(0, offset), final
    return data, start + len(data), final and start + len(data) >= size


def read_logs(
    home: str, wanted: list[tuple[str, int, int]], limit: int
) -> list[tuple[bytes, int, bool] | None]:
    """Do `read_log` for many (task id, node, offset), None for unknown tasks: up to `limit` bytes, shared out.

    Only what has grown is opened.
    """
    grown = [_grown(home, *one) for one in wanted]
    parts = share([one[1] for one in grown], limit)
    return [
        _read(*one, part=part, offset=offset) if one[0] else None
        for one, part, (_, _, offset) in zip(grown, parts, wanted)
    ]


def _grown(home: str, task_id: str, node: int, offset: int) -> tuple[str, int, bool]:
    """Return (path of a log, the bytes after `offset`, whether no more will come); no path: there is no such task."""
    try:
        folder = existing(home, task_id)
    except Refused:
        return "", 0, True
    path = os.path.join(folder, f"log.{int(node)}")
    final = os.path.exists(os.path.join(folder, "exit.json"))  # first, as in `read_log`
    try:
        return path, max(0, os.stat(path).st_size - offset), final
    except FileNotFoundError:
        return path, 0, final


def _read(path: str, news: int, final: bool, *, part: int, offset: int) -> tuple[bytes, int, bool]:
    if not part:
        return b"", offset, final and not news
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(part)
    except FileNotFoundError:  # released meanwhile
        return b"", offset, final
    return data, offset + len(data), final and len(data) >= news


def share(sizes: list[int], limit: int) -> list[int]:
    """Part `limit` among what is wanted: the small ones get all, the large ones the same each, and none less than 1."""
    parts = [0] * len(sizes)
    hungry = sorted((size, index) for index, size in enumerate(sizes) if size)
    for count, (size, index) in zip(range(len(hungry), 0, -1), hungry):
        parts[index] = min(size, max(1, limit // count))
        limit -= parts[index]
    return parts
