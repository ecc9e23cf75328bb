"""RemoteFunction: a plain function whose calls run on the warm workers of a session.

Owns how calls are made, one or many; which workers they go to is the session's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from typing_extensions import ParamSpec

from flow_core import chunks, windows
from flow_core.capture import Captured, Payload, yields
from flow_core.definitions import PLAIN, Definition
from flow_core.dispatch import Pool
from flow_core.errors import ValidationError
from flow_core.function_options import FunctionOptions
from flow_core.futures import Future
from flow_core.references import SentAsFunction
from flow_core.signatures import Fit

if TYPE_CHECKING:
    from flow_core.function_types import FutureOf

P = ParamSpec("P")
L = TypeVar("L")  # what a call gives here
R = TypeVar("R")  # what it gives there

MAX_CONCURRENT = 1000
"""As many calls of one `imap` are under way, where they travel one by one, unless it is told otherwise."""


class Host(Protocol):
    """What a function needs of its session."""

    @property
    def defaults(self) -> FunctionOptions:
        """The options that functions start from."""

    def pool(self, options: FunctionOptions) -> Pool:
        """Return the workers for calls with these options, the same every time. Raises SessionClosedError."""


class RemoteFunction(SentAsFunction, Generic[P, L, R]):
    """A function of a session. Called directly it runs here; `remote` runs it on a worker.

    It travels as its plain function: recursion, and calls of it inside other remote functions, stay on the worker.
    What it refers to is sent as it is at the time of a call, once for as long as it does not change.
    """

    def __init__(self, host: Host, function: Callable[P, L], options: FunctionOptions) -> None:
        if isinstance(function, RemoteFunction):
            function = function.__wrapped__
        functools.update_wrapper(self, function, updated=())
        self.__wrapped__: Callable[P, L] = function
        self._host = host
        self._own = options
        self._options = host.defaults.changed(options)
        self._captured = Captured(function)
        self._name = options.name or self._captured.name
        self._fit = Fit.of(function, self._name)
        self._yields = yields(function)
        self._of_call = self._options.of_call
        self._sent: tuple[Payload, Definition] | None = None
        self._pool: Pool | None = None

    def __repr__(self) -> str:
        return f"<RemoteFunction {self._name}>"

    # -- here

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> L:
        """Call the function in this process."""
        return self.__wrapped__(*args, **kwargs)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> L:
        """Call the function in this process."""
        return self.__wrapped__(*args, **kwargs)

    # -- there

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> FutureOf[R]:
        """Start the function on a worker, as soon as one is free; return the future of its value.

        Futures among the arguments, also inside lists, tuples and dicts, stand for their values. Raises TypeError when
        the arguments do not fit the function, SerializationError when something cannot travel, SessionClosedError.
        """
        return cast("FutureOf[R]", self._submit(args, kwargs))

    def spawn(self, *args: P.args, **kwargs: P.kwargs) -> FutureOf[R]:
        """The same as `remote`."""
        return cast("FutureOf[R]", self._submit(args, kwargs))

    def map(self, items: Iterable[Any]) -> list[FutureOf[R]]:
        """Start one call per item and return their futures; a tuple is unpacked, anything else is one argument.

        However many items there are, only so many calls wait for a worker: beyond that this waits too.
        """
        return [cast("FutureOf[R]", self._submit(_arguments(item), {})) for item in items]

    def starmap(self, items: Iterable[Iterable[Any]]) -> list[FutureOf[R]]:
        """Start one call per item, which is unpacked whatever it is; return their futures."""
        return [cast("FutureOf[R]", self._submit(tuple(item), {})) for item in items]

    def imap(
        self,
        items: Iterable[Any],
        *,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        max_concurrent: int | None = None,
    ) -> Iterator[R]:
        """Yield the value for each item, lazily: in the items' order, or else as they come.

        A tuple is unpacked, anything else is one argument. At most `max_concurrent` items are taken ahead of what has
        been yielded; without it, a few milliseconds of work for each worker. Short calls travel several at a time. The
        first failure is raised, or its exception yielded with `return_exceptions`. When the iteration ends early, the
        calls under way are cancelled.
        """
        if max_concurrent is not None and max_concurrent < 1:
            raise ValidationError(f"max_concurrent={max_concurrent!r} must be a whole number from 1")
        if self._yields or self._of_call != PLAIN:
            futures = (self._submit(_arguments(item), {}) for item in items)
            return windows.values(
                futures,
                limit=max_concurrent or MAX_CONCURRENT,
                ordered=order_outputs,
                return_exceptions=return_exceptions,
            )
        return chunks.run(
            self._current,
            items,
            shape=self._shaped,
            ordered=order_outputs,
            return_exceptions=return_exceptions,
            max_concurrent=max_concurrent,
        )

    def _shaped(self, items: list[Any]) -> tuple[Sequence[Any], bool]:
        """Return the one argument of each call, or the lists of all, and which of both it is. Raises TypeError."""
        if not any(issubclass(kind, tuple) for kind in set(map(type, items))):
            self._fit.check(items[:1], {})
            return items, False
        arguments = [_arguments(item) for item in items]
        for args in arguments:
            self._fit.check(args, {})
        return arguments, True

    def options(self, **overrides: Any) -> RemoteFunction[P, L, R]:
        """Return the same function with other options; this one stays as it is."""
        own = {name: getattr(self._own, name) for name in self._own.model_fields_set}
        changed = FunctionOptions(**own).changed(FunctionOptions(**overrides))
        return RemoteFunction(self._host, self.__wrapped__, changed)

    def _submit(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Future:
        self._fit.check(args, kwargs)
        pool, definition = self._current()
        return pool.submit(definition, args, kwargs, self._of_call)

    def _current(self) -> tuple[Pool, Definition]:
        """Return the workers, and the function as it is now."""
        payload = self._captured.fresh()
        sent = self._sent
        if sent is None or sent[0] is not payload:
            sent = self._sent = payload, self._define(payload)
        pool = self._pool
        if pool is None or pool.over is not None:
            pool = self._pool = self._host.pool(self._options)
        return pool, sent[1]

    def _define(self, payload: Payload) -> Definition:
        return Definition(
            payload.data,
            self._name,
            codec=self._options.serialization.value,
            generator=self._yields,
            sources=payload.sources,
            refs=payload.refs,
        )


def _arguments(item: Any) -> tuple[Any, ...]:
    return item if isinstance(item, tuple) else (item,)
