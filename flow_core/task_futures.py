"""TaskFuture: a call that is a task of its own, seen as a future."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from flow_core.calls import InvokeTask, Serialization
from flow_core.engine import SLICE_S, Engine
from flow_core.errors import FlowError, TimeoutError, ValidationError
from flow_core.flow import Flow
from flow_core.futures import DONE, FAILED, SENT, Future, call_back, ending
from flow_core.object_ref import ObjectRef
from flow_core.runner.parcels import Parcel
from flow_core.status import TaskStatus
from flow_core.task import KIND_LABEL

_STATUS = {
    TaskStatus.PENDING: "queued",
    TaskStatus.PROVISIONING: "queued",
    TaskStatus.COMPLETED: "done",
    TaskStatus.CANCELLED: "cancelled",
}


class _Called(NamedTuple):
    """What a future knows of the function that was called."""

    name: str
    codec: str


class TaskFuture(Future):
    """The outcome of a call that is a task of its own. Its `id` is the task's."""

    def __init__(self, engine: Engine, task: InvokeTask, name: str, codec: str) -> None:
        super().__init__(_TaskRun(task), _Called(name, codec))
        self.state = SENT
        self.task = task
        self._engine = engine

    @property
    def status(self) -> str:
        """`queued`, `running`, `done`, `failed` or `cancelled`."""
        status = self.task.status
        return _STATUS.get(status, "failed" if status.final else "running")

    def done(self) -> bool:
        """Whether the task has ended, however it ended."""
        if self.state < DONE and self.task.status.final:
            self.runs.drive(self, None)
        return self.state >= DONE

    def runs_later(self, function: Callable[[Future], object]) -> bool:
        """Add a callback unless the task has ended. Return whether it will be called."""
        added = super().runs_later(function)
        if added:
            _watcher_of(self._engine).add(self)
        return added


def of_task(flow: Flow, task_id: str, serialization: str) -> TaskFuture:
    """Return the future of a call that is a task, whoever has submitted it. Raises TaskNotFoundError."""
    seen = flow.engine.get(task_id)
    if seen.labels.get(KIND_LABEL) != "call":
        raise ValidationError(
            f"task {task_id} is not a call", suggestions=["Read it as a task: flow.get_task(task_id)."]
        )
    codec: Serialization = "pickle" if serialization == "pickle" else "json"
    task = InvokeTask(flow.engine, task_id, seen=seen, objects=flow.objects, serialization=codec)
    return TaskFuture(flow.engine, task, seen.name, codec)


class _TaskRun:
    """What a future needs of its task."""

    def __init__(self, task: InvokeTask) -> None:
        self.task = task
        self.task_id = task.task_id
        self.lock: AbstractContextManager[Any] = threading.RLock()

    def drive(self, future: Future, deadline: float | None) -> None:
        """Wait for the task, and take its outcome in."""
        try:
            self.task.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return
        outcome, error = None, None
        try:
            outcome = (self.task.result(),)
        except FlowError as failure:
            error = failure
        with self.lock:
            if future.state >= DONE:
                return
            future.outcome, future.error = outcome, error
            due = [(function, future) for function in ending(future, DONE if error is None else FAILED)]
        call_back(due)

    def cancel(self, _: Future) -> bool:
        """Ask the task to stop."""
        self.task.cancel()
        return True

    def keep(self, _: Future) -> str:
        """Return the id of the task, whose result is kept anyway."""
        return self.task_id

    def let_stay(self, _: Future) -> None:
        """It is where it is."""

    def refer(self, _: Future, timeout: float | None) -> ObjectRef:
        """Return the reference to the task's result."""
        return self.task.ref(timeout)

    def logs(self, _: Future) -> str:
        """Return what the task has printed."""
        return self.task.logs(tail=100_000)

    def decode(self, _: Future, parcel: Parcel) -> Any:
        """Nothing arrives in parcels here."""
        raise AssertionError(parcel)


class _Watcher:
    """A thread that notices the ends of tasks for those who asked to be called back, while there are any."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._lock = threading.Lock()
        self._futures: dict[str, TaskFuture] = {}
        self._runs = False

    def add(self, future: TaskFuture) -> None:
        with self._lock:
            self._futures[future.task_id] = future
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="flow-tasks", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._futures = {task_id: one for task_id, one in self._futures.items() if one.state < DONE}
                futures, engine = dict(self._futures), self._engine()
                if not futures or engine is None:
                    self._runs = False
                    return
            try:
                seen = engine.wait(list(futures), timeout=SLICE_S, any_of=True)
                for task_id, one in seen.items():
                    if one.status.final:
                        futures[task_id].runs.drive(futures[task_id], None)
            except FlowError:  # nothing has ended yet, or the provider cannot answer now
                engine.clock.sleep(engine.provider.poll_interval_s)


_watchers: weakref.WeakKeyDictionary[Engine, _Watcher] = weakref.WeakKeyDictionary()
_watchers_lock = threading.Lock()


def _watcher_of(engine: Engine) -> _Watcher:
    with _watchers_lock:
        return _watchers.setdefault(engine, _Watcher(engine))
