"""Functions and values by pickle: checked before they are loaded, and blamed by path when they cannot be made.

Standard library only, Python 3.8+; cloudpickle comes with the call, from the sender.
"""

from __future__ import annotations

import os
import sys

from . import stdlib
from .strict_json import NotSerializable, TooLarge, describe, short

TYPE_CHECKING = False
if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import CodeType
    from typing import Any, TypeVar

    T = TypeVar("T")
else:
    try:
        import _pickle as pickle  # all that is needed of it, and `pickle` loads `re`
    except ImportError:
        import pickle

Unpickler = pickle.Unpickler

PICKLE_LIMIT_BYTES = 100 * 1024 * 1024
"""The most that a captured call, or its result, may take as pickle."""
PROTOCOL = 5
CLOUDPICKLE_ZIP = "cloudpickle.zip"
"""The sender's cloudpickle, beside the captured call."""

_archives: list[str] = []


class PythonVersionMismatch(Exception):
    """The function was captured by another Python than the one that is to run it."""


def prepare(folder: str, call: dict[str, Any]) -> None:
    """Make the sender's cloudpickle ready. Raises PythonVersionMismatch before anything of the call is loaded."""
    made_by, running = tuple(call["python"]), sys.version_info
    if made_by != running[:2]:
        raise PythonVersionMismatch(
            "the function was captured by Python {}.{}, and this machine runs Python {}.{}.{} ({}). A captured "
            "function only works in the same version: run the machine with that Python, or call the function by its "
            "file and name, which works across versions".format(*made_by, *running[:3], sys.executable)
        )
    _archives[:] = [os.path.join(folder, CLOUDPICKLE_ZIP)]
    if "loaders" not in call:
        _cloudpickle()


def _cloudpickle() -> Any:
    """Return cloudpickle: the one that is loaded, or the sender's, which takes longer than all else of a call."""
    if "cloudpickle" not in sys.modules:
        with stdlib.Unshadowed():
            sys.path[:0] = _archives
            __import__("cloudpickle")
    return sys.modules["cloudpickle"]


def load_captured(folder: str, call: dict[str, Any]) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """Return the captured function, and its arguments where they were captured as well."""
    with open(os.path.join(folder, call["function_file"]), "rb") as file:
        loads = _loads_with(file.read(call.get("loaders", 0)))
        data = file.read()
    if "inputs" in call:
        from .objects import Resolver

        _cloudpickle()
        loads = Resolver(folder, call["inputs"]).loads
    function, args, kwargs = loads_captured(data, call.get("sources") or {}, loads)
    return function, args, kwargs


