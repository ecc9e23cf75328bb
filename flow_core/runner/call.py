"""Runs one function call on the machine with the GPUs and leaves its result in a file.

Standard library only, Python 3.8+, imports nothing of ours, so that this one file can be sent anywhere.
Started as ``python call.py`` in the work folder, with FLOW_TASK_DIR naming the task folder:

- reads ``call.json``, the call (and ``call.pkl``, a function that was captured by value);
- writes ``result``: one line of JSON, then the value's bytes. It is there whole or not at all;
- exits with 0 only after a result was written. What the function prints is not looked at.

The strict JSON rules live here, because both ends need them: the caller imports them from this module.
"""

# ruff: noqa: PTH - pathlib would be a tenth of the start-up time
from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would cost more than all the rest of this file
    from collections.abc import Awaitable, Callable, Iterator
    from types import ModuleType, TracebackType
    from typing import Any, NoReturn

WIRE_VERSION = 1
"""The version of the files that a caller and this file exchange. Both sides refuse any other."""
JSON_LIMIT_BYTES = 10 * 1024 * 1024
"""The most that the arguments of a call, or its result, may take as JSON."""
PICKLE_LIMIT_BYTES = 100 * 1024 * 1024
"""The same for pickle."""
EXIT_NOT_WRITTEN = 74
"""Exit code when the result could not be written (EX_IOERR of sysexits.h)."""

_MAX_DEPTH = 400
_MAX_INT_BITS = 14_284  # an int with more may have over 4300 digits, the most that Python reads back by default
_MAX_TEXT = 100_000
_HERE = os.path.abspath(__file__)
_PLAIN = frozenset((str, bool, type(None)))
_NUMBERS = frozenset((int, float))


class NotSerializable(TypeError):  # noqa: N818 - the name that the record carries
    """A value that cannot travel; the text says where in it and why."""


class TooLarge(NotSerializable):
    """A value that takes more bytes than may travel."""


class ResultNotSerializable(NotSerializable):
    """The function's value cannot travel."""


class ResultTooLarge(ResultNotSerializable):
    """The function's value takes more bytes than may travel."""


class WireVersionMismatch(Exception):  # noqa: N818
    """The caller speaks another version of the wire format."""


class PythonVersionMismatch(Exception):  # noqa: N818
    """The function was captured by another Python than the one that is to run it."""


# ---------------------------------------------------------------- strict JSON


def to_json(value: Any, name: str, limit_bytes: int = JSON_LIMIT_BYTES) -> bytes:
    """Return `value` as JSON in ASCII. What is read back is equal to it, but tuples have become lists.

    Raises NotSerializable with the path from `name` to the first thing that JSON has no form for, or that would
    silently change (keys that are no strings, nan, infinity); TooLarge above `limit_bytes`.
    """
    _check(value, name, limit_bytes, _PLAIN | _NUMBERS)
    try:
        data = _encode(value).encode("ascii")
    except (TypeError, ValueError, RecursionError):
        _check(value, name, limit_bytes, _PLAIN)  # look at every number: one is nan, or too long
        raise
    if len(data) > limit_bytes:
        raise TooLarge(f"{name} takes {len(data):,} bytes as JSON; at most {limit_bytes:,} can travel")
    return data


def from_json(data: bytes) -> Any:
    """Return the value that `to_json` wrote. Raises ValueError for anything else."""
    text = data.decode("ascii")
    try:
        from _json import make_scanner  # `import json` takes as long as starting Python: it loads `re`
    except ImportError:
        import json

        return json.loads(text)
    try:
        value, end = make_scanner(_Scanner())(text, 0)
    except StopIteration:
        raise ValueError("no JSON at its beginning") from None
    if end != len(text):
        raise ValueError(f"more than one JSON value: the first one ends at {end} of {len(text)}")
    return value


