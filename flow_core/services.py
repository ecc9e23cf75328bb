"""Runner: the current folder on warm workers, and functions, classes and objects there as services.

A service of a class or an object is one live object on one worker: calls run in the order submitted, and its state is
never copied. A service of a function, and any with `autoscale` or a `warmup` of several, is a pool of workers without
common state.
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from flow_core import packages, several
from flow_core.config import PackageSettings
from flow_core.definitions import Definition, SessionSpec
from flow_core.dispatch import Pool
from flow_core.errors import SessionClosedError, ValidationError
from flow_core.flow import Flow
from flow_core.futures import Future
from flow_core.live_objects import LiveObject
from flow_core.service_workers import ServiceWorkers, Shape, SharedSession
from flow_core.sessions import SessionDefaults

if TYPE_CHECKING:
    from types import TracebackType

    from flow_core.providers.spi import Provider

log = logging.getLogger("flow_core")

_NAME_LABEL = "flow-runner"
_LOOKED_THROUGH = 1000
_OF_FILES = ("-r", "--requirement", "-c", "--constraint", "-e", "--editable")


class _AnyFuture(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, Future)


class ObjectFuture(Future, metaclass=_AnyFuture):
    """What a service's call returns: another name of `Future`. Pass it on to another call in place of its value."""

    def __new__(cls, future: Future) -> Future:  # type: ignore[misc]  # it is the future itself
        """Return the future."""
        return future


@dataclass(frozen=True)
class SessionContext:
    """What an object may say of its service, as its `_session_context`.

    Services of one Runner with the same `session_id` are the same service. `application_name` is the Runner that the
    object is meant for.
    """

    session_id: str | None = None
    application_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("session_id", "application_name"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and 0 < len(value) <= 128):
                raise ValidationError(f"{name}={value!r} must be text of 1 to 128 characters")

    def __reduce__(self) -> Any:
        return SimpleNamespace, (), vars(self)  # where the object goes, nobody knows this class


