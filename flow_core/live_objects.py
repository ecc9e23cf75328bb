"""What lives on a worker as a service: how it gets there, and what can be called of it as far as is known here."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flow_core.capture import function_name, payload_of, yields
from flow_core.definitions import Definition
from flow_core.errors import SerializationError, close_names
from flow_core.futures import Future
from flow_core.object_ref import revived
from flow_core.references import SentAsFunction
from flow_core.signatures import Fit

_MISSING = object()


class LiveObject:
    """A function, a class or an object that is to be a service, with the arguments that a class is made into one with.

    Raises TypeError where they do not fit.
    """

    def __init__(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if isinstance(target, SentAsFunction):
            target = target.__wrapped__
        self.target = target
        self.name = function_name(target)
        self.args, self.kwargs = tuple(args), dict(kwargs)
        self.is_function = inspect.isroutine(target) or isinstance(target, functools.partial)
        self._is_class = isinstance(target, type)
        self._owner: type = target if self._is_class else type(target)
        if self._is_class:
            Fit.of(target, self.name).check(self.args, self.kwargs)
        elif args or kwargs:
            raise TypeError(f"args and kwargs are for a class, and {self.name} is none: it travels as it is")

    # -- how it gets there

    def function(self) -> Definition:
        """Return what is called of a function."""
        return self._sent(self.target, "function", generator=yields(self.target))

    def made_once(self) -> Definition:
        """Return the call that makes the one object of a service; it takes `args` and `kwargs`."""
        return self._sent(self.target, "make")

    def made_on_each(self) -> Definition:
        """Return what every worker makes an object of its own with. Raises SerializationError."""
        if any(isinstance(one, Future) for one in (*self.args, *self.kwargs.values())):
            raise SerializationError(
                f"an argument of {self.name} is a future, and objects of a pool are made at any time",
                suggestions=["Wait for it: pass future.get()."],
            )
        if self._is_class:
            args, kwargs = revived([list(self.args), self.kwargs], [])
            return self._sent(functools.partial(self.target, *args, **kwargs), "each")
        return self._sent(functools.partial(operator.getitem, (self.target,), 0), "each")

    def _sent(self, value: Any, kind: str, *, generator: bool = False) -> Definition:
        payload = payload_of(value, self.name)
        return Definition(
            payload.data,
            self.name,
            codec="pickle",
            kind=kind,
            generator=generator,
            sources=payload.sources,
            refs=payload.refs,
        )

    # -- what can be called

    def methods(self) -> list[str]:
        """Return the public names that can be called, sorted."""
        if self.is_function:
            return []
        names = {*dir(self._owner), *getattr(self.target, "__dict__", {})}
        return sorted(name for name in names if not name.startswith("_") and callable(self._found(name)))

    def definition(self, name: str, maker: Definition) -> Definition:
        """Return a call of the method `name`, of the object itself where `name` is empty."""
        found = self._found(name or "__call__")
        return Definition(b"", name, codec="pickle", kind="method", of=maker, generator=yields(_plain(found)))

    def fit(self, name: str) -> Fit:
        """Return what arguments the method takes, of the object or function itself where `name` is empty."""
        if self.is_function:
            return Fit.of(self.target, self.name)
        name = name or "__call__"
        if not self._is_class and name in getattr(self.target, "__dict__", {}):
            return Fit.of(getattr(self.target, name), f"{self.name}.{name}")
        if self._found(name) is _MISSING:
            return Fit(f"{self.name}.{name}", None)  # perhaps the object gets it when it is made
        return Fit.of_method(self._owner, name)

    @property
    def can_be_called(self) -> bool:
        """Whether the service itself can be called."""
        return self.is_function or callable(self._found("__call__"))

    def why_not(self, name: str) -> str:
        """Say why there is no method of this name, and what to do."""
        if self.is_function:
            return f"{self.name} is a function: call the service itself"
        found = self._found(name)
        if found is not _MISSING or name in getattr(self._owner, "__annotations__", {}):
            kind = (
                "a property" if isinstance(found, (property, functools.cached_property)) else "an attribute"
            )
            return (
                f"{name!r} is {kind} of {self.name}, which lives on a worker: only methods can be called from here. "
                "Add a method that returns it"
            )
        near = close_names(name, self.methods())
        hint = (
            f"; did you mean {near[0]!r}?"
            if near
            else f". Its methods: {', '.join(self.methods()) or 'none'}."
        )
        return (
            f"{self.name} has no method {name!r}{hint} One that the object only gets when it is made is called by "
            f"service.method({name!r})(…)"
        )

    def _found(self, name: str) -> Any:
        """Look an attribute up without running any code of it; what the class has, and for an object what it has."""
        held = {} if self._is_class else getattr(self.target, "__dict__", {})
        # Not getattr_static: for a class that also looks at what its metaclass has.
        found = next((vars(base)[name] for base in self._owner.__mro__ if name in vars(base)), _MISSING)
        if name in held and not inspect.isdatadescriptor(found):
            return held[name]
        if isinstance(found, (staticmethod, classmethod)):
            return found.__func__
        if isinstance(found, (functools.partialmethod, functools.singledispatchmethod)):
            return found.__get__(None, self._owner)
        return found


def _plain(found: Any) -> Callable[..., Any]:
    while isinstance(found, functools.partial):
        found = found.func
    return found  # type: ignore[no-any-return]