def _loads_with(loaders: bytes) -> Callable[[bytes], Any]:
    """Return `pickle.loads`, for a pickle that needs no more of cloudpickle than these functions of it."""
    if not loaders:
        return pickle.loads
    import io
    import marshal

    found: dict[str, Any] = {"__name__": "cloudpickle.cloudpickle"}
    exec(marshal.loads(loaders), found)  # noqa: S102, S302 - made by the same Python, for the caller's own function

    class WithLoaders(Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "cloudpickle.cloudpickle" and name in found:
                return found[name]
            return super().find_class(module, name)

    return lambda data: WithLoaders(io.BytesIO(data)).load()


def loads_captured(data: bytes, sources: dict[str, str], loads: Callable[[bytes], Any] = pickle.loads) -> Any:
    """Return what was captured; tracebacks show the lines of `sources`, the code's text by file name."""
    _show_sources(sources)
    try:
        return loads(data)
    except ImportError as error:
        raise type(error)(
            f"the captured function needs what this machine does not have: {error}. Install it there (image=), or "
            "upload it as part of code_root",
            name=error.name,
            path=error.path,
        ) from error


def dumps(value: Any, name: str, limit_bytes: int = PICKLE_LIMIT_BYTES) -> bytes:
    """Return `value` as pickle; classes and functions that are not importable travel by value.

    Raises NotSerializable with the path to the part that cannot travel, TooLarge above `limit_bytes`.
    """
    try:
        data = _dumps(value)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise NotSerializable(blame(value, name, error, _dumps)) from error
    if len(data) > limit_bytes:
        raise TooLarge(f"{name} takes {len(data):,} bytes as pickle; at most {limit_bytes:,} can travel")
    return data


def dumps_with_buffers(value: Any, name: str) -> tuple[bytes, list[Any]]:
    """Return the pickle of `value` and its large buffers, which stay where they are. Raises NotSerializable."""
    from . import parcels

    return _blaming(parcels.pickled, value, name)


def pieces(value: Any, name: str) -> list[Any]:
    """Return what a file with `value` as pickle holds (`objects.pickled`). Raises NotSerializable."""
    from . import objects

    return _blaming(objects.pickled, value, name)


def _blaming(make: Callable[[Any, Callable[..., bytes]], T], value: Any, name: str) -> T:
    try:
        return _first_plainly(lambda dump: make(value, dump))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise NotSerializable(blame(value, name, error, _dumps)) from error


def _dumps(value: Any) -> bytes:
    return _first_plainly(lambda dump: dump(value, protocol=PROTOCOL))


def _first_plainly(make: Callable[[Callable[..., bytes]], T]) -> T:
    """Call with cloudpickle's `dumps`; where that is not loaded, with pickle's if that can do it."""
    if "cloudpickle" not in sys.modules:
        try:
            return make(pickle.dumps)
        except Exception:  # it cannot, for whatever reason
            if not _archives:
                raise
    return make(_cloudpickle().dumps)


def blame(value: Any, name: str, error: BaseException, dump: Callable[[Any], object]) -> str:
    """Say which part of `value` cannot be pickled, as in `args[0]['lock'] is a _thread.lock`."""
    seen: set[int] = set()
    while len(seen) < 100:
        seen.add(id(value))
        for step, part in _parts(value):
            if id(part) not in seen and _fails(part, dump):
                name, value = name + step, part
                break
        else:
            break
    return f"{name} {describe(value)} ({type(error).__name__}: {short_text(error)})"


def short_text(error: BaseException) -> str:
    """Return the beginning of an error's text, whatever its __str__ does."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the user's own __str__
        return "its text cannot be read"
    return text if len(text) <= 300 else text[:300] + "…"


def _fails(value: Any, dump: Callable[[Any], object]) -> bool:
    try:
        dump(value)
    except Exception:  # noqa: BLE001 - whatever a user's __reduce__ raises
        return True
    return False


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value consists of, each with the step that leads there."""
    code = getattr(value, "__code__", None)
    if isinstance(value, dict):
        for key, part in value.items():
            yield f"[{short(key)}]", part
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, part in enumerate(value):
            yield f"[{index}]", part
    elif hasattr(value, "__func__") and hasattr(value, "__self__"):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif code is not None and hasattr(value, "__globals__"):
        yield from _function_parts(value, code)
    elif hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        yield ".func", value.func
        yield ".args", value.args
        yield ".keywords", value.keywords
    elif isinstance(value, type) or not _refuses(value):
        for attribute, part in _attributes(value):
            yield f".{attribute}", part


def _refuses(value: Any) -> bool:
    """Whether it is the value itself that says no, whatever it consists of."""
    try:
        value.__reduce_ex__(PROTOCOL)
    except Exception:  # noqa: BLE001 - the user's own __reduce__
        return True
    return False


def _attributes(value: Any) -> Iterable[tuple[str, Any]]:
    held = getattr(value, "__dict__", {})
    if isinstance(value, type):
        return [(key, part) for key, part in held.items() if key not in ("__dict__", "__weakref__")]
    slots = [slot for base in type(value).__mro__ for slot in base.__dict__.get("__slots__", ())]
    return [*dict(held).items(), *((slot, getattr(value, slot)) for slot in slots if hasattr(value, slot))]


def _function_parts(function: Any, code: CodeType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            yield f" (closure variable {name!r})", cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    for default in function.__defaults__ or ():
        yield " (a default)", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f" (the default of {name!r})", default
    for name in sorted(_global_names(code)):
        if name in function.__globals__:
            yield f" (global {name!r})", function.__globals__[name]


def _global_names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names |= _global_names(constant)
    return names


def _show_sources(sources: dict[str, str]) -> None:
    """Let tracebacks and inspect.getsource show code whose file is on the sender's machine only."""
    if "linecache" in sys.modules:
        _fill(sys.modules["linecache"], sources)
    elif sources:
        sys.meta_path.insert(0, _WhenLinecacheIsImported(sources))


def _fill(linecache: Any, sources: Mapping[str, str]) -> None:
    for name, text in sources.items():
        if not os.path.exists(name):
            linecache.cache[name] = (len(text), None, text.splitlines(True), name)


class _WhenLinecacheIsImported:
    """Gives linecache the sources when somebody imports it; to import it for every call would take too long."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = sources

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "linecache":
            return None
        sys.meta_path.remove(self)
        spec: Any = next(filter(None, (one.find_spec(name, path, target) for one in sys.meta_path)), None)
        if spec is not None:
            self.spec, self.loader, spec.loader = spec, spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if hasattr(module, "cache"):  # else a module of the user's has that name
            _fill(module, self.sources)
