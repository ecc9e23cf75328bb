"""Runs one function call and leaves its outcome in the task folder.

Reads ``call.json`` (and ``call.pkl``, a captured function). Writes ``result``: one line of JSON, then the value's
bytes, or the name of the file with them (``result.data``); it is there whole or not at all. The exit code is 0 only if
a result was written. What the function prints does not matter. Standard library only, Python 3.8+; what only a failure
needs is imported after it.
"""

from __future__ import annotations

import os
import sys

from . import load, stdlib
from .strict_json import JSON_LIMIT_BYTES, NotSerializable, TooLarge, from_json, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

WIRE_VERSION = 1
"""The version of the files that caller and runner exchange. Each refuses any other."""
INLINE_BYTES = 1024 * 1024
"""A value of more bytes than this gets a file of its own, so that its header can be read without it."""
DATA_FILE = "result.data"
BY_REFERENCE_JSON_LIMIT_BYTES = 256 * 1024 * 1024
EXIT_NOT_WRITTEN = 74
"""Exit code when the outcome could not be written down (EX_IOERR of sysexits.h)."""


class ResultNotSerializable(NotSerializable):
    """The function's value cannot travel."""


class ResultTooLarge(TooLarge):
    """The function's value takes more bytes than may travel."""


class WireVersionMismatch(Exception):
    """The caller speaks another version of the wire format."""


def main() -> int:
    """Run the call of the task folder named by FLOW_TASK_DIR; return the exit code."""
    folder = os.path.abspath(os.environ["FLOW_TASK_DIR"])
    process = os.getpid()
    prepare_process()
    code = 0
    body: list[Any] = []
    try:
        header, body = _run(folder)
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt end a call as well
        header, code = _failure(error, folder)
    if os.getpid() == process:  # else the function has forked, and this is the child coming back
        code = _deliver(folder, header, body) or code
    return code