class Runner:
    """Runs services on warm workers that have the current folder as their working directory.

        with Runner("my-app") as rr:
            counter = rr.service(Counter)
            counter.add(1)
            print(counter.add(3).get())

    It starts with `with` or with the first service: then the current folder (or `code_root`) is packed, without what
    `.flowignore`, `excludes` and the settings leave out, and brought to the workers by way of `storage`. They have
    `dependencies` (lines of a requirements file) installed before they start, once per set. `python_version` is the
    workers' Python, which must be this one's. `fail_if_exists` refuses to start beside an open Runner of this name.

    `options` are those of `SessionDefaults`: `workers` is the most that a pool of workers may grow to, `gpu` what each
    of them gets. `provider` is a name or a Provider, or `flow` has the settings. Thread-safe.
    """

    def __init__(  # noqa: PLR0913 - each is a keyword of its own
        self,
        name: str,
        fail_if_exists: bool = False,
        dependencies: Sequence[str] | None = None,
        python_version: str | None = None,
        *,
        storage: str | None = None,
        excludes: Sequence[str] = (),
        code_root: str | Path | None = None,
        provider: str | Provider | None = None,
        flow: Flow | None = None,
        **options: Any,
    ) -> None:
        if provider is not None and flow is not None:
            raise ValidationError(
                "got both provider and flow", suggestions=["Give one: a Flow has its provider."]
            )
        _check_python(python_version)
        self.options = SessionDefaults(name=name, **options)
        self.name = name
        self.flow = flow or Flow(provider)
        self._package = PackageSettings(storage=storage, excludes=excludes)
        self._dependencies = _requirements(dependencies)
        self._code_root = code_root
        self._fail_if_exists = fail_if_exists
        self._lock = threading.RLock()
        self._session: SharedSession | None = None
        self._services: list[ServiceWorkers] = []
        self._by_context: dict[str, RunnerService] = {}
        self._closed = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<Runner {self.name!r}{' (closed)' if self._closed else ''}>"

    @property
    def task_id(self) -> str:
        """The task that the workers run in. Starts it."""
        return self._started().pool.task_id

    # -- services

    def service(
        self,
        execution_object: Any,
        autoscale: bool | None = None,
        warmup: int = 0,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        max_restarts: int = 0,
    ) -> RunnerService:
        """Offer a function, a class or an object to calls; return its service.

        A class is made into an object on the worker, with `args` and `kwargs`; an object travels as it is now. Either
        is one live object. `autoscale=True`, or a `warmup` of two or more, makes a pool without common state of it, as
        a function always is: of at least `warmup` workers, started at once, and at most the Runner's `workers`; with
        `autoscale=False` of exactly `warmup`. If the worker of a live object dies, its state is lost: `max_restarts`
        times the next call gets a new object.

        Raises SerializationError that names what cannot travel, TypeError where the class takes other arguments,
        SessionClosedError after `close`, and what starting raises.
        """
        context = self._context_of(execution_object)
        with self._lock:
            known = self._by_context.get(context or "")
            if known is not None and not known._ended:  # noqa: SLF001 - its public names are its object's
                return known
            made = RunnerService(
                self,
                execution_object,
                autoscale=autoscale,
                warmup=warmup,
                args=args,
                kwargs=kwargs,
                max_restarts=max_restarts,
            )
            if context is not None:
                self._by_context[context] = made
            return made

    def _context_of(self, execution_object: Any) -> str | None:
        context = getattr(execution_object, "_session_context", None)
        if context is None:
            return None
        if not isinstance(context, SessionContext):
            log.warning("the _session_context of %r is no SessionContext: it is ignored", execution_object)
            return None
        if context.application_name not in (None, self.name):
            raise ValidationError(
                f"the object is meant for the Runner {context.application_name!r}, and this is {self.name!r}"
            )
        return context.session_id

    def _workers_for(self, live: LiveObject, shape: Shape) -> ServiceWorkers:
        with self._lock:
            workers = ServiceWorkers(self._started(), live, shape)
            self._services = [one for one in self._services if not one.closed] + [workers]
            return workers

    # -- futures

    def get(self, calls: Future | Iterable[Future], timeout: float | None = None) -> Any:
        """Return the value of one call, or those of several. Raises the first failure in their order."""
        return several.get(calls, timeout)

    def ref(self, calls: Iterable[Future]) -> list[Future]:
        """Return the references to the values of several calls: the futures themselves, which are not waited for."""
        return [one.ref() for one in calls]

    def wait(self, calls: Iterable[Future], timeout: float | None = None) -> None:
        """Wait for several calls, and leave their values where they are. Raises the first failure in their order."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for one in calls:
            one.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def select(self, calls: Iterable[Future], timeout: float | None = None) -> Iterator[Future]:
        """Yield calls as they end. Raises TimeoutError when some have not ended after `timeout` seconds."""
        return several.as_completed(calls, timeout)

    def put_object(self, value: Any) -> Future:
        """Bring a value to the workers once; what is returned stands for it in any number of calls."""
        return self._started().pool.submit(_PUT, ((value,), 0))

    # -- the workers

    def _started(self) -> SharedSession:
        """Return the session of the workers; start it when there is none yet."""
        with self._lock:
            if self._closed:
                raise SessionClosedError(
                    f"the Runner {self.name!r} is closed", suggestions=["Open a new one."]
                )
            if self._session is None:
                if self._fail_if_exists:
                    self._refuse_twins()
                self._session = SharedSession(Pool.open(self.flow, self._spec()))
                _open.add(self)
            return self._session

    def _spec(self) -> SessionSpec:
        settings = self.flow.settings
        package = packages.make(
            Path(self._code_root or Path.cwd()),
            name=self.name,
            storage=self._package.storage or settings.package.storage,
            excludes=(*settings.package.excludes, *self._package.excludes),
        )
        spec = self.options.spec(self.options, settings.default_instance_type)
        labels = {**spec.task.get("labels", {}), _NAME_LABEL: self.name}
        return replace(
            spec,
            workers=self._most_workers(spec),
            min_workers=0,
            files=package.files,
            package=package.source,
            dependencies=self._dependencies,
            task={**spec.task, "labels": labels},
        )

    def _most_workers(self, spec: SessionSpec) -> int:
        if "workers" in self.options.model_fields_set:
            return spec.workers
        return 1 if spec.instance_type != "cpu" else max(2, os.cpu_count() or 2)

    def _refuse_twins(self) -> None:
        known = self.flow.engine.provider.list(limit=_LOOKED_THROUGH)
        for seen in self.flow.poll(known).values():
            if not seen.status.final and seen.labels.get(_NAME_LABEL) == self.name:
                raise ValidationError(
                    f"a Runner named {self.name!r} is open already: task {seen.task_id}",
                    suggestions=["Close it, choose another name, or leave fail_if_exists out."],
                )

    # -- the end

    def close(self) -> None:
        """End all services and workers. Calls that have not ended are cancelled, later ones refused. Idempotent."""
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
            services, self._services = self._services, []
        _open.discard(self)
        for service in services:
            service.close()
        if session is not None:
            session.pool.close()

    def __enter__(self) -> Self:
        self._started()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a Runner cannot travel: it belongs to the process that opened it")


class RunnerService:
    """An object on a worker, or a pool of them: its methods are called here, run there, and return futures at once.

    `Runner.service` makes it. A function, and an object that can be called, is called as the service itself. Two names
    are the service's own: a method named `close` or `method` is called as `service.method("close")(…)`. With the name
    of an application in place of a Runner, the service has a Runner of its own. The other arguments are those of
    `Runner.service`.
    """

    def __init__(
        self,
        app: str | Runner,
        execution_object: Any,
        *,
        autoscale: bool | None = None,
        warmup: int = 0,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        max_restarts: int = 0,
    ) -> None:
        live = LiveObject(execution_object, args, kwargs or {})
        shape = Shape(autoscale, warmup, max_restarts, live.is_function)
        for name in {"close", "method"}.intersection(live.methods()):
            log.warning(
                "%s has a method %r, a name of the service's own: call it as service.method(%r)(…)",
                *(live.name, name, name),
            )
        self._live = live
        self._owned = Runner(app) if isinstance(app, str) else None
        runner = app if isinstance(app, Runner) else self._owned
        assert runner is not None
        self._workers = runner._workers_for(live, shape)  # noqa: SLF001 - the two are one

    def __repr__(self) -> str:
        return f"<RunnerService {self._live.name!r}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Future:
        """Call the function, or the object itself. Raises what calling a method raises."""
        call = self.__dict__.get("_itself")
        if call is None:
            if not self._live.can_be_called:
                methods = ", ".join(self._live.methods()) or "none"
                raise TypeError(f"{self._live.name} cannot be called itself. Its methods: {methods}")
            call = self._itself = ServiceMethod(self._workers, self._live, "")
        made: Future = call(*args, **kwargs)
        return made

    def __getattr__(self, name: str) -> ServiceMethod:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name not in self._live.methods():
            raise AttributeError(self._live.why_not(name))
        made = self.__dict__[name] = ServiceMethod(self._workers, self._live, name)
        return made

    def __dir__(self) -> list[str]:
        return sorted({*self._live.methods(), "close", "method"})

    def method(self, name: str) -> ServiceMethod:
        """Return the method of this name, also one that the service hides or that only exists on the worker."""
        if self._live.is_function or not name.isidentifier():
            raise AttributeError(self._live.why_not(name))
        return ServiceMethod(self._workers, self._live, name)

    @property
    def _ended(self) -> bool:
        return self._workers.closed

    def close(self) -> None:
        """End the service and its workers. Calls that have not ended are cancelled, later ones refused. Idempotent."""
        self._workers.close()
        if self._owned is not None:
            self._owned.close()

    def __reduce__(self) -> Any:
        raise TypeError("a service cannot travel: pass the futures of its calls instead")


class ServiceMethod:
    """One method of a service: calling it returns a future at once."""

    def __init__(self, workers: ServiceWorkers, live: LiveObject, name: str) -> None:
        self._workers = workers
        self._fit = live.fit(name)
        self._definition = workers.maker if live.is_function else live.definition(name, workers.maker)

    def __call__(self, *args: Any, **kwargs: Any) -> Future:
        """Call it on the worker; return the future of its value.

        Raises TypeError for arguments that do not fit, SerializationError for one that cannot travel, WorkerDiedError
        when the state of the service is lost, SessionClosedError.
        """
        self._fit.check(args, kwargs)
        return self._workers.call(self._definition, args, kwargs)


_PUT = Definition(pickle.dumps(operator.getitem), "put_object", codec="pickle")


def _check_python(version: str | None) -> None:
    ours = "{}.{}".format(*sys.version_info)
    if version is not None and ".".join(version.split(".")[:2]) != ours:
        raise ValidationError(
            f"python_version={version!r} cannot be served: this is Python {ours}, and what is sent by value only works "
            "in the same minor version",
            suggestions=["Leave it out, or run this program with that Python."],
        )


def _requirements(dependencies: Sequence[str] | None) -> tuple[str, ...]:
    """Return the lines for the installer, without what is empty or a comment."""
    if isinstance(dependencies, str):
        raise ValidationError(
            f"dependencies={dependencies!r} must be a list", suggestions=[f"Write [{dependencies!r}]."]
        )
    lines = [line.strip() for line in dependencies or ()]
    for line in lines:
        if line.split("=")[0].split(" ")[0] in _OF_FILES or line.startswith((".", "~")):
            raise ValidationError(
                f"{line!r} among the dependencies names a file of this machine, which the workers do not have",
                suggestions=["Write what it says: Path('requirements.txt').read_text().splitlines()."],
            )
    return tuple(line for line in lines if line and not line.startswith("#"))


_open: weakref.WeakSet[Runner] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for runner in list(_open):
        if runner._pid == os.getpid():  # noqa: SLF001 - not after a fork
            runner.close()
