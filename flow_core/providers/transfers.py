"""Files to and from a machine, over a transport: in pieces, whole or not at all, and only what is not there; logs."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from flow_core import archive
from flow_core.errors import ValidationError
from flow_core.models import LogChunk, LogPosition
from flow_core.providers import folder as folders
from flow_core.providers.transport import Transport

_FIRST_PIECE, _LARGEST_PIECE = 1 << 18, 1 << 22


def fetch_file(transport: Transport, path: str, into: Path) -> None:
    """Copy a file from there, whole or not at all. Raises ResourceNotFoundError, ProviderUnavailable."""
    with folders.drafted(into) as draft, open(draft, "wb") as file:
        offset, same, limit = 0, "", _FIRST_PIECE
        while True:
            begun = time.monotonic()
            answer = transport.call("read", {"path": path, "offset": offset, "limit": limit, "same": same})
            file.write(answer.data)
            offset, same = offset + len(answer.data), answer.value["same"]
            if offset >= answer.value["size"] or not answer.data:
                return
            limit = _next_piece(limit, time.monotonic() - begun)


def read_logs(
    transport: Transport, home: str, wanted: Sequence[LogPosition], limit: int
) -> dict[LogPosition, LogChunk]:
    """Do `Provider.read_logs` for tasks of one home. Raises ProviderUnavailable."""
    answer = transport.call("read_logs", {"home": home, "wanted": wanted, "limit": limit})
    chunks = {at: LogChunk(data=b"", next_offset=at.offset, end=False) for at in wanted}
    for index in answer.value["lost"]:
        del chunks[wanted[index]]
    begin = 0
    for index, size, end in answer.value["news"]:
        at, data = wanted[index], answer.data[begin : begin + size]
        chunks[at] = LogChunk(data=data, next_offset=at.offset + size, end=end)
        begin += size
    return chunks


def send_blob(transport: Transport, home: str, sha: str, source: Path | bytes) -> None:
    """Store content on the machine under its SHA-256. Raises ProviderUnavailable, ValidationError."""
    data = source if isinstance(source, bytes) else None
    total = len(data) if data is not None else Path(str(source)).stat().st_size
    draft, offset, limit = f"{sha[:16]}-{secrets.token_hex(8)}", 0, _FIRST_PIECE
    file = None if data is not None else open(str(source), "rb")  # noqa: SIM115 - closed below
    try:
        while True:
            begun = time.monotonic()
            piece = file.read(limit) if file is not None else (data or b"")[offset : offset + limit]
            args = {"home": home, "sha": sha, "draft": draft, "offset": offset, "total": total}
            if transport.call("keep_blob", args, data=piece, deadline_s=60.0).value:
                return
            offset += len(piece)
            limit = _next_piece(limit, time.monotonic() - begun)
    finally:
        if file is not None:
            file.close()


def send_archive(transport: Transport, home: str, sha: str, path: Path) -> None:
    """Store an archive on the machine under its SHA-256: of one whose tree it has seen before, the parts that changed.

    Raises ProviderUnavailable, ValidationError.
    """
    parts = archive.parts_of(path)
    if parts is None:
        send_blob(transport, home, sha, path)
        return
    order = {"home": home, "sha": sha, "parts": parts}
    missing = set(transport.call("missing_parts", {"home": home, "parts": parts}).value)
    if sum(size for part, size in parts if part in missing) < 0.7 * path.stat().st_size:
        patch = _cut_out(path, parts, missing)
        name = hashlib.sha256(patch).hexdigest()
        send_blob(transport, home, name, patch)
        with contextlib.suppress(ValidationError):  # something there was changed or swept: it is sent whole
            transport.call("join_blob", {**order, "patch": name}, deadline_s=60.0)
            return
    send_blob(transport, home, sha, path)
    transport.call("join_blob", {**order, "patch": sha})


def _cut_out(path: Path, parts: Sequence[tuple[str, int]], wanted: set[str]) -> bytes:
    """Return the wanted parts of a file, each once, one after the other."""
    left, pieces = set(wanted), []
    with open(path, "rb") as file:
        for part, size in parts:
            data = file.read(size)
            if part in left:
                left.discard(part)
                pieces.append(data)
    return b"".join(pieces)


def _next_piece(limit: int, took_s: float) -> int:
    """Larger pieces where they travel fast; small ones where a large one would hold up the signs of life."""
    return min(limit * 2, _LARGEST_PIECE) if took_s < 0.2 else max(limit // 2, 1 << 16)
