"""A call's way to a worker: the frames that ask for it, and the entries about it in the books of the worker's line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flow_core import encoding, losses
from flow_core.futures import SENT, Future
from flow_core.runner import wire

if TYPE_CHECKING:
    from flow_core.encoding import Encoded
    from flow_core.links import Line

_CALL_COST_US = 8.0
_CREDIT = 16


def frames(line: Line, future: Future) -> bytes:
    """Book a call on a line; return what is to be sent for it. Under the pool's lock. Raises SerializationError."""
    definition, encoded = future.definition, future.body
    codec, body, segments, inputs, _, many, refs, _ = encoded
    kind = wire.CALL
    if inputs or many or refs or future.kept or future.options.timeout_s is not None:
        kind = wire.CALL_WITH
        body = _with_options(line, future, encoded)  # may fail: nothing is booked yet
    data = b""
    if definition.number not in line.known:
        data = line.introduce(definition)
    for segment in segments:
        line.tell(segment)
    line.inflight[future.number] = future
    future.state, future.worker = SENT, line
    future.load = definition.estimate * future.count + _CALL_COST_US
    line.load += future.load
    if future.stays:
        data += wire.frame(wire.STAY, future.number)
    if definition.generator:
        data += wire.frame(wire.CREDIT, future.number, more=_CREDIT)
    return data + wire.frame(kind, future.number, body, codec, definition.number)


def _with_options(line: Line, future: Future, encoded: Encoded) -> bytes:
    more: dict[str, Any] = {
        "timeout_s": future.options.timeout_s,
        "kept": future.kept and not losses.may_fail(future),
        "many": encoded.many,
    }
    bodies: list[bytes | bytearray] = [encoded.body]
    if encoded.inputs or encoded.refs:
        values = [encoding.outcome_of(one) for one in encoded.inputs]
        bodies += [line.forward(one, future) for one in values]
        bodies += encoded.carried.values
        more["codecs"] = [one.codec for one in values]
        more["sizes"] = [len(one) for one in bodies]
        more["paths"] = encoded.paths
        more["objects"] = encoded.carried.listed
        if sum(more["sizes"]) > encoding.MOST_BYTES:
            raise encoding.too_large(future.name, sum(more["sizes"]))
    return json.dumps(more).encode() + b"\n" + b"".join(bodies)
