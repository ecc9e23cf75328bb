"""Finds Prefect inside a task's body before the body travels to a machine that has no Prefect.

Owns the search and the words. Reads code objects, runs nothing: a body that hides Prefect well (`getattr`, `eval`, a
method of an argument) is not found here and fails there with an ImportError.
"""

from __future__ import annotations

import dis
import sysconfig
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

from prefect.flows import Flow
from prefect.futures import PrefectFuture
from prefect.logging import get_logger, get_run_logger
from prefect.tasks import Task

from flow_core import ValidationError

#: These have a stand-in on the machine.
_REPLACED = (get_run_logger, get_logger)

_INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib"))


def check_body(task: Task[..., Any]) -> None:
    """Raise ValidationError when a task's body cannot run without Prefect, or gives its values one by one."""
    if task.isgenerator:
        raise ValidationError(
            f"task {task.name!r} is a generator: its values cannot come back from a GPU machine one by one",
            suggestions=[
                "Return a list.",
                "Call it in the flow without .submit(): then it runs in the flow's process.",
            ],
        )
    for name, what in _uses(task.fn, set()):
        raise ValidationError(
            f"task {task.name!r} uses Prefect in its body: {name} is {_kind(what)}. "
            "The body runs on a machine that has no Prefect.",
            suggestions=[_advice(task.name, name, what)],
        )


def _uses(function: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield (name, object) for the Prefect objects that a function, or a helper that travels with it, refers to."""
    if not isinstance(function, FunctionType):  # a partial, or a callable object
        function = function.func if isinstance(function, partial) else vars(type(function)).get("__call__")
    if not isinstance(function, FunctionType) or id(function) in seen:
        return
    seen.add(id(function))
    for name, value in [*_imports(function.__code__), *_references(function)]:
        if any(value is one for one in _REPLACED):
            continue
        if _is_prefect(value):
            yield name, value
        else:
            for helper in _functions(value):
                yield from _uses(helper, seen)


def _references(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function's code can reach by name: globals, variables of enclosing functions, defaults."""
    for name in dict.fromkeys(_global_names(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield "the default of a parameter", value


def _global_names(code: CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _global_names(inner)


class _Import:
    """An import statement of Prefect inside a body."""


def _imports(code: CodeType) -> Iterator[tuple[str, Any]]:
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME" and str(step.argval).split(".")[0] == "prefect":
            yield f"'import {step.argval}'", _Import
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _imports(inner)


def _is_prefect(value: Any) -> bool:
    if value is _Import:
        return True
    if isinstance(value, ModuleType):
        return _of_prefect(value.__name__)
    if isinstance(value, FunctionType):
        return _of_prefect(value.__module__)
    ancestors = value.__mro__ if isinstance(value, type) else type(value).__mro__
    return any(_of_prefect(ancestor.__module__) for ancestor in ancestors)


def _of_prefect(module: str | None) -> bool:
    return (module or "").split(".")[0] == "prefect"


def _functions(value: Any) -> Iterator[FunctionType]:
    """Yield the functions that travel by value when `value` does: those that are not installed."""
    found = vars(value).values() if isinstance(value, type) else (value,)
    for one in found:
        if isinstance(one, FunctionType) and not one.__code__.co_filename.startswith(_INSTALLED):
            yield one


def _kind(what: Any) -> str:
    kinds = ((Task, "a Prefect task"), (Flow, "a Prefect flow"), (PrefectFuture, "a Prefect future"))
    for kind, words in kinds:
        if isinstance(what, kind):
            return words
    return "an import of Prefect" if what is _Import else "part of Prefect"


def _advice(task_name: str, name: str, what: Any) -> str:
    if isinstance(what, Task | PrefectFuture):
        return f"Let the flow call {name} and pass the future to {task_name!r}, or use a plain function in the body."
    if what is _Import:
        return (
            "Do it in the flow. (get_run_logger works in a body when it is imported at the top of the file.)"
        )
    return "Do it in the flow, before or after the task, and pass plain values."
