"""Arguments to parcels, and parcels to values. Pure, but for the shared memory that large values are put into."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flow_core import payload
from flow_core.errors import FlowError, ResultError, SerializationError
from flow_core.futures import Future, HoldsFutures, writing
from flow_core.object_ref import ObjectRef, pickled_refs, revived
from flow_core.objects import NOTHING, Carried
from flow_core.runner import parcels, wire
from flow_core.runner.objects import MARK
from flow_core.runner.pickles import blame
from flow_core.runner.strict_json import NotSerializable, TooLarge, are_exact, to_json
from flow_core.streamed import Stream


class Encoded(NamedTuple):
    """The arguments of a call as they travel, and the futures among them.

    `paths` says where in the JSON the values of the futures belong; in a pickle their places are in the pickle itself.
    `many`: these are the items of a chunk, of which each is an argument ("one") or a list of them ("star"). `refs` are
    the references among them, and `carried` is what the worker needs to get their values.
    """

    codec: int
    body: bytes
    segments: Sequence[parcels.Segment] = ()
    inputs: Sequence[Future] = ()
    paths: Sequence[Sequence[Any]] = ()
    many: str = ""
    refs: Sequence[ObjectRef] = ()
    carried: Carried = NOTHING


_NAMES = b"\x93"  # STACK_GLOBAL, by which a pickle of protocol 4 and later names what is not a plain value

_MARK = MARK.encode()  # a glance at the written arguments shows whether there may be references among them

#: What the arguments of a call may take where no memory is shared; their frame has a head besides.
MOST_BYTES = wire.MAX_FRAME_BYTES - 1024 * 1024


TOO_LARGE = "too-large"


def too_large(name: str, size: int) -> SerializationError:
    """Return the error for arguments that no frame can hold."""
    return SerializationError(
        f"{payload.CANNOT_SERIALIZE} The arguments of {name!r} take {size:,} bytes, and at most {MOST_BYTES:,} can "
        "travel with a call to workers that share no memory with this process",
        suggestions=[
            "Store the value where the workers can open it and pass the reference: "
            "put(value, codec='pickle', storage='file:///shared/…').",
            "Pass it in parts, or have the function load it.",
        ],
        error_code=TOO_LARGE,
    )


NO_ARGUMENTS: Mapping[str, Encoded] = {
    "json": Encoded(parcels.JSON, b"[[],{}]"),
    "pickle": Encoded(parcels.PICKLE, pickle.dumps(((), {}), 5)),
}


def arguments(
    codec: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None, arena: parcels.Arena | None
) -> Encoded:
    """Write down the arguments of a call as they are now; large ones into segments of `arena`, where there is one.

    Raises SerializationError with the path of the first argument that cannot travel, ValidationError for a reference
    that is damaged.
    """
    if not args and not kwargs:
        return NO_ARGUMENTS[codec]
    if codec == "json":
        return _as_json(args, kwargs or {}, arena)
    if not kwargs and parcels.are_simple(args):
        body = pickle.dumps((tuple(args), {}), 5)
        if len(body) < parcels.LARGE_BYTES:
            return Encoded(parcels.PICKLE, body)
    return _as_pickle(args, kwargs or {}, arena)


def _as_json(args: Sequence[Any], kwargs: Mapping[str, Any], arena: parcels.Arena | None) -> Encoded:
    inputs: list[Future] = []
    paths: list[list[Any]] = []
    try:
        head = _json(args, kwargs)
    except NotSerializable as error:
        bare = _without_futures([list(args), dict(kwargs)], [], inputs, paths)
        if not inputs:
            raise SerializationError(f"{payload.CANNOT_SERIALIZE} {error}") from None
        try:
            head = _json(*bare)
        except NotSerializable as another:
            raise SerializationError(f"{payload.CANNOT_SERIALIZE} {another}") from None
    refs = _refs_in([list(args), dict(kwargs)]) if _MARK in head else ()
    if arena is None or len(head) < parcels.LARGE_BYTES:
        return Encoded(parcels.JSON, head, (), inputs, paths, refs=refs)
    return Encoded(*parcels.pack(parcels.JSON, head, (), arena), inputs, paths, refs=refs)


def _refs_in(value: Any) -> list[ObjectRef]:
    refs: list[ObjectRef] = []
    revived(value, refs)
    return refs


def _json(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    positional = to_json(list(args), "args")
    return b"[%s,%s]" % (positional, to_json(dict(kwargs), "kwargs") if kwargs else b"{}")


def _is_input(value: Any) -> bool:
    if isinstance(value, Stream):
        raise SerializationError(
            f"the generator {value.name!r} cannot be an argument: its values come one by one",
            suggestions=["Pass the list of them, future.result().", "Or return a list in place of them."],
        )
    return isinstance(value, Future)


def _without_futures(value: Any, path: list[Any], inputs: list[Future], paths: list[list[Any]]) -> Any:
    """Return a copy of lists, tuples and dicts with None in place of each future; note the futures and their places."""
    if _is_input(value):
        inputs.append(value)
        paths.append(path)
        return None
    if isinstance(value, dict):
        return {key: _without_futures(one, [*path, key], inputs, paths) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_futures(one, [*path, index], inputs, paths) for index, one in enumerate(value)]
    return value


def _as_pickle(args: Sequence[Any], kwargs: Mapping[str, Any], arena: parcels.Arena | None) -> Encoded:
    call = (tuple(args), dict(kwargs))
    inputs: list[Future] = []
    refs: list[ObjectRef] = []
    if parcels.is_simple(args) and (not kwargs or parcels.is_simple(kwargs.values())):
        head, buffers = parcels.pickled(call, pickle.dumps)
    else:
        head, buffers, refs = _pickled_with_refs(call, inputs)
    size = len(head) + sum(one.nbytes for one in buffers)
    if not buffers and (arena is None or size < parcels.LARGE_BYTES):
        return Encoded(parcels.PICKLE, head, (), inputs, refs=refs)
    packed = parcels.pack(parcels.PICKLE, head, buffers, arena if size >= parcels.LARGE_BYTES else None)
    return Encoded(*packed, inputs, refs=refs)


def items(codec: str, values: Sequence[Any], arena: parcels.Arena | None, *, star: bool) -> Encoded:
    """Write down the items of a chunk: each is the one argument of a call, or with `star` the list of all of them."""
    many = "star" if star else "one"
    refs: Sequence[ObjectRef] = ()
    buffers: list[Any] = []
    if codec == "json" and len(values) > 1 and not star and are_exact(values):
        head, plain = pickle.dumps(list(values), 5), parcels.PLAIN
    elif codec == "json":
        head, plain = _json_items(values), parcels.JSON
        refs = _refs_in(list(values)) if _MARK in head else ()
    else:
        simple = parcels.are_simple(values) if not star else all(map(parcels.is_simple, values))
        inputs: list[Future] = []
        if simple:
            head, buffers = parcels.pickled(values, pickle.dumps)
        else:
            head, buffers, refs = _pickled_with_refs(values, inputs, "items")
        plain = parcels.PICKLE
        if inputs:
            raise SerializationError("the items of a map cannot be futures: submit such calls one by one")
    size = len(head) + sum(one.nbytes for one in buffers)
    if not buffers and (arena is None or size < parcels.LARGE_BYTES):
        return Encoded(plain, head, many=many, refs=refs)
    packed = parcels.pack(plain, head, buffers, arena if size >= parcels.LARGE_BYTES else None)
    return Encoded(*packed, many=many, refs=refs)


def _json_items(values: Sequence[Any]) -> bytes:
    try:
        return to_json(list(values), "items")
    except NotSerializable as error:
        code = TOO_LARGE if isinstance(error, TooLarge) else None
        raise SerializationError(f"{payload.CANNOT_SERIALIZE} {error}", error_code=code) from None


def _pickled_with_refs(
    call: Any, inputs: list[Future], name: str = ""
) -> tuple[bytes, list[Any], list[ObjectRef]]:
    """Return a pickle, its buffers, and the references in it, of which each is an ObjectRef there."""
    head, buffers = _pickled(call, inputs, name)
    if _MARK not in head:
        return head, buffers, []
    with pickled_refs() as refs:  # those in the attributes of objects as well
        head, buffers = _pickled(revived(call, []), inputs, name)
    return head, buffers, refs


def _pickled(call: Any, inputs: list[Future], name: str = "") -> tuple[bytes, list[Any]]:
    from flow_core.pickler import dumps

    def place(value: Any) -> int | None:
        if not _is_input(value):
            return None
        if value not in inputs:
            inputs.append(value)
        return inputs.index(value)

    def dump(value: Any, *, protocol: int = 5, buffer_callback: Any = None) -> bytes:  # noqa: ARG001 - as pickle's
        try:
            return dumps(value, {}, buffer_callback=buffer_callback)[0]
        except HoldsFutures:
            return dumps(value, {}, buffer_callback=buffer_callback, persistent_id=place)[0]

    writing.arguments = True
    try:
        return parcels.pickled(call, dump)
    except FlowError:
        raise
    except Exception as error:
        parts = ((call, name),) if name else zip(call, ("args", "kwargs"), strict=True)
        for part, where in parts:
            try:
                dump(part)
            except Exception as cause:  # noqa: BLE001 - whatever a user's __reduce__ raises
                place_of = blame(part, where, cause, dump)
                raise SerializationError(f"{payload.CANNOT_SERIALIZE} {place_of}") from error
        raise SerializationError(f"{payload.CANNOT_SERIALIZE} {error}") from error
    finally:
        writing.arguments = False


def value(parcel: parcels.Parcel, codec: str, task_id: str) -> Any:
    """Return the value of a parcel that a worker has sent; a pickle only where `codec` says that one is expected."""
    plain = parcel.codec & ~parcels.PARTS
    if parcel.codec == parcels.PICKLE and codec == "pickle" and _NAMES not in parcel.body:
        return pickle.loads(parcel.body)  # noqa: S301 - with no name in it, it makes nothing but plain values
    if plain == parcels.PICKLE and codec != "pickle":
        raise ResultError("the worker sent a pickle where JSON was asked for", task_id=task_id)
    try:
        return parcels.loads(parcel, _unpickle)
    except Exception as error:
        raise ResultError(
            f"the result cannot be read here: {type(error).__name__}: {error}", task_id=task_id
        ) from error


def _unpickle(head: Any, buffers: Any) -> Any:
    return payload.Unpickler(io.BytesIO(head), buffers=buffers).load()


def outcome_of(future: Future) -> parcels.Parcel:
    """Return the value of a call that has ended, as it has arrived, or written down again where it has been read.

    Raises SerializationError where it was changed after that, and cannot travel any more.
    """
    parcel = future.parcel
    if parcel is not None:
        return parcel
    assert future.outcome is not None
    if future.definition is not None and future.definition.codec == "json":
        try:
            return parcels.Parcel(parcels.JSON, to_json(future.outcome[0], "result"))
        except NotSerializable as error:  # whoever read it has changed it
            raise SerializationError(f"{payload.CANNOT_SERIALIZE} {error}") from None
    head, buffers = _pickled(future.outcome[0], [], "result")
    if not buffers:
        return parcels.Parcel(parcels.PICKLE, head)
    packed, body, _ = parcels.pack(parcels.PICKLE, head, buffers, None)
    return parcels.Parcel(packed, body)


def outcome_file(future: Future) -> bytes:
    """Return the content of the file by which other processes know how a call has ended: as a task's `result`."""
    from flow_core.runner.execute import header_of

    if future.error is not None:
        return payload.encode_error(future.error)
    codec = future.definition.codec
    parcel = outcome_of(future)
    if parcel.codec & parcels.PARTS:
        whole = parcels.loads(parcel)
        body = to_json(whole, "result") if codec == "json" else pickle.dumps(whole, 5)
    else:
        body = bytes(parcel.body)
    return to_json(header_of(body, codec), "header") + b"\n" + body
