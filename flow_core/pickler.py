"""cloudpickle's pickler, taught to send the user's modules by value, and what it leaves out or refuses by itself.

Importing this imports cloudpickle, which takes longer than all else a call needs.
"""

from __future__ import annotations

import functools
import io
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from flow_core.origin import is_importable, is_project
from flow_core.references import global_names
from flow_core.runner.pickles import PROTOCOL

# What lru_cache makes: cloudpickle sends it by name only.
_CACHED = functools._lru_cache_wrapper  # noqa: SLF001
_CACHE_INFO = functools._CacheInfo  # noqa: SLF001
# What cloudpickle 3.1.3 and later put in the place of the file of any code: tracebacks would show no line of it.
_NO_FILE = "<dynamic-code>"
# cloudpickle keeps one list of modules for the whole process.
_registry_lock = threading.RLock()


def dumps(
    value: object,
    replaced: Mapping[int, tuple[Any, Any]],
    *,
    buffer_callback: Callable[[Any], object] | None = None,
    persistent_id: Callable[[Any], Any] | None = None,
) -> tuple[bytes, set[str]]:
    """Return the pickle of `value`, and the files of the code in it.

    `replaced` holds (original, substitute) by the original's id. The other two are those of `pickle.Pickler`. Nothing
    stays registered with cloudpickle.
    """
    file = io.BytesIO()
    with _registry_lock:
        pickler = Pickler(file, PROTOCOL, buffer_callback)
        pickler.replaced = replaced
        if persistent_id is not None:
            pickler.persistent_id = persistent_id
        try:
            pickler.dump(value)
        finally:
            pickler.unregister()
    return file.getvalue(), pickler.filenames


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle is not typed
    """One pickling of one value."""

    replaced: Mapping[int, tuple[Any, Any]]

    def __init__(
        self, file: io.BytesIO, protocol: int, buffer_callback: Callable[[Any], object] | None = None
    ) -> None:
        super().__init__(file, protocol, buffer_callback)
        self.filenames: set[str] = set()
        self.looked_at: set[str] = set()
        self.registered: list[ModuleType] = []

    def reducer_override(self, obj: Any) -> Any:
        """Take the place of what pickle does with `obj`, NotImplemented where that is right."""
        if id(obj) in self.replaced:
            return operator.getitem, ((self.replaced[id(obj)][1],), 0)
        self._register(obj)
        if isinstance(obj, _CACHED) and not is_importable(obj):
            options = obj.cache_parameters()
            made_of = (obj.__wrapped__, options["maxsize"], options["typed"], _CACHE_INFO)
            return _CACHED, made_of, vars(obj)
        if type(obj) is CodeType:
            make, parts = self.dispatch_table[CodeType](obj)
            return make, tuple(obj.co_filename if part == _NO_FILE else part for part in parts)
        if type(obj) is functools.cached_property:  # before Python 3.12 it holds a lock
            return type(obj), (obj.func,), {"attrname": obj.attrname, "__doc__": obj.__doc__}
        if type(obj) is weakref.WeakKeyDictionary:  # functools.singledispatch keeps one
            return type(obj), (dict(obj),)
        return super().reducer_override(obj)

    def _dynamic_function_reduce(self, func: FunctionType) -> Any:
        reduced = super()._dynamic_function_reduce(func)
        self.filenames.add(func.__code__.co_filename)
        sent = reduced[2][1]["__globals__"]
        for name in global_names(func.__code__):  # cloudpickle overlooks those that class bodies use
            if name in func.__globals__ and name != "__name__":
                sent.setdefault(name, func.__globals__[name])
        return reduced

    def _register(self, obj: Any) -> None:
        """Let the module of `obj` travel by value if it belongs to the user's project."""
        name = obj.__name__ if isinstance(obj, ModuleType) else getattr(obj, "__module__", None)
        if not isinstance(name, str) or name in self.looked_at:
            return
        self.looked_at.add(name)
        module = sys.modules.get(name)
        if (
            module is not None
            and is_project(module, name)
            and name not in cloudpickle.list_registry_pickle_by_value()
        ):
            cloudpickle.register_pickle_by_value(module)
            self.registered.append(module)

    def unregister(self) -> None:
        """Leave cloudpickle's list of modules as it was."""
        for module in self.registered:
            if module.__name__ in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.unregister_pickle_by_value(module)
