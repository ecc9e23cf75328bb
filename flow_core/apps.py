"""FlowApp: functions of which each call is a task of its own, on a machine with what the function needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from typing_extensions import ParamSpec

from flow_core import windows
from flow_core.capture import function_name
from flow_core.default_flow import default
from flow_core.errors import SerializationError, ValidationError
from flow_core.flow import Flow
from flow_core.function_options import Serialization
from flow_core.futures import Future
from flow_core.models import TaskConfig
from flow_core.payload import CANNOT_SERIALIZE
from flow_core.references import SentAsFunction
from flow_core.runner.strict_json import NotSerializable, from_json, to_json
from flow_core.signatures import Fit
from flow_core.task_futures import TaskFuture

if TYPE_CHECKING:
    from flow_core.function_types import AppDecorator, FutureOf
    from flow_core.providers.spi import Provider

P = ParamSpec("P")
L = TypeVar("L")  # what a call gives here
R = TypeVar("R")  # what it gives there

_OUR_OWN = ("command", "shell", "script", "upload_code", "code_root", "idempotency_key", "num_instances")


class FlowApp:
    """Functions that ask for a machine of their own at each call.

        app = FlowApp()

        @app.function(gpu="a100", memory=32768)
        def train(data: str) -> float: ...

        train("here.csv")             # runs here
        train.remote("there.csv")     # runs on the machine; its value
        train.spawn("there.csv")      # the same, as a future

    `provider` is a name or a Provider, or `flow` has the settings; keywords are defaults for the functions.
    """

    def __init__(
        self, *, provider: str | Provider | None = None, flow: Flow | None = None, **defaults: Any
    ) -> None:
        if provider is not None and flow is not None:
            raise ValidationError(
                "got both provider and flow", suggestions=["Give one: a Flow has its provider."]
            )
        self._provider = provider
        self._flow = flow
        self._defaults = _checked(defaults)

    @functools.cached_property
    def flow(self) -> Flow:
        """What the tasks are submitted with; made from the settings at the first call."""
        if self._flow is not None:
            return self._flow
        return default() if self._provider is None else Flow(self._provider)

    @overload
    def function(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AppFunction[P, Coroutine[Any, Any, R], R]: ...
    @overload
    def function(self, function: Callable[P, R], /) -> AppFunction[P, R, R]: ...
    @overload
    def function(self, /, **options: Any) -> AppDecorator: ...

    def function(self, function: Any = None, /, **options: Any) -> Any:
        """Make a function callable on a machine: `@app.function(gpu="a100")`, or `@app.function`.

        `serialization` governs arguments and value ("json" or "pickle"); the other options are fields of `TaskConfig`,
        such as `gpu`, `memory_mb` (or `memory`), `image`, `env`, `max_run_time_hours`. Raises ValidationError for an
        unknown one.
        """
        checked = _checked({**self._defaults, **options})
        if function is None:
            return functools.partial(AppFunction, self, options=checked)
        return AppFunction(self, function, checked)


class AppFunction(SentAsFunction, Generic[P, L, R]):
    """A function of an app. Called directly it runs here. It travels as its plain function."""

    def __init__(self, app: FlowApp, function: Callable[P, L], options: Mapping[str, Any]) -> None:
        functools.update_wrapper(self, function, updated=())
        self.__wrapped__: Callable[P, L] = function
        self._app = app
        self._options = options
        self._name = function_name(function)
        self._codec = Serialization(options.get("serialization", "json"))
        self._task_params = {name: value for name, value in options.items() if name != "serialization"}
        self._fit = Fit.of(function, self._name)

    def __repr__(self) -> str:
        return f"<AppFunction {self._name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> L:
        """Call the function in this process."""
        return self.__wrapped__(*args, **kwargs)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> L:
        """Call the function in this process."""
        return self.__wrapped__(*args, **kwargs)

    def remote(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function on a machine of its own and return its value.

        Raises RemoteExecutionError, also an instance of the function's own exception class, when it raised; the error
        of the task when it ended in another way. If this call is interrupted, the task is cancelled.
        """
        future = self._start(args, kwargs)
        try:
            return cast("R", future.result())
        except (KeyboardInterrupt, SystemExit):
            future.cancel()
            raise

    def spawn(self, *args: P.args, **kwargs: P.kwargs) -> FutureOf[R]:
        """Start the function on a machine of its own and return a future; `task_id` names the task.

        Raises TypeError when the arguments do not fit the function, SerializationError when something cannot travel.
        """
        return cast("FutureOf[R]", self._start(args, kwargs))

    def map(
        self,
        inputs: Iterable[Any],
        *,
        kwargs: Mapping[str, Any] | None = None,
        max_concurrent: int = 10,
        order_outputs: bool = True,
        return_exceptions: bool = False,
    ) -> Iterator[R]:
        """Yield the value for each input, its one argument, lazily; at most `max_concurrent` tasks run at a time.

        The first failure is raised, or its exception yielded with `return_exceptions`. When the iteration ends early,
        the tasks that run are cancelled.
        """
        return self.starmap(
            ((one,) for one in inputs),
            kwargs=kwargs,
            max_concurrent=max_concurrent,
            order_outputs=order_outputs,
            return_exceptions=return_exceptions,
        )

    def starmap(
        self,
        inputs: Iterable[Iterable[Any]],
        *,
        kwargs: Mapping[str, Any] | None = None,
        max_concurrent: int = 10,
        order_outputs: bool = True,
        return_exceptions: bool = False,
    ) -> Iterator[R]:
        """Yield the value for each input, all its arguments, lazily; see `map`."""
        if max_concurrent < 1:
            raise ValidationError(f"max_concurrent={max_concurrent!r} must be a whole number from 1")
        futures: Iterator[Future] = (self._start(tuple(one), kwargs or {}) for one in inputs)
        return windows.values(
            futures, limit=max_concurrent, ordered=order_outputs, return_exceptions=return_exceptions
        )

    def options(self, **overrides: Any) -> AppFunction[P, L, R]:
        """Return the same function with other options; this one stays as it is."""
        return AppFunction(self._app, self.__wrapped__, _checked({**self._options, **overrides}))

    def _start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TaskFuture:
        self._fit.check(args, kwargs)
        if self._codec is Serialization.JSON:
            args, kwargs = _as_json(args, kwargs)
        task = self._app.flow.call_async(
            self.__wrapped__, args, kwargs, serialization=self._codec.value, **self._task_params
        )
        return TaskFuture(self._app.flow.engine, task, self._name, self._codec.value)


def _as_json(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments as JSON brings them there. Raises SerializationError for what it cannot carry."""
    try:
        return tuple(from_json(to_json(list(args), "args"))), from_json(to_json(dict(kwargs), "kwargs"))
    except NotSerializable as error:
        raise SerializationError(f"{CANNOT_SERIALIZE} {error}") from None


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a function. Raises ValidationError for unknown and impossible ones."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        Serialization(given.get("serialization", "json"))
    except ValueError:
        raise ValidationError(
            f"serialization={given['serialization']!r} must be 'json' or 'pickle'"
        ) from None
    of_task = {name: value for name, value in given.items() if name != "serialization"}
    unfit = [name for name in of_task if name in _OUR_OWN]
    if unfit:
        raise ValidationError(
            f"{unfit[0]} is no option of a function", suggestions=["Use flow.run() for it."]
        )
    if not {"instance_type", "gpu", "min_gpu_memory_gb"} & set(of_task):
        of_task["instance_type"] = "cpu"
    TaskConfig(**of_task)
    return given
