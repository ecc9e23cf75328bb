"""A live function as files that another machine can run: the function, what it refers to, and its arguments by value.

What is installed (the standard library, site-packages) travels by name and has to be there on the other side. All else
travels by value: `__main__`, notebooks, DAG files, and modules of a project that is not installed, editable installs
included. Both sides need the same Python minor version; the runner refuses any other before it loads anything.
"""

from __future__ import annotations

import functools
import inspect
import io
import linecache
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, NamedTuple

from flow_core.errors import SerializationError
from flow_core.object_ref import ObjectRef, pickled_refs
from flow_core.references import References, global_names
from flow_core.runner.execute import WIRE_VERSION, sha256_hex
from flow_core.runner.pickles import CLOUDPICKLE_ZIP, PICKLE_LIMIT_BYTES, blame
from flow_core.runner.strict_json import to_json

FUNCTION_FILE = "call.pkl"

#: Objects, and what takes their place elsewhere.
Replacements = Mapping[Any, Any] | Iterable[tuple[Any, Any]]

_SOURCES_LIMIT_BYTES = 1024 * 1024


def capture(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    result_codec: Literal["json", "pickle"] = "pickle",
    replace: Replacements = (),
) -> dict[str, bytes]:
    """Return the files of a task folder that call `function`, by name: `call.json`, `call.pkl`, `cloudpickle.zip`.

    `result_codec` says how its value comes back. Wherever the function or its arguments refer to a key of `replace`
    (the same object), its value takes that place: what only works here can so become something that works there. Pairs
    stand for a mapping whose keys cannot be hashed.

    Raises SerializationError that names the path of what cannot travel, as in
    `train (global 'LOCK') is a _thread.lock`, or that the call takes more than `PICKLE_LIMIT_BYTES`. The function is
    not changed, and nothing stays registered with cloudpickle.
    """
    _check(function)
    name = function_name(function)
    if yields(function):
        raise SerializationError(
            f"{name} is a generator function: a call returns one value, when it ends",
            suggestions=["Return a list, or call it in a session, which streams what it yields."],
        )
    pairs = replace.items() if isinstance(replace, Mapping) else replace
    replaced = {id(original): (original, substitute) for original, substitute in pairs}
    captured, filenames = _dumped((function, tuple(args), dict(kwargs or {})), name, replaced)
    if len(captured) > PICKLE_LIMIT_BYTES:
        raise SerializationError(
            f"Cannot serialize arguments. Save to disk and pass path. {name} and its arguments take "
            f"{len(captured):,} bytes; at most {PICKLE_LIMIT_BYTES:,} can travel"
        )
    call = {
        "v": WIRE_VERSION,
        "kind": "pickle",
        "codec": result_codec,
        "python": list(sys.version_info[:2]),
        "function_file": FUNCTION_FILE,
        "sources": _sources(filenames),
    }
    loaders, others = _loaders()
    if b"cloudpickle" not in captured:
        call["loaders"] = 0
    elif loaders and not any(name in captured for name in others):
        call["loaders"], captured = len(loaders), loaders + captured
    return {"call.json": to_json(call, "call"), FUNCTION_FILE: captured, CLOUDPICKLE_ZIP: cloudpickle_zip()}


class Payload(NamedTuple):
    """A function as it travels: its pickle, the digest of that, the text of its source files by name.

    `refs` are the references in it, of which each is an ObjectRef in the pickle.
    """

    data: bytes
    digest: str
    sources: dict[str, str]
    refs: tuple[ObjectRef, ...] = ()


class Captured:
    """A live function as another machine gets it, captured anew only when something that it refers to has changed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        _check(function)
        self.function = function
        self.name = function_name(function)
        self._made: tuple[References, Payload] | None = None

    def fresh(self) -> Payload:
        """Return the function as it is now, with what it refers to: the same object for as long as nothing changes.

        A glance, where nothing has changed. Data into which no glance is possible, such as an array, is captured and
        compared each time. Raises SerializationError as `capture` does.
        """
        made = self._made
        if made is not None and made[0].unchanged():
            return made[1]
        references = References(self.function)  # before the capture, so that no change falls between them
        payload = payload_of(self.function, self.name, made[1] if made is not None else None)
        self._made = references, payload
        return payload


def payload_of(value: object, name: str, before: Payload | None = None) -> Payload:
    """Return an object or a class as another machine gets it, once: `before` itself where that is the same.

    Raises SerializationError as `capture` does.
    """
    with pickled_refs() as refs:
        data, filenames = _dumped(value, name, {})
    _check_size(data, name)
    if before is not None and before.data == data:
        return before
    return Payload(data, sha256_hex(data), _sources(filenames), tuple(refs))


def _check_size(data: bytes, name: str) -> None:
    if len(data) > PICKLE_LIMIT_BYTES:
        raise SerializationError(
            f"{name} and what it refers to take {len(data):,} bytes; at most {PICKLE_LIMIT_BYTES:,} can travel",
            suggestions=["Pass large data as an argument, or save it and pass its path."],
        )


def yields(function: Callable[..., Any]) -> bool:
    """Whether a call of it gives a generator, plain or async."""
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def function_name(function: object) -> str:
    """Return the name that a person connects with what is called."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


