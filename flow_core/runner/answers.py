"""What a worker says of a call that has ended: its value or error, where its output lies, a copy for who asks later.

Standard library only, Python 3.8+.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys

from . import parcels, pickles, wire
from .execute import WIRE_VERSION, header_of, not_serializable
from .strict_json import JSON_LIMIT_BYTES, NotSerializable, are_exact, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .streams import Stream
    from .worker import Call

_RANGE = struct.Struct("<QQ")
_TAIL_BYTES = 4000
_NOTHING = b"null"


class Answers:
    """The answers of one worker process, whose output is the file that descriptor 1 leads to."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.pid = os.getpid()
        self.logged = os.fstat(1).st_size

    def record(self, error: BaseException) -> dict[str, Any]:
        """Return what a caller needs to know of an exception."""
        from . import error_record

        return error_record.record_of(error, self.folder)

    def encoded(
        self, stream: Stream, codec: int, value: Any, name: str, limit: int = JSON_LIMIT_BYTES
    ) -> tuple[int, bytes]:
        """Return a value as a parcel whose segments the client has. Raises NotSerializable."""
        packed, body = self._packed(stream, codec, value, name, limit)
        if len(body) > wire.MAX_FRAME_BYTES:
            most = f"at most {wire.MAX_FRAME_BYTES:,} can travel to a caller that shares no memory with its worker"
            raise NotSerializable(f"{name} takes {len(body):,} bytes; {most}")
        return packed, body

    @staticmethod
    def _packed(stream: Stream, codec: int, value: Any, name: str, limit: int) -> tuple[int, bytes]:
        if codec == parcels.JSON:
            head: bytes = _NOTHING if value is None else to_json(value, name, limit)
            if len(head) < parcels.LARGE_BYTES or stream.arena is None:
                return codec, head
            buffers: list[Any] = []
        elif codec == parcels.PLAIN or parcels.are_simple((value,)):
            head, buffers = pickle.dumps(value, 5), []
        elif parcels.is_simple((value,)):
            head, buffers = parcels.pickled(value, pickle.dumps)
        else:
            head, buffers = pickles.dumps_with_buffers(value, name)
        size = len(head) + sum(one.nbytes for one in buffers)
        if not buffers and (size < parcels.LARGE_BYTES or stream.arena is None):
            return codec, head
        arena = stream.arena if size >= parcels.LARGE_BYTES else None
        packed, body, segments = parcels.pack(codec, head, buffers, arena)
        stream.retire()
        for segment in segments:
            if not segment.told:
                stream.hand_over(segment)
        return packed, body

    def answer(self, call: Call, value: Any) -> BaseException | None:
        """Send a value; return the error when it cannot travel."""
        stream, number, codec, kind = call.stream, call.number, call.definition.codec, wire.RESULT
        try:
            written = self._keep(call, value) if stream.kept and number in stream.kept else None
            if call.many and codec == parcels.JSON and not value[1] and are_exact(value[0]):
                codec = parcels.PLAIN
            limit = (
                wire.MAX_FRAME_BYTES if call.many else JSON_LIMIT_BYTES
            )  # the items came at once for our sake
            codec, body = self.encoded(stream, codec, value, "result", limit)
            if number in stream.staying:
                stream.staying.discard(number)
                if len(body) >= parcels.STAY_BYTES:
                    written = written or self._keep(call, value)
                    if written is not None:
                        kind, codec, body = wire.STAYED, parcels.STAYS, json.dumps(written).encode()
        except NotSerializable as error:
            return not_serializable(error)
        except BaseException as error:  # noqa: BLE001 - memory, a full disk, an interrupt that came late
            return error
        stream.answer(kind, number, codec, body, more=call.micros, before=call.log)
        return None

    def answer_error(self, call: Call, error: BaseException, why: str) -> None:
        """Send how a call has failed, and `why` where it was ended from outside."""
        stream, number = call.stream, call.number
        message: dict[str, Any] = {"record": self.record(error)}
        if why:
            message["why"] = why
            message["record"]["message"] = f"the call {call.definition.name!r} {_how(why, call.timeout_s)}"
        if call.log:
            message["tail"] = self._tail(*_RANGE.unpack(call.log[-_RANGE.size :]))
        stream.staying.discard(number)
        if number in stream.kept:
            stream.kept.discard(number)
            header = {"v": WIRE_VERSION, "ok": False, "error": message["record"], "why": message.get("why")}
            self._store(wire.call_name(stream.client, number), json.dumps(header).encode() + b"\n", b"")
        body = json.dumps(message).encode()
        stream.answer(wire.ERROR, number, parcels.JSON, body, more=call.micros, before=call.log)

    def log_frame(self, number: int) -> bytes:
        """Say where the call's output lies in this worker's log; nothing where there is none."""
        for out in (sys.stdout, sys.stderr):
            try:
                out.flush()
            except (
                OSError,
                ValueError,
                AttributeError,
            ):  # a full disk; a stream that the user has closed or replaced
                continue
        size = os.fstat(1).st_size
        if size == self.logged:
            return b""
        before, self.logged = self.logged, size
        return wire.frame(wire.LOGGED, number, _RANGE.pack(before, size))

    @staticmethod
    def _tail(begin: int, end: int) -> str:
        try:
            with open("/proc/self/fd/1", "rb") as file:
                file.seek(max(begin, end - _TAIL_BYTES))
                return file.read(end - begin).decode("utf-8", "replace")
        except OSError:
            return ""

    def _keep(self, call: Call, value: Any) -> dict[str, Any] | None:
        """Write a value to the task's folder, for other calls and those who ask by the call's id.

        Return where it is, as `objects.Resolver` is told; None where it could not be written. Raises NotSerializable.
        """
        stream, name = call.stream, wire.call_name(call.stream.client, call.number)
        stream.kept.discard(call.number)
        if call.definition.codec == parcels.JSON:
            codec, data = "json", to_json(value, "result")
        else:
            codec, data = "pickle", b"".join(pickles.pieces(value, "result"))
        header = header_of(data, codec)
        if not self._store(name, json.dumps(header).encode() + b"\n", data):
            return None
        about = {one: header[one] for one in ("codec", "size", "sha256")}
        return {"uri": name, "file": f"{wire.CALLS_FOLDER}/{name}", "tail": True, **about}

    def _store(self, name: str, header: bytes, data: bytes) -> bool:
        folder = os.path.join(self.folder, wire.CALLS_FOLDER)
        path = os.path.join(folder, name)
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            with open(f"{path}.{self.pid}", "wb") as file:
                file.write(header)
                file.write(data)
            os.replace(f"{path}.{self.pid}", path)
        except OSError as error:
            sys.stderr.write(f"the outcome of call {name} could not be written: {error}\n")
            return False
        return True


def _how(why: str, limit_s: float | None) -> str:
    return (
        f"was stopped at its limit of {limit_s or 0:g} s"
        if why == "timeout"
        else "was cancelled while it ran"
    )
