"""Session: workers that start once and stay warm, and the functions whose calls run on them."""

from __future__ import annotations

import atexit
import functools
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from pydantic import Field
from typing_extensions import ParamSpec, Self

from flow_core.definitions import SessionSpec
from flow_core.dispatch import Pool
from flow_core.errors import SessionClosedError, ValidationError
from flow_core.flow import Flow
from flow_core.function_options import FunctionOptions
from flow_core.functions import RemoteFunction
from flow_core.models import MountSpec, Region, TaskName, VolumeSpec
from flow_core.values import Items, Number, Text

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Unpack

    from flow_core.function_types import Decorator, FunctionKeywords, RemoteGenerator, SessionKeywords
    from flow_core.providers.spi import Provider
    from flow_core.task import Task

P = ParamSpec("P")
R = TypeVar("R")


class SessionDefaults(FunctionOptions):
    """The options of a session: those that its functions start from, and those of its task.

    `workers` processes are started on one machine, each with its own `gpu`. Without a call for `idle_limit` seconds
    they end, and the next call starts them anew. When the process that opened the session has been silent for `lease`
    seconds, they end too. `tags` and `labels` mark the task; the other fields are those of `TaskConfig`.
    """

    other_names = {**FunctionOptions.other_names, "idle_limit": "idle_limit_s", "lease": "lease_s"}  # noqa: RUF012

    name: TaskName | None = Field(None, examples=["embeddings"])
    tags: Items[Text] = Field((), examples=[["nightly"]])
    labels: dict[Text, str] = Field({}, examples=[{"team": "vision"}])
    idle_limit_s: Number | None = Field(None, gt=0, examples=[600])
    lease_s: Number = Field(30.0, ge=1, le=3600, examples=[30])
    volumes: Items[VolumeSpec] = Field((), examples=[[{"name": "data", "size_gb": 100}]])
    data_mounts: Items[MountSpec] = Field((), examples=[[{"source": "s3://bucket/data", "target": "/data"}]])
    region: Region | None = Field(None, examples=["us-central1-b"])
    max_price_per_hour: Number | None = Field(None, gt=0, examples=[10.0])
    max_run_time_hours: Number | None = Field(None, gt=0, examples=[24.0])

    def spec(self, of_function: FunctionOptions, instance_type: str) -> SessionSpec:
        """Return what a session's task for functions with these options is started with."""
        task: dict[str, Any] = {
            name: getattr(self, name) for name in _OF_TASK if name in self.model_fields_set
        }
        task["labels"] = {**self.labels, **dict.fromkeys(self.tags, "")}
        return SessionSpec(
            name=self.name or "session",
            workers=of_function.workers,
            instance_type=of_function.instance_type or instance_type,
            image=of_function.image,
            env=of_function.env,
            idle_limit_s=self.idle_limit_s,
            lease_s=self.lease_s,
            startup_timeout_s=of_function.startup_timeout_s,
            task=task,
        )


