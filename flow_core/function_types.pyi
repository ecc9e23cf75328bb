# The types of remote functions that only the type checker needs: there is no module of this name at run time.

from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypedDict, TypeVar, overload

from typing_extensions import ParamSpec

from flow_core.apps import AppFunction
from flow_core.definitions import Retries
from flow_core.function_options import Serialization
from flow_core.functions import RemoteFunction
from flow_core.futures import Future
from flow_core.models import MountSpec, VolumeSpec
from flow_core.streamed import Stream

_P = ParamSpec("_P")
_L = TypeVar("_L")
_R = TypeVar("_R")

class FutureOf(Future, Generic[_R]):
    # A future and the type of its value.
    def result(self, timeout: float | None = None) -> _R: ...
    def get(self, timeout: float | None = None) -> _R: ...
    def get_result(self, timeout: float | None = None) -> _R: ...
    def __await__(self) -> Generator[Any, None, _R]: ...

class StreamOf(Stream, Generic[_R]):
    # The values of a remote generator and their type.
    def __iter__(self) -> Iterator[_R]: ...
    def __aiter__(self) -> AsyncIterator[_R]: ...
    def result(self, timeout: float | None = None) -> list[_R]: ...

class RemoteGenerator(RemoteFunction[_P, _L, _R]):
    # A function that yields.
    def remote(self, *args: _P.args, **kwargs: _P.kwargs) -> StreamOf[_R]: ...  # type: ignore[override]
    def spawn(self, *args: _P.args, **kwargs: _P.kwargs) -> StreamOf[_R]: ...  # type: ignore[override]

class Decorator(Protocol):
    # What `session.function(…)` returns.
    @overload
    def __call__(
        self, function: Callable[_P, Coroutine[Any, Any, _R]], /
    ) -> RemoteFunction[_P, Coroutine[Any, Any, _R], _R]: ...
    @overload
    def __call__(self, function: Callable[_P, Iterator[_R]], /) -> RemoteGenerator[_P, Iterator[_R], _R]: ...
    @overload
    def __call__(
        self, function: Callable[_P, AsyncIterator[_R]], /
    ) -> RemoteGenerator[_P, AsyncIterator[_R], _R]: ...
    @overload
    def __call__(self, function: Callable[_P, _R], /) -> RemoteFunction[_P, _R, _R]: ...

class AppDecorator(Protocol):
    # What `app.function(…)` returns.
    @overload
    def __call__(
        self, function: Callable[_P, Coroutine[Any, Any, _R]], /
    ) -> AppFunction[_P, Coroutine[Any, Any, _R], _R]: ...
    @overload
    def __call__(self, function: Callable[_P, _R], /) -> AppFunction[_P, _R, _R]: ...

class FunctionKeywords(TypedDict, total=False):
    # The options of a function.
    name: str | None
    serialization: Serialization | str
    instance_type: str | None
    gpu: str | None
    resources: Mapping[str, Any] | None
    image: str | None
    container_image: str | None
    env: Mapping[str, str]
    environment_variables: Mapping[str, str]
    workers: int
    timeout: float | None
    timeout_s: float | None
    startup_timeout: float | None
    startup_timeout_s: float | None
    retries: int | Retries

class SessionKeywords(FunctionKeywords, total=False):
    # The options of a session.
    tags: Sequence[str]
    labels: Mapping[str, str]
    idle_limit: float | None
    idle_limit_s: float | None
    lease: float
    lease_s: float
    volumes: Sequence[VolumeSpec | Mapping[str, Any]]
    data_mounts: Sequence[MountSpec | Mapping[str, Any]]
    region: str | None
    max_price_per_hour: float | None
    max_run_time_hours: float | None
