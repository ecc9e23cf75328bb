"""The wire format: a call to bytes, and bytes to a value or an error. Pure: no files, no network, no clock.

call.json   {"v": 1, "kind": "file", "module": "train.py", "function": "f", "codec": "json", "args": […], "kwargs": {…}}
            and "inputs": […], the values that it gets by reference; "by_reference": true, if its own may be large
result      {"v": 1, "ok": true, "codec": "json", "size": 11, "sha256": "…"} newline, the value's bytes
            {…, "file": "result.data"} newline, where the value is large: it lies in that file
            {…, "codec": "pickle", "not_json": "…"} newline, where JSON was asked for and cannot carry the value
            {"v": 1, "ok": false, "error": {"type": "ValueError", "message": …, "traceback": …, "cause": …}} newline
            and "why", a word of `ENDINGS`, where no fault of the function has ended a call of a session

The other end is `flow_core.runner.execute`; the JSON rules of both ends are `flow_core.runner.strict_json`.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flow_core.errors import (
    CallCancelledError,
    CallTimeoutError,
    PythonVersionMismatchError,
    ResultError,
    SerializationError,
    TaskExecutionError,
    TaskOutOfMemoryError,
    ValidationError,
    WorkerDiedError,
    remote_error,
)
from flow_core.runner.execute import DATA_FILE, WIRE_VERSION, sha256_hex
from flow_core.runner.objects import unpickled
from flow_core.runner.strict_json import JSON_LIMIT_BYTES, NotSerializable, from_json, to_json

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flow_core.errors import TaskErrorFields

CANNOT_SERIALIZE = "Cannot serialize arguments. Save to disk and pass path."

# What the runner itself raises, by the name of the class in the record: the user's function is not to blame.
_RESULT_ERRORS = frozenset({"ResultTooLarge", "ResultNotSerializable"})
_REFUSALS = {
    "WireVersionMismatch": TaskExecutionError,
    "PythonVersionMismatch": PythonVersionMismatchError,
    "ObjectMissing": TaskExecutionError,
    "ObjectDamaged": TaskExecutionError,
    "InstallFailed": TaskExecutionError,
    "PackageNotFound": TaskExecutionError,
}
#: How a call can end that is no fault of the function: the word for it in a file, and the error that it is.
ENDINGS: Mapping[str, type[TaskExecutionError]] = {
    "cancelled": CallCancelledError,
    "timeout": CallTimeoutError,
    "lost": WorkerDiedError,
    "out-of-memory": TaskOutOfMemoryError,
    "python": PythonVersionMismatchError,
    "result": ResultError,
}
_ENDING_FIELDS = ("exit_code", "signal", "reason", "log_tail", "suggestions")
_RUNNER_MODULES = frozenset({"execute", "installs", "objects", "pickles", "provision"})


def encode_call(
    module: str,
    function: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    codec: Literal["json", "pickle"] = "json",
) -> bytes:
    """Return the `call.json` that calls `function` of the file or dotted `module` in the work folder.

    `codec` is that of its value. Raises SerializationError with the path of the first argument that JSON cannot carry
    unchanged (tuples become lists), also when all of them take more than `JSON_LIMIT_BYTES`.
    """
    if not isinstance(args, (list, tuple)):
        raise ValidationError(f"args={args!r} is no list", suggestions=["Write args=[value]."])
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ValidationError(f"kwargs={kwargs!r} is no dict", suggestions=["Write kwargs={'name': value}."])
    try:
        positional, named = to_json(list(args), "args"), to_json(dict(kwargs or {}), "kwargs")
    except NotSerializable as error:
        raise SerializationError(f"{CANNOT_SERIALIZE} {error}") from None
    size = len(positional) + len(named)
    if size > JSON_LIMIT_BYTES:
        raise SerializationError(
            f"{CANNOT_SERIALIZE} args and kwargs take {size:,} bytes as JSON; at most {JSON_LIMIT_BYTES:,} can travel"
        )
    head: dict[str, Any] = {
        "v": WIRE_VERSION,
        "kind": "file",
        "module": module,
        "function": function,
        "codec": codec,
    }
    return b'%s,"args":%s,"kwargs":%s}' % (to_json(head, "call")[:-1], positional, named)


def decode_result(data: bytes, *, allow_pickle: bool = False, **fields: Unpack[TaskErrorFields]) -> Any:
    """Return the value in the content of a `result` file.

    `fields` (task_id, exit_code, log_tail …) go into the errors. Raises RemoteExecutionError, also an instance of the
    function's own exception class, where the function raised; ResultError where the value could not travel, is
    damaged, or is a pickle and the caller did not allow that; TaskExecutionError where the call was refused
    (PythonVersionMismatchError: by another Python).
    """
    about = describe_result(data, **fields)
    if about.codec == "pickle" and not allow_pickle:
        if about.not_json:
            raise _pickled(about.not_json, fields, *_WHERE_KEPT)
        raise _pickled(
            "the result is a pickle, and unpickling it may run code from the machine that wrote it",
            fields,
            'Pass serialization="pickle" if you trust that machine.',
        )
    _, body = _opened(data, fields)
    if len(body) != about.size:
        raise _result_error(f"the result is damaged: {len(body):,} of {about.size} bytes are there", fields)
    if sha256_hex(body) != about.sha256:
        raise _result_error("the result is damaged: its bytes are not those that were written", fields)
    try:
        return decode(about.codec, bytearray(body))  # arrays in it are the caller's own, to write to
    except Exception as error:
        raise _result_error(
            f"the result cannot be read here: {type(error).__name__}: {error}", fields
        ) from error


class About(NamedTuple):
    """What the header of a result says of the value. `file` is where it lies, None where it follows the header.

    `not_json` is why a value is a pickle although JSON was asked for, "" elsewhere.
    """

    codec: str
    size: int
    sha256: str
    file: str | None
    not_json: str = ""


#: The `error_code` of a ResultError that leaves the value where it is, to be collected in another way.
RESULT_PICKLED, RESULT_TOO_LARGE = "result-pickled", "result-too-large"

#: What can be done about a value that JSON cannot carry, once it is there.
_WHERE_KEPT = (
    "The value is kept with its task as a pickle. If you trust the machine that wrote it, collect it with "
    'serialization="pickle".',
    "Or take it by reference: task.ref().",
)


def describe_result(data: bytes, **fields: Unpack[TaskErrorFields]) -> About:
    """Return what the content of a `result` file says of its value. Raises what `decode_result` raises."""
    header, _ = _opened(data, fields)
    if not header["ok"]:
        raise _failure_in(header, fields)
    codec, size = header.get("codec"), header.get("size")
    if codec not in ("json", "pickle"):
        raise _result_error(f"the result is encoded as {codec!r}, which is not known here", fields)
    if type(size) is not int or header.get("file") not in (None, DATA_FILE):
        raise _result_error(f"the result file is damaged: its header is {str(header)[:300]}", fields)
    return About(codec, size, str(header.get("sha256")), header.get("file"), str(header.get("not_json", "")))


def decode(codec: str, data: bytes | bytearray) -> Any:
    """Return the value that a file of this codec holds. Raises whatever its pickle raises."""
    if codec == "json":
        return from_json(bytes(data), nan=True)
    if codec == "bytes":
        return bytes(data)
    return unpickled(data, lambda head, **more: Unpickler(io.BytesIO(head), **more).load())


def with_fields(envelope: bytes, fields: Mapping[str, Any]) -> bytes:
    """Return a `call.json` that says more."""
    return b"%s,%s" % (envelope[:-1], to_json(dict(fields), "call")[1:]) if fields else envelope


def decode_error(data: bytes, **fields: Unpack[TaskErrorFields]) -> TaskExecutionError | None:
    """Return the error in the content of a `result` file, or None where it holds a value.

    A file that cannot be read gives the ResultError that says so.
    """
    try:
        header, _ = _opened(data, fields)
    except ResultError as error:
        return error
    return None if header["ok"] else _failure_in(header, fields)


def _failure_in(header: Mapping[str, Any], fields: TaskErrorFields) -> TaskExecutionError:
    """Return the error that a header tells of."""
    record = header["error"]
    kind = ENDINGS.get(str(header.get("why")))
    if kind is None:
        return error_of(record, **fields)
    told: TaskErrorFields = {**fields, **header.get("fields", {})}
    return kind(str(record.get("message")), **told)


def _opened(data: bytes, fields: TaskErrorFields) -> tuple[dict[str, Any], memoryview]:
    end = data.find(b"\n")
    end = len(data) if end < 0 else end
    try:
        header = from_json(data[:end])
        version, ok = header["v"], header["ok"]
    except (ValueError, TypeError, LookupError) as error:
        raise _result_error(f"the result file is damaged: {error}", fields) from None
    if version != WIRE_VERSION:
        raise _result_error(
            f"the result is written in version {version!r} of the wire format; this side reads version {WIRE_VERSION}",
            fields,
            "Collect it with the release of flow-gpu that submitted the task.",
        )
    if not isinstance(ok, bool) or not (ok or isinstance(header.get("error"), dict)):
        raise _result_error("the result file is damaged: it holds neither a value nor an error", fields)
    return header, memoryview(data)[end + 1 :]


def encode_error(error: BaseException) -> bytes:
    """Return the content of a `result` file for a call that ended with `error`, as the caller saw it."""
    header: dict[str, Any] = {"v": WIRE_VERSION, "ok": False}
    record = dict(getattr(error, "_record", None) or {})
    if not record:
        record = {"type": type(error).__name__, "module": type(error).__module__, "message": str(error)}
    why = next((word for word, kind in ENDINGS.items() if type(error) is kind), None)
    if why is not None:
        record["message"] = getattr(error, "message", "")
        header |= {"why": why, "fields": {name: getattr(error, name) for name in _ENDING_FIELDS}}
    return to_json({**header, "error": record}, "header") + b"\n"


def error_of(record: dict[str, Any], **fields: Unpack[TaskErrorFields]) -> TaskExecutionError:
    """Return the error that a record (`flow_core.runner.error_record`) tells of, as `decode_result` would raise it."""
    name, message = str(record.get("type")), str(record.get("message"))
    if str(record.get("module")).rpartition(".")[2] in _RUNNER_MODULES:
        if name in _RESULT_ERRORS:
            return ResultError(message, **fields)
        if name in _REFUSALS:
            return _REFUSALS[name](message, **fields)
    return remote_error(record, **fields)


def _result_error(message: str, fields: TaskErrorFields, *suggestions: str) -> ResultError:
    merged: TaskErrorFields = {**fields, "suggestions": suggestions}
    return ResultError(message, **merged)


def _pickled(message: str, fields: TaskErrorFields, *suggestions: str) -> ResultError:
    merged: TaskErrorFields = {**fields, "suggestions": suggestions, "error_code": RESULT_PICKLED}
    return ResultError(message, **merged)


class Unpickler(pickle.Unpickler):  # the caller has allowed it
    """Gives values of captured classes the class that is loaded here.

    A class that was sent by value comes back by value, as a copy: `isinstance` would fail, and cloudpickle would write
    the copy's methods over those of the original.
    """

    def __init__(self, file: io.BytesIO, *, buffers: Sequence[Any] | None = None) -> None:
        super().__init__(file, buffers=buffers)
        self.found: set[type] = set()

    def find_class(self, module: str, name: str) -> Any:
        """As the base class, but for what makes captured classes anew."""
        made = super().find_class(module, name)
        if module != "cloudpickle.cloudpickle":
            return made
        if name == "_make_skeleton_class":
            return functools.partial(self._class, made, _place_of_class)
        if name == "_make_skeleton_enum":
            return functools.partial(self._class, made, _place_of_enum)
        if name == "_class_setstate":
            return functools.partial(self._fill, made)
        return made

    def _class(self, make: Callable[..., type], place: Callable[..., tuple[str, str]], *made_of: Any) -> type:
        try:
            module, name = place(*made_of)
        except (KeyError, TypeError):
            return make(*made_of)  # another cloudpickle than those known here
        loaded = vars(sys.modules.get(module, object)).get(name)
        if isinstance(loaded, type) and loaded.__module__ == module and loaded.__qualname__ == name:
            self.found.add(loaded)
            return loaded
        return make(*made_of)

    def _fill(self, fill: Callable[[type, Any], type], cls: type, state: Any) -> type:
        return cls if cls in self.found else fill(cls, state)


def _place_of_class(
    _meta: type, name: str, _bases: Any, namespace: dict[str, Any], *_: Any
) -> tuple[str, str]:
    return namespace["__module__"], name


def _place_of_enum(
    _bases: Any, name: str, _qualname: str, _members: Any, module: str, *_: Any
) -> tuple[str, str]:
    return module, name