_OF_TASK = ("volumes", "data_mounts", "region", "max_price_per_hour", "max_run_time_hours")
_open: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """Warm workers for functions. The workers start with the first call, and end with the session.

        with Session(gpu="a100", workers=2) as session:
            @session.function()
            def f(x): ...
            f.remote(1).result()

    `defaults` and keywords are those of `SessionDefaults`; a keyword wins. `provider` is a name or a Provider, or
    `flow` has the settings. Thread-safe. Installs no signal handlers; what is open is closed when the interpreter ends.
    """

    def __init__(
        self,
        defaults: SessionDefaults | Mapping[str, Any] | None = None,
        *,
        provider: str | Provider | None = None,
        flow: Flow | None = None,
        **options: Unpack[SessionKeywords],
    ) -> None:
        if provider is not None and flow is not None:
            raise ValidationError(
                "got both provider and flow", suggestions=["Give one: a Flow has its provider."]
            )
        base = defaults if isinstance(defaults, SessionDefaults) else SessionDefaults(**(defaults or {}))
        self.defaults = base.changed(SessionDefaults(**cast(Any, options)))
        self.flow = flow or Flow(provider)
        self._lock = threading.Lock()
        self._pools: dict[str, Pool] = {}
        self._joined: Pool | None = None
        self._closed = False
        self._pid = os.getpid()
        _open.add(self)

    @classmethod
    def from_id(
        cls,
        task_id: str,
        *,
        provider: str | Provider | None = None,
        flow: Flow | None = None,
        **options: Unpack[SessionKeywords],
    ) -> Self:
        """Join a session that another process has opened; see `task_id`. Its image, GPUs and variables are as they are.

        Calls go to its first `workers` workers, which are started where they are not there; without that, to those that
        the fewest clients use at the moment. `close` leaves it open for the others. Raises TaskNotFoundError.
        """
        session = cls(provider=provider, flow=flow, **options)
        spec = session._spec(session.defaults)
        spread = "workers" not in session.defaults.model_fields_set
        session._joined = session._pools[_key(spec)] = Pool.attach(session.flow, task_id, spec, spread=spread)
        return session

    @classmethod
    def start(
        cls,
        *,
        provider: str | Provider | None = None,
        flow: Flow | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[SessionKeywords],
    ) -> Task:
        """Start a session that nobody owns, and return its task; any process joins it with `from_id`.

        It outlives this process, and no lease ends it: only `task.cancel()`, `idle_limit` seconds without a call, or
        `max_run_time_hours`. One of the two limits has to be given. With `idempotency_key` the same key gets the same
        session. Raises ValidationError, and what `Flow.run` raises.
        """
        session = cls(provider=provider, flow=flow, **options)
        limits = (session.defaults.idle_limit_s, session.defaults.max_run_time_hours)
        if limits == (None, None):
            raise ValidationError(
                "a session that nobody owns needs an end",
                suggestions=["Give idle_limit= (seconds without a call) or max_run_time_hours=."],
            )
        spec = replace(session._spec(session.defaults), owned=False)
        return session.flow.start_session(spec.orders(), idempotency_key=idempotency_key, **spec.machine())

    def __repr__(self) -> str:
        return f"<Session {self.defaults.name or 'session'}{' (closed)' if self._closed else ''}>"

    @property
    def task_id(self) -> str:
        """The id of the session's task, with which another process can join it or watch it. Starts the workers."""
        return self.pool(self.defaults).task_id

    # -- functions

    @overload
    def function(
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> RemoteFunction[P, Coroutine[Any, Any, R], R]: ...
    @overload
    def function(self, function: Callable[P, Iterator[R]], /) -> RemoteGenerator[P, Iterator[R], R]: ...
    @overload
    def function(
        self, function: Callable[P, AsyncIterator[R]], /
    ) -> RemoteGenerator[P, AsyncIterator[R], R]: ...
    @overload
    def function(self, function: Callable[P, R], /) -> RemoteFunction[P, R, R]: ...
    @overload
    def function(self, /, **options: Unpack[FunctionKeywords]) -> Decorator: ...

    def function(self, function: Any = None, /, **options: Any) -> Any:
        """Make a function's calls run on this session's workers: `@session.function`, or with options in parentheses.

        The options are those of `FunctionOptions`. Raises ValidationError for an unknown one, and lists the close ones.
        """
        checked = FunctionOptions(**options)
        if function is None:
            return functools.partial(RemoteFunction, self, options=checked)
        return RemoteFunction(self, function, checked)

    def pool(self, options: FunctionOptions) -> Pool:
        """Return the workers for functions with these options; they are started when there are none yet.

        Raises SessionClosedError, and what `Flow.run` raises when a task cannot be started.
        """
        spec = self._spec(options)
        key = _key(spec)
        with self._lock:
            if self._closed:
                raise SessionClosedError("this session is closed", suggestions=["Open a new one."])
            pool = self._pools.get(key)
            if pool is None or (pool.gone and pool is not self._joined):
                pool = self._pools[key] = Pool.open(self.flow, spec)
            return pool

    def _spec(self, options: FunctionOptions) -> SessionSpec:
        return self.defaults.spec(options, self.flow.settings.default_instance_type)

    # -- the end

    def close(self) -> None:
        """End the workers. Calls that have not ended are cancelled, later ones are refused. Idempotent."""
        with self._lock:
            self._closed = True
            pools, self._pools = list(self._pools.values()), {}
        _open.discard(self)
        closing = [
            threading.Thread(target=pool.leave if pool is self._joined else pool.close) for pool in pools
        ]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import asyncio

        await asyncio.to_thread(self.close)

    def __reduce__(self) -> Any:
        raise TypeError("a session cannot travel: it belongs to the process that opened it")


SandboxDefaults = SessionDefaults


def _key(spec: SessionSpec) -> str:
    """Tell apart what needs workers of its own."""
    return repr(
        (spec.instance_type, spec.image, sorted(spec.env.items()), spec.workers, spec.startup_timeout_s)
    )


@atexit.register
def _close_all() -> None:
    for session in list(_open):
        if session._pid == os.getpid():  # noqa: SLF001 - not after a fork
            session.close()