class _Scanner:
    """What the scanner in C asks a `json.JSONDecoder` for."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}  # noqa: RUF012 - not used by the scanner in C

    @staticmethod
    def parse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")


def _encode(value: Any) -> str:
    try:
        from _json import encode_basestring_ascii, make_encoder

        # markers, default, encoder, indent, key separator, item separator, sort_keys, skipkeys, allow_nan
        encoder = make_encoder({}, _refuse, encode_basestring_ascii, None, ":", ",", False, False, False)
    except (ImportError, TypeError):
        import json

        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    return "".join(encoder(value, 0))


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"no JSON for {type(value)}")


def _check(value: Any, name: str, limit_bytes: int, trusted: frozenset[type]) -> None:
    flaw = _Walk(trusted, limit_bytes // 2).flaw(value)
    if flaw is None:
        return
    path, text = flaw
    if text:
        raise NotSerializable(f"{name}{path} {text}")
    raise TooLarge(f"{name} takes more than {limit_bytes:,} bytes as JSON, which is the most that can travel")


class _Walk:
    """The search for the first thing in a value that JSON cannot carry unchanged.

    Values whose exact type is in `trusted` are not looked at: the encoder does that, faster. `room` is how many
    values fit into the limit, two bytes each, so that the walk ends even where lists share lists.
    """

    def __init__(self, trusted: frozenset[type], room: int) -> None:
        self.trusted = trusted
        self.room = room
        self.parents: set[int] = set()

    def flaw(self, value: Any, depth: int = 0) -> tuple[str, str] | None:
        """Return (path below `value`, what is wrong there), or None. No text means too large."""
        if type(value) in self.trusted or isinstance(value, str):
            return None
        if isinstance(value, (int, float)):
            return _number_flaw(value)
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    return "", f"has a key that is no string: {_short(key)} ({_type_name(key)}); use str(key)"
            values: Any = value.values()
        elif isinstance(value, (list, tuple)):
            values = value
        else:
            return "", _describe(value)
        self.room -= len(values)
        if self.room < 0:
            return "", ""
        if self.trusted.issuperset(map(type, values)):
            return None
        if id(value) in self.parents:
            return "", "contains itself"
        if depth >= _MAX_DEPTH:
            return "", f"is nested more than {_MAX_DEPTH} deep"
        self.parents.add(id(value))
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            found = self.flaw(child, depth + 1)
            if found is not None:
                return f"[{_short(key)}]{found[0]}", found[1]
        self.parents.discard(id(value))
        return None


def _number_flaw(value: float) -> tuple[str, str] | None:
    if isinstance(value, int):
        if int(value).bit_length() > _MAX_INT_BITS:
            return "", "is an int of more than 4300 digits; send it as text, such as hex(value)"
    elif float(value) - float(value) != 0:  # nan or an infinity
        return "", f"is {float(value)}, which JSON cannot carry; use None or text"
    return None


_WAYS_OUT = {
    "numpy.ndarray": "use .tolist(), or numpy.save() it and pass the path",
    "torch.Tensor": "use .tolist(), or torch.save() it and pass the path",
    "set": "use sorted(value)",
    "frozenset": "use sorted(value)",
    "bytes": "write it to a file and pass the path",
    "bytearray": "write it to a file and pass the path",
    "complex": "use [value.real, value.imag]",
    "generator": "use list(value)",
    "range": "use list(value)",
    "datetime.datetime": "use .isoformat()",
    "datetime.date": "use .isoformat()",
    "decimal.Decimal": "use str(value)",
    "uuid.UUID": "use str(value)",
}


def _describe(value: Any) -> str:
    name = _type_name(value)
    way_out = _WAYS_OUT.get(name)
    if way_out is None:
        bases = [base.__name__ for base in type(value).__mro__]
        if hasattr(type(value), "__dataclass_fields__"):
            way_out = "use dataclasses.asdict(value)"
        elif "Enum" in bases:
            way_out = "use .value"
        elif "PurePath" in bases:
            way_out = "use str(value)"
        elif "DataFrame" in bases:
            way_out = "save it as Parquet and pass the path"
        elif hasattr(type(value), "item") and hasattr(type(value), "dtype"):
            way_out = "use .item()"
    return f"is {'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}" + (f"; {way_out}" if way_out else "")


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the user's own __repr__
        text = f"<{_type_name(value)}>"
    return text if len(text) <= 60 else f"{text[:40]}…{text[-10:]}"


# ---------------------------------------------------------------- the call


def main() -> int:
    """Run the call of this task folder; return the exit code."""
    folder = os.path.abspath(os.environ.get("FLOW_TASK_DIR") or os.path.dirname(_HERE))
    process = os.getpid()
    _prepare_process()
    code, body = 0, b""
    try:
        header, body = _run(folder)
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt end a call as well
        code = _exit_code(error)
        header = {"v": WIRE_VERSION, "ok": False, "error": _Recorder(folder).record(error)}
        _say(header["error"]["traceback"])
    if os.getpid() == process:  # else the function has forked, and this is the child coming back
        code = _deliver(folder, header, body) or code
    _flush()
    return code


def _prepare_process() -> None:
    """Let logs be followed line by line, and let no character that is printed be an error."""
    import faulthandler

    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(2)  # a crash in native code leaves the Python stack in the log


def _run(folder: str) -> tuple[dict[str, Any], bytes]:
    """Return the header and the body of the result. Raises what the function raises."""
    call = _read_call(folder)
    roots = [root for root in (os.path.join(folder, "work"), os.getcwd()) if os.path.isdir(root)]
    if os.path.dirname(_HERE) == os.path.abspath(sys.path[0]):
        del sys.path[0]  # where this file lies, and nothing of the user's
    _System.path = list(sys.path)
    sys.path[:0] = dict.fromkeys(roots)
    if call["kind"] == "pickle":
        function, args, kwargs = _unpickle(folder, call)
        name = getattr(function, "__qualname__", "the function")
    else:
        sys.argv[:] = [call["module"]]
        function = _find(_load(call["module"], roots), call["module"], call["function"])
        args, kwargs, name = call["args"], call["kwargs"], call["function"]
    value = _await(_apply(function, args, kwargs, name))
    codec = call["codec"]
    body = _pickle(value) if codec == "pickle" else _result_json(value)
    return {"v": WIRE_VERSION, "ok": True, "codec": codec, "size": len(body), "sha256": sha256_hex(body)}, body


def _read_call(folder: str) -> dict[str, Any]:
    with open(os.path.join(folder, "call.json"), "rb") as file:
        call: dict[str, Any] = from_json(file.read())
    if call.get("v") != WIRE_VERSION:
        raise WireVersionMismatch(
            f"the call is written in version {call.get('v')!r} of the wire format, "
            f"and the runner on this machine reads version {WIRE_VERSION}"
        )
    made_by = call.get("python")
    if made_by is not None and tuple(made_by) != sys.version_info[:2]:
        raise PythonVersionMismatch(
            "the function was captured by Python {}.{}, and this machine runs Python {}.{}.{} ({}): pickled "
            "functions only work in the same version. Run it with the same Python on both sides, or call it by "
            "file and function name with JSON arguments, which works across versions".format(
                *made_by, *sys.version_info[:3], sys.executable
            )
        )
    return call


def _load(module: str, roots: list[str]) -> ModuleType:
    """Import the user's module under its own name, so that it can be pickled and its relative imports work.

    A file inside packages is imported as their module; any other file as Python runs a script: its own folder comes
    first on the path.
    """
    if not module.endswith(".py") or _is_dotted(module, roots):
        __import__(module)
        return sys.modules[module]
    for root in roots:
        path = os.path.join(root, module)
        if os.path.isfile(path):
            break
    else:
        raise FileNotFoundError(_missing_file(module, roots))
    folder, stem = os.path.split(path[: -len(".py")])
    parts = [stem]
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        parts.insert(0, package)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    if folder not in sys.path[: len(roots)]:
        sys.path.insert(0, folder)
    name = ".".join(parts)
    if len(parts) > 1:
        __import__(name)
        return sys.modules[name]
    if "." not in stem and stem not in sys.modules and not os.path.isdir(os.path.join(folder, stem)):
        __import__(stem)
        found = sys.modules[stem]
        if getattr(found, "__file__", None) == path:
            return found
    return _load_file(path, stem)


def _is_dotted(module: str, roots: list[str]) -> bool:
    """Tell the module `py` of a package from a file: `package.py` can be either."""
    return "/" not in module and not any(os.path.isfile(os.path.join(root, module)) for root in roots) and (
        any(os.path.isfile(os.path.join(root, *module.split(".")) + ".py") for root in roots)
    )


def _load_file(path: str, stem: str) -> ModuleType:
    """Import a file whose name means another module to Python, such as `types.py` or `train.v2.py`."""
    util = _System.module("importlib.util")
    name = "flow_call_" + stem.replace(".", "_")
    spec = util.spec_from_file_location(name, path)
    module: ModuleType = util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _missing_file(module: str, roots: list[str]) -> str:
    files = []
    for root in dict.fromkeys(roots):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))[:50]
            files += [os.path.relpath(os.path.join(folder, name), root) for name in names if name.endswith(".py")]
            if len(files) > 1000:
                break
    return f"there is no file {module!r} in {roots[0]}" + _suggest(module, sorted(set(files)), "Python files there")


def _find(module: ModuleType, path: str, name: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            functions = [key for key, value in vars(module).items() if callable(value) and _is_own(value, module)]
            text = f"{path!r} has no function {name!r}"
            raise AttributeError(text + _suggest(name, functions, "Its functions")) from None
    if not callable(found):
        raise TypeError(f"{name!r} in {path!r} is {_describe(found)[3:]}, not a function")
    function: Callable[..., Any] = found
    return function


def _is_own(value: object, module: ModuleType) -> bool:
    name = getattr(value, "__name__", "_")
    return getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")


def _suggest(wanted: str, names: list[str], title: str) -> str:
    close = _System.module("difflib").get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"{hint} {title}: {listed or 'none'}"


def _apply(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], name: str) -> Any:
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        trace, wrapped = error.__traceback__, function
        while hasattr(wrapped, "__wrapped__") and trace is not None:
            trace, wrapped = trace.tb_next, wrapped.__wrapped__
        if trace is None or trace.tb_next is None:  # raised before the function's own first line
            signature = _signature_refusing(function, args, kwargs)
            if signature is not None:
                raise TypeError(f"the arguments of the call do not fit {name}{signature}: {error}") from None
        raise


def _signature_refusing(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> str | None:
    """Return the signature when the arguments do not fit it."""
    inspect = _System.module("inspect")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # a function in C does not always have one
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return str(signature)
    return None


def _await(value: Any) -> Any:
    if not hasattr(type(value), "__await__"):
        return value

    async def outcome(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    return _System.module("asyncio").run(outcome(value))


def _result_json(value: Any) -> bytes:
    try:
        return to_json(value, "result")
    except TooLarge as error:
        raise ResultTooLarge(f"{error}. Save it to disk and return the path") from None
    except NotSerializable as error:
        raise ResultNotSerializable(f"{error}. Return what JSON can carry, or save it to disk and return the path") from None
