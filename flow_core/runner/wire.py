"""The wire of a warm session: a handshake that proves a shared key, then frames. Pure, but for the handshake's reads.

Both ends of a session use this file: the client, and the supervisor and the workers on the machine. Standard library
only, Python 3.8+.

Handshake, one line of JSON each way, before anything else is read:

    session  {"flow": 1, "nonce": …}
    client   {"flow": 1, "nonce": …, "proof": HMAC(key, "client" + both nonces), "role": …, …}
    session  {"ok": true, "proof": HMAC(key, "session" + both nonces), …}   or   {"ok": false, "error": …}

Frame: 20 bytes (`HEADER`: length of the body, kind, codec, `more`, number), then the body.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Tuple

    Frame = Tuple[int, int, int, int, bytes]

VERSION = 1
"""The version of the handshake and the frames. Each side refuses any other."""

HEADER = struct.Struct("<IBBxxIQ")
"""length, kind, codec, more, number: `more` is the definition of a CALL and the microseconds of a RESULT."""

MAX_FRAME_BYTES = 512 * 1024 * 1024
"""A frame that announces more is taken for garbage: larger values travel by reference."""

MAX_LINE_BYTES = 8192
"""The most that either side of a handshake may say."""

# -- what a client says to a worker
DEFINE = 1  # number: the definition's; body: one line of JSON, then the pickle
FORGET = 2  # number: the definition's
CALL = 3  # number: the call's; more: the definition's; body: a parcel of (args, kwargs)
CALL_WITH = 4  # the same, with one line of JSON (options, inputs) before the parcel
CREDIT = 5  # number: the call's; more: how many further items its generator may yield
KEEP = 6  # number: the call's; its outcome is to be written to the task's folder as well
STAY = 7  # number: the call's; its value, if it is large, is to be written there instead of being sent
# -- what a worker says to a client
RESULT = 16  # number: the call's; more: microseconds of the user's code; body: a parcel
ERROR = 17  # the same, but the body is an error record as JSON
ITEM = 18  # number: the call's; one value of its generator
RETURNED = 19  # number: the call's; it has not been started, and is the client's again
LOGGED = 20  # number: the call's; body: from where to where its output lies in the worker's log, as <QQ
STAYED = 21  # as RESULT, but the value is in the task's folder; body: where, as JSON (`parcels.STAYS`)
# -- what both say of shared memory
SEGMENT = 32  # number: the segment's; more: 0; a descriptor comes along with the frame's bytes
RELEASE = 33  # number: the segment's; the sender of this frame uses it no more
RETIRE = 34  # number: the segment's; its owner has given it up
# -- control, between a client and the supervisor: bodies are JSON
SAY = 48
BLOB = 49  # number: that of the SAY it belongs to; body: bytes


class ProtocolError(Exception):
    """The other side does not speak this protocol, or another version of it."""


def frame(kind: int, number: int, body: bytes = b"", codec: int = 0, more: int = 0) -> bytes:
    """Return one frame."""
    return HEADER.pack(len(body), kind, codec, more, number) + body


class Frames:
    """Cuts a byte stream into frames, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._missing = 0

    def cut(self, data: bytes) -> list[Frame]:
        """Return the frames that `data` completes, as (kind, codec, more, number, body). Raises ProtocolError."""
        if self._missing > 0:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return []
            data = b"".join(self._parts)
            self._parts.clear()
        frames = []
        at, size, unpack = 0, len(data), HEADER.unpack_from
        self._missing = 0
        while size - at >= 20:
            length, kind, codec, more, number = unpack(data, at)
            end = at + 20 + length
            if end > size:
                if length > MAX_FRAME_BYTES:
                    raise ProtocolError(f"a frame of {length:,} bytes; at most {MAX_FRAME_BYTES:,} are taken")
                self._missing = end - size
                break
            frames.append((kind, codec, more, number, data[at + 20 : end]))
            at = end
        if at < size:
            self._parts.append(data[at:])
            self._missing = self._missing or 20 - (size - at)
        return frames


# -- outcomes in files

CALLS_FOLDER = "calls"
"""Where outcomes lie that another process may ask for: files as `result`, named by client and number."""


def call_name(client: str, number: int) -> str:
    """Return the name under which the outcome of a client's call is kept: that of its file."""
    return f"{client}-{number}"


# -- the handshake


def nonce() -> str:
    """Return what makes one handshake different from every other."""
    import os

    return os.urandom(16).hex()


def proof(key: bytes, side: str, client_nonce: str, session_nonce: str) -> str:
    """Return what only a holder of the key can know."""
    import hmac

    return hmac.new(key, f"{side}|{client_nonce}|{session_nonce}".encode(), "sha256").hexdigest()


def proves(given: Any, key: bytes, side: str, client_nonce: str, session_nonce: str) -> bool:
    """Whether `given` is the other side's proof; the time that this takes tells nothing."""
    import hmac

    return isinstance(given, str) and hmac.compare_digest(
        given.encode(), proof(key, side, client_nonce, session_nonce).encode()
    )


def line(message: Any) -> bytes:
    """Return a message of the handshake."""
    import json

    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def parse_line(data: bytes) -> Any:
    """Return the message in one line. Raises ProtocolError for anything that is not a JSON object."""
    import json

    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise ProtocolError(f"no handshake: {data[:40]!r}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"no handshake: {data[:40]!r}")
    return message
