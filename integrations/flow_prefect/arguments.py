"""Arguments as a machine without Prefect and without flow_core can take them. Pure."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from prefect.futures import PrefectFutureList

from flow_core import FlowError, RemoteExecutionError


def plain(value: Any) -> Any:
    """Return the same value without types of Prefect and of ours, in lists, tuples and dicts however deep.

    What came out of `.map()` is a list, and an error that `allow_failure` lets through is the exception that the body
    raised, or a RuntimeError that tells of it. What holds none of these is returned itself, not a copy.
    """
    return _plain(value, ())


def _plain(value: Any, inside: tuple[int, ...]) -> Any:
    if isinstance(value, FlowError):
        return _exception(value)
    if id(value) in inside:  # a list that contains itself
        return value
    inside = (*inside, id(value))
    if type(value) is dict:
        items = [_plain(item, inside) for item in value.values()]
        return value if _same(items, value.values()) else dict(zip(value, items, strict=True))
    if type(value) in (list, tuple) or isinstance(value, PrefectFutureList):
        items = [_plain(item, inside) for item in value]
        if isinstance(value, PrefectFutureList):
            return items
        return value if _same(items, value) else type(value)(items)
    return value


def _same(items: list[Any], others: Iterable[Any]) -> bool:
    return all(one is other for one, other in zip(items, others, strict=True))


def _exception(error: FlowError) -> Exception:
    if not isinstance(error, RemoteExecutionError):
        return RuntimeError(f"{type(error).__name__}: {error.message}")
    kind = getattr(builtins, error.exception_type, None) if error.exception_module == "builtins" else None
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):  # a few want more than a text
            return kind(error.exception_message)
    return RuntimeError(f"{error.exception_type}: {error.exception_message}")
