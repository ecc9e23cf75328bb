"""Puts the bodies of a flow's tasks on GPU machines and leaves everything else to Prefect's thread pool."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import ref

from prefect.context import FlowRunContext
from prefect.exceptions import Pause
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flow_core import Flow
from flow_prefect import options
from flow_prefect.bodies import Bodies
from flow_prefect.body import Body
from flow_prefect.checks import check_body
from flow_prefect.futures import FlowFuture

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, RunInput
    from prefect.tasks import Task
    from typing_extensions import Self


class FlowTaskRunner(TaskRunner[PrefectFuture[Any]]):
    """Runs the body of every submitted task of a flow on a GPU machine.

    Prefect's engine runs here, in a thread per task: inputs, retries, timeouts, caching, results, hooks and states are
    Prefect's, and the function and its arguments are sent away when it would call the function. The machine needs a
    Python of the same version, and neither Prefect nor this package.

    - `timeout_seconds` ends the work on the machine (it counts from the submit on).
    - A lost machine is an ordinary exception, so `retries=` applies; a cancelled task or a `sys.exit` is a crash.
    - A flow that ends with an exception or by SIGTERM stops what it has running. If its process is killed, the next
      process that executes the same flow run adopts what runs and gets what has ended: nothing is paid for twice. Code
      or arguments that differ start anew, and so do arguments that no two processes pickle alike (sets of text, objects
      of a class in `__main__`). A flow that is retried after a failure gets what has ended, too; a flow run that
      succeeded starts anew.
    - Calling a task without `.submit()` or `.map()` runs it in the flow's process, as under every Prefect task runner.

    `gpu`, `env`, `image`, `max_run_time_hours` and all other fields of TaskConfig are keywords, the defaults of all
    tasks; `flow_options` overrides them. `max_workers` limits how many tasks are in flight at once (no limit by
    default: the provider shares out its GPUs). Raises ValidationError for what can never be right.
    """

    def __init__(
        self, *, provider: str | None = None, max_workers: int | None = None, **task_options: Any
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        options.check(task_options)
        self._provider = provider
        self._max_workers = max_workers
        self._task_options = task_options
        self._duplicates: list[ref[FlowTaskRunner]] = []
        self._threads: ThreadPoolTaskRunner[Any] | None = None
        self._bodies = Bodies(self._connect)
        self._flow_run: FlowRun | None = None

    def _connect(self) -> Flow:
        return Flow(self._provider)

    def duplicate(self) -> Self:
        """Return a runner of the same settings. Prefect runs a flow on a duplicate; `cancel_all` reaches it."""
        twin = type(self)(**self._settings())
        self._duplicates = [*(known for known in self._duplicates if known() is not None), ref(twin)]
        return twin

    def submit(
        self,
        task: Task[Any, Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> FlowFuture[Any]:
        """Submit a task and return its future at once.

        Raises ValidationError for a body that cannot run on a machine without Prefect; then nothing has started.
        """
        if self._threads is None:
            raise RuntimeError("Task runner is not started")
        check_body(task)
        wanted = options.wanted(self._task_options, task.fn)
        body = Body(self._bodies, task.fn, wanted, source=_source(task), timeout_s=task.timeout_seconds)
        context = FlowRunContext.get()
        if context is not None and context.flow_run is not None and context.task_runner is self:
            self._flow_run = context.flow_run
            self._bodies.belongs_to(context.flow_run.id, context.flow_run.run_count)
        done = self._threads.submit(_with_body(task, body), parameters, wait_for, dependencies)
        return FlowFuture(done.task_run_id, done.wrapped_future, body)

    def cancel_all(self) -> None:
        """Stop everything that this runner, or a duplicate of it, has running. Idempotent."""
        for runner in (self, *(known() for known in self._duplicates)):
            if runner is not None:
                runner.stop_bodies("all tasks of the flow were cancelled")
        if self._threads is not None:
            self._threads.cancel_all()

    def stop_bodies(self, reason: str) -> None:
        """Stop what this very runner has running. After return none of it will go on, and no more will start."""
        self._bodies.stop(reason)

    def __enter__(self) -> Self:
        super().__enter__()
        self._bodies = Bodies(self._connect)
        self._flow_run = None
        self._threads = ThreadPoolTaskRunner(self._max_workers).__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:  # noqa: PYI036 - as in Prefect
        failure = _failure(exc_type, self._flow_run)
        count = self._bodies.count()
        if failure is not None:
            self._bodies.stop(f"the flow {failure}")
        elif count:
            self.logger.info("Waiting for %d GPU task%s to end", count, "" if count == 1 else "s")
        if self._threads is not None:
            self._threads.__exit__(exc_type, exc_value, traceback)
            self._threads = None
        self._bodies.close(succeeded=failure is None and exc_type is None)
        super().__exit__(exc_type, exc_value, traceback)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlowTaskRunner):
            return NotImplemented
        return self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash((self._provider, self._max_workers))

    def _settings(self) -> dict[str, Any]:
        return {"provider": self._provider, "max_workers": self._max_workers, **self._task_options}

    def __reduce__(self) -> tuple[Any, ...]:
        """A flow that is sent to another process takes the settings along and nothing that runs here."""
        return functools.partial(type(self), **self._settings()), ()


def _failure(exc_type: type[BaseException] | None, flow_run: FlowRun | None) -> str | None:
    """Say how a flow failed, None when it did not: it succeeded, or is suspended and comes back for what it runs.

    Prefect's engine keeps an ordinary exception to itself and only sets the state of the flow run: a final one, or
    Running for the next try. (After a success the final state is set too before the runner is left.)
    """
    if exc_type is not None:
        return None if issubclass(exc_type, Pause) else f"ended with {exc_type.__name__}"
    state = None if flow_run is None else flow_run.state
    if state is None or state.is_completed() or state.is_paused():
        return None
    return "is tried again" if state.is_running() else f"ended in state {state.name}"


def _source(task: Task[Any, Any]) -> str | None:
    """The text of a task's function; Prefect 3.6 does not keep it."""
    try:
        return getattr(task, "source_code", None) or inspect.getsource(task.fn)
    except (OSError, TypeError):
        return None


def _with_body(task: Task[Any, Any], body: Body) -> Task[Any, Any]:
    """Return the same task with `body` in the place of its function."""

    @functools.wraps(task.fn)
    def remote(*args: Any, **kwargs: Any) -> Any:
        return body.run(args, kwargs)

    @functools.wraps(task.fn)
    async def remote_async(*args: Any, **kwargs: Any) -> Any:
        try:
            return await asyncio.to_thread(body.run, args, kwargs)
        except asyncio.CancelledError:
            body.stop("its task run was cancelled")
            raise

    twin: Task[Any, Any] = copy.copy(task)
    shim: Callable[..., Any] = remote_async if task.isasync else remote
    twin.fn = shim
    # We watch the time: Prefect's watcher would throw an exception into the middle of whatever the thread is doing.
    twin.timeout_seconds = None
    return twin
