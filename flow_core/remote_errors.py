"""Lets an error be an instance of a user's exception class without running the user's code.

Owns the search for that class and the class that mixes it in. Imports nothing, runs no `__init__`,
`__new__`, `__init_subclass__`, property or metaclass of the user's, and gives up where it would have to.
"""

from __future__ import annotations

import functools
import sys
from abc import ABCMeta
from types import ModuleType
from typing import Any, TypeVar

E = TypeVar("E", bound=Exception)

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class was made by a class statement, not in C
# Raising these means something to the interpreter or to asyncio, wherever they come from.
_STEERING = (StopIteration, StopAsyncIteration)
# Not inherited by us, and harmless.
_INERT = frozenset({"__annotations__", "__dict__", "__doc__", "__module__", "__slots__", "__weakref__"})


def find_exception_class(module: str, qualname: str) -> type[Exception] | None:
    """The exception class of this name in a module that is already loaded, or None.

    Looks only into the dictionaries of modules and classes, so that no lazy loader, module `__getattr__`
    or descriptor is set off. Not found are classes that are not plain `Exception`s (SystemExit,
    KeyboardInterrupt, asyncio.CancelledError …), that steer iteration, that are groups, or that have a
    metaclass of their own.
    """
    loaded = sys.modules.get(module)
    if loaded is None or not issubclass(type(loaded), ModuleType):
        return None
    found: Any = None
    namespace: Any = ModuleType.__getattribute__(loaded, "__dict__")
    for part in qualname.split("."):
        found = namespace.get(part)
        if type(found) not in (type, ABCMeta):
            return None
        namespace = found.__dict__
    ancestors: tuple[type, ...] = found.__mro__
    if Exception not in ancestors or any(steering in ancestors for steering in _STEERING):
        return None
    if any(ancestor.__name__ == "BaseExceptionGroup" for ancestor in ancestors):
        return None  # a group without its members would mislead `except*`
    exception: type[Exception] = found
    return exception


@functools.lru_cache(maxsize=256)
def mixed_class(base: type[E], user: type[Exception], fields: frozenset[str]) -> type[E]:
    """A subclass of `base` whose instances are instances of `user` too; `base` where that is impossible.

    It looks and behaves like `base`: what `user` defines under a special name, or under one of `fields`
    (the names that instances of `base` keep their values under), does not come through, because it counts
    on a `__init__` that never ran. The user's other methods are there.
    """
    if user in base.__mro__:
        return base
    namespace = _shadows(base, user, fields)
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    namespace["__new__"] = _new
    try:
        return type(base.__name__, (base, user), namespace)
    except TypeError:  # the two layouts, or the two orders of ancestors, do not go together
        return base


def restore_native_fields(error: Exception, args: object) -> None:
    """Set what a built-in exception keeps outside its `__dict__`, past any property of the user's class.

    `args` are those of the remote exception, None where they could not travel.
    """
    mro = type(error).__mro__
    if isinstance(args, list | tuple):
        error.args = tuple(args)
        if OSError in mro and len(args) > 1:
            vars(OSError)["errno"].__set__(error, args[0])
            vars(OSError)["strerror"].__set__(error, args[1])
    if SyntaxError in mro:
        vars(SyntaxError)["msg"].__set__(error, str(error))  # what a traceback shows of a SyntaxError


class _Field:
    """An instance attribute that no property or slot of the user's class can intercept."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        try:
            return instance.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = value


def _shadows(base: type, user: type, fields: frozenset[str]) -> dict[str, Any]:
    """What the mixed class must define so that nothing of the user's class runs behind the scenes."""
    theirs = {name for ancestor in user.__mro__ if _is_python_class(ancestor) for name in ancestor.__dict__}
    shadows: dict[str, Any] = {name: _Field(name) for name in fields & theirs}
    for name in theirs - fields - _INERT:
        ours = [ancestor for ancestor in base.__mro__ if name in ancestor.__dict__]
        if ours:
            shadows[name] = ours[0].__dict__[name]
    if "__getattr__" in theirs:
        shadows["__getattr__"] = _no_attribute
    if "__del__" in theirs:
        shadows["__del__"] = _nothing_to_delete
    if theirs & {"__bool__", "__len__"}:
        shadows["__bool__"] = _always_true
    return shadows


def _is_python_class(cls: type) -> bool:
    return bool(cls.__flags__ & _HEAP_TYPE)


def _new(cls: type, message: str = "", **_: Any) -> Any:
    """Make the object as its nearest ancestor in C does, which leaves out every `__new__` written in Python."""
    native: Any = cls
    while _is_python_class(native):
        native = native.__base__
    return native.__new__(cls, message)


def _no_attribute(self: object, name: str) -> Any:
    raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _nothing_to_delete(self: object) -> None:
    """The user's object was never made."""


def _always_true(_self: object) -> bool:
    return True
