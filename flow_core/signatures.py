"""Whether the arguments of a call fit, found out before anything is sent. Pure."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NEVER = (1, 0)


class Fit:
    """What arguments a callable takes. One whose signature Python does not know takes all."""

    def __init__(self, name: str, signature: inspect.Signature | None) -> None:
        self.name = name
        self.signature = signature
        self._counts = (0, float("inf")) if signature is None else _counts(signature)

    @classmethod
    def of(cls, function: Callable[..., Any], name: str) -> Fit:
        """Return what a function, a class or a bound method takes."""
        try:
            # Not what a decorator wraps: the wrapper may take other arguments.
            return cls(name, inspect.signature(function, follow_wrapped=False))
        except (TypeError, ValueError):  # a function in C does not always have one
            return cls(name, None)

    @classmethod
    def of_method(cls, owner: type, name: str) -> Fit:
        """Return what the method `name` of an instance of `owner` takes, without `self`."""
        found = inspect.getattr_static(owner, name)
        full = f"{owner.__name__}.{name}"
        if isinstance(found, (staticmethod, classmethod)):
            return cls.of(getattr(owner, name), full)
        if isinstance(found, FunctionType):
            return cls.of(functools.partial(found, None), full)
        return cls(full, None)

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError, as the call itself would, where the arguments do not fit."""
        low, high = self._counts
        if (not kwargs and low <= len(args) <= high) or self.signature is None:
            return
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"the arguments of the call do not fit {self.name}{self.signature}: {error}"
            ) from None


def _counts(signature: inspect.Signature) -> tuple[float, float]:
    """Return how many positional arguments alone are few and many enough."""
    low, high = 0.0, 0.0
    for parameter in signature.parameters.values():
        required = parameter.default is inspect.Parameter.empty
        if parameter.kind in _POSITIONAL:
            low, high = low + required, high + 1
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            high = float("inf")
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY and required:
            return _NEVER
    return low, high