def sha256_hex(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data`; `import hashlib` would load OpenSSL."""
    try:
        from _sha2 import sha256  # type: ignore[import-not-found,unused-ignore]  # Python 3.12+
    except ImportError:
        try:
            from _sha256 import sha256  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            from hashlib import sha256
    digest: str = sha256(data).hexdigest()
    return digest


def prepare_process() -> None:
    """Let logs be followed line by line, and let no character that is printed be an error."""
    import faulthandler

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    faulthandler.enable(2)  # a crash in native code leaves the Python stack in the log


def _run(folder: str) -> tuple[dict[str, Any], list[Any]]:
    """Return the header and the pieces of the result. Raises what the function raises."""
    with open(os.path.join(folder, "call.json"), "rb") as file:
        call = from_json(file.read())
    if call.get("v") != WIRE_VERSION:
        raise WireVersionMismatch(
            f"the call is written in version {call.get('v')!r} of the wire format; this runner reads {WIRE_VERSION}"
        )
    work = os.path.join(folder, "work")
    roots = list(dict.fromkeys(root for root in (work, os.getcwd()) if os.path.isdir(root)))
    if call["kind"] == "serve":
        from . import serve

        return _outcome(serve.run(folder, call), "json")
    if call["kind"] == "pickle":
        from . import pickles

        pickles.prepare(folder, call)  # before the user's folders can hide a standard module
        stdlib.put_first(roots)
        function, args, kwargs = pickles.load_captured(folder, call)
        name = getattr(function, "__name__", "the function")
    else:
        stdlib.put_first(roots)
        sys.argv[:] = [call["module"]]
        function = load.function_of(call["module"], call["function"], roots)
        args, kwargs, name = call["args"], call["kwargs"], call["function"]
        if "inputs" in call:
            from .objects import Resolver

            resolver = Resolver(folder, call["inputs"])
            args, kwargs = resolver.in_json(args), resolver.in_json(kwargs)
    value = load.apply(function, args, kwargs, name)
    return _outcome(value, call["codec"], by_reference=call.get("by_reference", False))


def header_of(body: bytes, codec: str) -> dict[str, Any]:
    """Return the first line of a result file, as values."""
    return {"v": WIRE_VERSION, "ok": True, "codec": codec, "size": len(body), "sha256": sha256_hex(body)}


def _outcome(value: Any, codec: str, *, by_reference: bool = False) -> tuple[dict[str, Any], list[Any]]:
    """Return the header of a value, and the pieces of its bytes: after the header, or in the file that it names.

    What JSON cannot carry is kept as a pickle if that can be made, and the header says why: hours of work must not be
    lost for a value of the wrong type.
    """
    more: dict[str, Any] = {}
    try:
        if codec == "json":
            limit = BY_REFERENCE_JSON_LIMIT_BYTES if by_reference else JSON_LIMIT_BYTES
            pieces = [to_json(value, "result", limit, nan=True)]
        else:
            pieces = _pickled(value)
    except NotSerializable as error:
        refusal = not_serializable(error)
        if codec != "json" or isinstance(error, TooLarge):
            raise refusal from None
        try:
            codec, pieces, more = "pickle", _pickled(value), {"not_json": str(refusal)}
        except NotSerializable:
            raise refusal from None
    if sum(map(len, pieces)) <= INLINE_BYTES:
        body = b"".join(pieces)
        return {**header_of(body, codec), **more}, [body]
    from . import objects

    size, sha256 = objects.describe(pieces)
    header = {
        "v": WIRE_VERSION,
        "ok": True,
        "codec": codec,
        "size": size,
        "sha256": sha256,
        "file": DATA_FILE,
        **more,
    }
    return header, pieces


def _pickled(value: Any) -> list[Any]:
    from . import pickles

    return pickles.pieces(value, "result")


def not_serializable(error: NotSerializable) -> NotSerializable:
    """Say of a call's value what `error` says of some value."""
    if isinstance(error, TooLarge):
        return ResultTooLarge(f"{error}. Save it to disk and return the path, or call with result='ref'")
    return ResultNotSerializable(f"Cannot serialize the result. Save it to disk and return the path. {error}")


def _failure(error: BaseException, folder: str) -> tuple[dict[str, Any], int]:
    from . import error_record

    record = error_record.record_of(error, folder)
    if sys.stderr is not None:
        _try(sys.stderr.write, record["traceback"])  # a log that cannot be written need not stop the record
        _try(sys.stderr.flush)
    return {"v": WIRE_VERSION, "ok": False, "error": record}, error_record.exit_code_of(error)


def _deliver(folder: str, header: dict[str, Any], body: list[Any]) -> int:
    """Write the outcome; return 0, or the exit code where it is not the one that was to be written."""
    if header["ok"] and _rank() != "0":
        return 0  # the value of a call on many nodes is that of the first
    try:
        _write(folder, header, body)
    except OSError as error:
        lost, _ = _failure(error, folder)
        lost["error"]["message"] = f"the outcome of the call could not be written to {folder}: {error}"
        _try(_write, folder, lost, [])  # and if not, the exit code has to do
        return EXIT_NOT_WRITTEN
    return 0


def _write(folder: str, header: dict[str, Any], body: list[Any]) -> None:
    path = os.path.join(folder, "result")
    draft = f"{path}.{_rank()}.{os.getpid()}"
    head = to_json(header, "header") + b"\n"
    try:
        if "file" in header:
            write_file(draft, body)
            os.replace(draft, os.path.join(folder, header["file"]))  # the header is the last word
            body = []
        write_file(draft, [head + body[0] if body else head])
        _publish(draft, path, header["ok"])
    except OSError:
        _try(os.unlink, draft)
        raise


def write_file(path: str, pieces: Iterable[Any], mode: int = 0o600) -> None:
    """Write the pieces, one after the other, down to the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        for piece in pieces:
            data = memoryview(piece)
            while data:
                data = data[os.write(file, data) :]
        os.fsync(file)
    finally:
        os.close(file)


def _publish(draft: str, path: str, ok: bool) -> None:
    """Give the file its name. Of many nodes the first failure counts: the others mostly follow from it."""
    if os.environ.get("FLOW_NUM_NODES", "1") != "1":
        try:
            os.link(draft, path)
        except FileExistsError:
            with open(path, "rb") as file:
                replaces = not ok and from_json(file.readline()[:-1])["ok"]
        else:
            replaces = False
        if not replaces:
            os.unlink(draft)
            return
    os.replace(draft, path)


def _try(action: Callable[..., object], *args: object) -> None:
    try:
        action(*args)
    except OSError:
        return


def _rank() -> str:
    return os.environ.get("FLOW_NODE_RANK", "0")
