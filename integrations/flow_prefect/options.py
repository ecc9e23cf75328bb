"""What a task asks of its machine: the runner's defaults, then the function's own wish, then that of the moment.

Owns how the three are merged and checked. Knows nothing of running them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import Any, TypeVar

from prefect.tasks import Task

from flow_core import TaskConfig, ValidationError

F = TypeVar("F", bound="Callable[..., Any] | Task[..., Any]")

#: Three ways to say the same thing: the last word wins over all of them.
_MACHINE = frozenset({"gpu", "instance_type", "min_gpu_memory_gb"})

#: Fields of TaskConfig that a Prefect task fills itself: its body is the command, and the runner knows the key.
_OURS = frozenset({"code_root", "command", "idempotency_key", "script", "shell", "upload_code"})

_ON_FUNCTION = "__flow_options__"
_of_the_moment: ContextVar[Mapping[str, Any]] = ContextVar("flow_options")


class flow_options:  # noqa: N801 - read as a decorator and as a `with` statement
    """What one task, or what is submitted within a block, asks of its machine. TaskConfig's fields are keywords.

    Under `@task` (or over it) it belongs to the function, also after `with_options`. As a context manager it applies to
    what is submitted inside, blocks inside blocks included. The inner word wins: runner < function < block; `env` and
    `labels` are merged key by key. Raises ValidationError at once for what can never be right::

        @task
        @flow_options(gpu="8xh100")
        def train(): ...

        with flow_options(max_price_per_hour=2.5):
            train.submit()
    """

    def __init__(self, **options: Any) -> None:
        check(options)
        self.options = options
        self._tokens: list[Token[Mapping[str, Any]]] = []

    def __call__(self, function: F) -> F:
        """Return the same function, or task, with these options as its own."""
        target = function.fn if isinstance(function, Task) else function
        setattr(target, _ON_FUNCTION, merge(self.options, getattr(target, _ON_FUNCTION, {})))
        return function

    def __enter__(self) -> None:
        self._tokens.append(_of_the_moment.set(merge(_of_the_moment.get({}), self.options)))

    def __exit__(self, *_exc: object) -> None:
        _of_the_moment.reset(self._tokens.pop())


def wanted(defaults: Mapping[str, Any], function: object) -> dict[str, Any]:
    """Return what a function asks for that is submitted here and now."""
    return merge(defaults, getattr(function, _ON_FUNCTION, {}), _of_the_moment.get({}))


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return all layers as one: a later layer wins over an earlier one. Pure."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if _MACHINE & layer.keys():
            merged = {name: value for name, value in merged.items() if name not in _MACHINE}
        joined = [name for name in ("env", "labels") if merged.get(name) and layer.get(name)]
        merged |= {**layer, **{name: {**merged[name], **layer[name]} for name in joined}}
    return merged


def check(options: Mapping[str, Any]) -> None:
    """Raise ValidationError for an option that can never be right, or that is not the user's to set."""
    ours = sorted(_OURS & options.keys())
    if ours:
        raise ValidationError(
            f"{ours[0]}= cannot be set for a Prefect task: its body is what runs",
            suggestions=["To run a command, call flow_core.run() in a task of your own."],
        )
    machine: dict[str, Any] = {} if _MACHINE & options.keys() else {"instance_type": "cpu"}
    TaskConfig(**machine, **options)
