"""A live function as files that another machine can run: the function, what it refers to, and its arguments by value.

What is installed (the standard library, site-packages) travels by name and has to be there on the other side. All else
travels by value: `__main__`, notebooks, DAG files, and modules of a project that is not installed, editable installs
included. Both sides need the same Python minor version; the runner refuses any other before it loads anything.
"""

from __future__ import annotations

import contextlib
import functools
import io
import linecache
import operator
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal

from flow_core.errors import SerializationError
from flow_core.runner.execute import WIRE_VERSION
from flow_core.runner.pickles import CLOUDPICKLE_ZIP, PICKLE_LIMIT_BYTES, PROTOCOL, blame
from flow_core.runner.strict_json import to_json

FUNCTION_FILE = "call.pkl"

# What lru_cache makes: cloudpickle sends it by name only.
_CACHED = functools._lru_cache_wrapper  # noqa: SLF001
_CACHE_INFO = functools._CacheInfo  # noqa: SLF001
_SOURCES_LIMIT_BYTES = 1024 * 1024
# cloudpickle keeps one list of modules for the whole process.
_registry_lock = threading.RLock()


def capture(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    result_codec: Literal["json", "pickle"] = "pickle",
    replace: Mapping[Any, Any] | None = None,
) -> dict[str, bytes]:
    """Return the files of a task folder that call `function`, by name: `call.json`, `call.pkl`, `cloudpickle.zip`.

    `result_codec` says how its value comes back. Wherever the function or its arguments refer to a key of `replace`
    (the same object), its value takes that place: what only works here can so become something that works there.

    Raises SerializationError that names the path of what cannot travel, as in
    `train (global 'LOCK') is a _thread.lock`, or that the call takes more than `PICKLE_LIMIT_BYTES`. The function is
    not changed, and nothing stays registered with cloudpickle.
    """
    _refuse(function)
    name = _name(function)
    replaced = {id(original): (original, substitute) for original, substitute in (replace or {}).items()}
    with _by_value():
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
    return {"call.json": to_json(call, "call"), FUNCTION_FILE: captured, CLOUDPICKLE_ZIP: cloudpickle_zip()}


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


def _refuse(function: object) -> None:
    import inspect

    if not callable(function):
        raise SerializationError(f"{function!r} is not a function: it cannot be called")
    plain = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise SerializationError(
            f"{_name(function)} is a generator function: a call returns one value, when it ends",
            suggestions=["Return a list."],
        )


def _name(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


_Replaced = dict[int, tuple[Any, Any]]


def _dumped(call: tuple[Any, Any, Any], name: str, replaced: _Replaced) -> tuple[bytes, set[str]]:
    """Return the pickle, and the files of the code in it."""
    try:
        return _dump(call, replaced)
    except Exception as error:
        raise _refusal(call, name, replaced, error) from error


def _refusal(
    call: tuple[Any, Any, Any], name: str, replaced: _Replaced, error: Exception
) -> SerializationError:
    """Say what cannot travel, where it is, and what to do about it."""

    def dump(value: object) -> object:
        return _dump(value, replaced)

    function, args, kwargs = call
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


def _dump(value: object, replaced: _Replaced) -> tuple[bytes, set[str]]:
    file = io.BytesIO()
    pickler = _pickler_class()(file, PROTOCOL)
    pickler.replaced = replaced
    pickler.dump(value)
    return file.getvalue(), pickler.filenames


@functools.cache
def _pickler_class() -> Any:
    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is not typed
        """cloudpickle's, which also puts replacements in place and takes cached functions along."""

        replaced: _Replaced

        def __init__(self, file: io.BytesIO, protocol: int) -> None:
            super().__init__(file, protocol)
            self.filenames: set[str] = set()

        def reducer_override(self, obj: Any) -> Any:
            if id(obj) in self.replaced:
                return operator.getitem, ((self.replaced[id(obj)][1],), 0)
            if isinstance(obj, _CACHED) and not _is_importable(obj):
                options = obj.cache_parameters()
                made_of = (obj.__wrapped__, options["maxsize"], options["typed"], _CACHE_INFO)
                return _CACHED, made_of, vars(obj)
            reduced = super().reducer_override(obj)
            if isinstance(obj, FunctionType) and reduced is not NotImplemented:
                self.filenames.add(obj.__code__.co_filename)
            return reduced

    return Pickler


def _is_importable(obj: Any) -> bool:
    name = obj.__module__
    module = sys.modules.get(name)
    return module is not None and name != "__main__" and not _is_project(module, name)


@contextlib.contextmanager
def _by_value() -> Iterator[None]:
    """Let the modules of the user's project travel by value while this lasts."""
    import cloudpickle

    with _registry_lock:
        known = cloudpickle.list_registry_pickle_by_value()
        loaded = list(sys.modules.items())
        added = [module for name, module in loaded if name not in known and _is_project(module, name)]
        for module in added:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in added:
                with contextlib.suppress(ValueError):  # somebody else has unregistered it
                    cloudpickle.unregister_pickle_by_value(module)


def _is_project(module: object, name: str) -> bool:
    """Whether a module's code is the user's: from a file that is not installed, and not ours."""
    if not issubclass(type(module), ModuleType):
        return False  # sys.modules holds whatever was put into it; a library of cffi's only says that it is a module
    # Not getattr: that would set off the import behind a lazy module.
    namespace = ModuleType.__getattribute__(module, "__dict__")
    file = namespace.get("__file__")
    if not isinstance(file, str) or namespace.get("__name__") != name or name == "__main__":
        return False
    return name.partition(".")[0] != __name__.partition(".")[0] and _is_project_file(file)


@functools.lru_cache(maxsize=100_000)
def _is_project_file(file: str) -> bool:
    path = str(Path(file).absolute())
    return not path.startswith(_installed()) and "site-packages" not in path and "dist-packages" not in path


@functools.cache
def _installed() -> tuple[str, ...]:
    """The folders of what the other side may have as well."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = {sysconfig.get_path(name) for name in names} | {
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
    return tuple(real + os.sep for folder in folders for real in {folder, os.path.realpath(folder)})


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