@functools.cache
def cloudpickle_zip() -> bytes:
    """Return this process's cloudpickle as a zip to put on a path, compiled for this Python and as source."""
    import py_compile
    import tempfile
    import zipfile

    import cloudpickle

    archive = io.BytesIO()
    with (
        zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed,
        tempfile.TemporaryDirectory() as folder,
    ):
        for path in sorted(Path(cloudpickle.__file__).parent.glob("*.py")):
            compiled = Path(folder, path.name + "c")
            py_compile.compile(
                str(path),
                str(compiled),
                f"{CLOUDPICKLE_ZIP}/cloudpickle/{path.name}",
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            for member in (path, compiled):
                info = zipfile.ZipInfo(f"cloudpickle/{member.name}")  # with a date that never changes
                packed.writestr(info, member.read_bytes(), zipfile.ZIP_DEFLATED)
    return archive.getvalue()


#: What a pickled function needs of cloudpickle when it is loaded, as far as its other parts are not involved.
_LOADERS = (
    *(
        "instance",
        "_empty_cell_value",
        "_make_empty_cell",
        "_make_cell",
        "_make_function",
        "_function_setstate",
    ),
    *("_builtin_type", "subimport"),
)


@functools.cache
def _loaders() -> tuple[bytes, tuple[bytes, ...]]:
    """Return these functions of our cloudpickle, compiled, and the names of all its other ones.

    To import the whole of it takes the other side longer than all else of a call. Nothing, where this cloudpickle is
    not made as expected.
    """
    import marshal

    from cloudpickle import cloudpickle

    names = vars(cloudpickle)
    ours = {name for name, value in names.items() if getattr(value, "__module__", "") == cloudpickle.__name__}
    try:
        text = "\n".join(_source(names[name]) for name in _LOADERS)
    except (KeyError, OSError, TypeError):
        return b"", ()
    if global_names(compile(text, "", "exec")) & set(names) - {
        *_LOADERS,
        "sys",
        "types",
        "__builtins__",
        "__name__",
    }:
        return b"", ()
    code = compile(f"import sys, types\n{text}", f"{CLOUDPICKLE_ZIP}/cloudpickle/cloudpickle.py", "exec")
    others = ours.difference(_LOADERS, ("dump", "dumps"))  # words of any text, and in no pickle
    return marshal.dumps(code), tuple(name.encode() for name in sorted(others))


def _source(one: object) -> str:
    """Return the source of a function, or of the decorated class that something is the one instance of.

    `inspect.getsource` would parse a class's whole file into a tree, which Python 3.11 cannot do while another thread
    does the same (python/cpython#106905). Raises OSError where there is no source.
    """
    if isinstance(one, FunctionType):
        return inspect.getsource(one)
    lines, _ = inspect.findsource(sys.modules[type(one).__module__])
    at = next((at for at, line in enumerate(lines) if line.startswith(f"class {type(one).__name__}:")), None)
    if at is None or not lines[at - 1].startswith("@"):
        raise OSError(f"no source of {one!r}")
    return lines[at - 1] + "".join(inspect.getblock(lines[at:]))


def _check(function: object) -> None:
    if not callable(function):
        raise SerializationError(f"{function!r} is not a function: it cannot be called")


_Replaced = dict[int, tuple[Any, Any]]


def _dumped(value: Any, name: str, replaced: _Replaced) -> tuple[bytes, set[str]]:
    """Return the pickle of a function or of (function, args, kwargs), and the files of the code in it."""
    from flow_core.pickler import dumps  # cloudpickle takes a while to import

    try:
        return dumps(value, replaced)
    except Exception as error:
        raise _refusal(value, name, replaced, error) from error


def _refusal(value: Any, name: str, replaced: _Replaced, error: Exception) -> SerializationError:
    """Say what cannot travel, where it is, and what to do about it."""
    from flow_core.pickler import dumps

    def dump(value: object) -> object:
        return dumps(value, replaced)

    function, args, kwargs = value if type(value) is tuple else (value, (), {})
    for part, where in ((args, "args"), (kwargs, "kwargs")):
        try:
            dump(part)
        except Exception as cause:  # noqa: BLE001 - whatever a user's __reduce__ raises
            place = blame(part, where, cause, dump)
            return SerializationError(f"Cannot serialize arguments. Save to disk and pass path. {place}")
    return SerializationError(
        f"Cannot send the function {name!r}. {blame(function, name, error, dump)}",
        suggestions=["Make it inside the function, or pass what can travel as an argument."],
    )


def _sources(filenames: set[str]) -> dict[str, str]:
    """The text of the captured code, so that a traceback from the other machine shows its lines."""
    sources: dict[str, str] = {}
    room = _SOURCES_LIMIT_BYTES
    for name in sorted(filenames):
        text = "".join(linecache.getlines(name))
        room -= len(text)
        if text and room >= 0:
            sources[name] = text
    return sources
