"""The future of a task that runs on a GPU machine: Prefect's own, and a way to the machine's task."""

from __future__ import annotations

import concurrent.futures
import uuid
from typing import TypeVar

from prefect.client.schemas.objects import State
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Crashed

from flow_core import InvokeTask
from flow_prefect.body import Body

R = TypeVar("R")


class FlowFuture(PrefectConcurrentFuture[R]):
    """What `.submit()` and `.map()` return under a FlowTaskRunner. Where Prefect takes a future, it takes this."""

    def __init__(
        self, task_run_id: uuid.UUID, wrapped_future: concurrent.futures.Future[R], body: Body
    ) -> None:
        super().__init__(task_run_id, wrapped_future)
        self._body = body

    @property
    def task(self) -> InvokeTask | None:
        """The GPU task of the latest try; None before there is one (inputs not ready, result cached)."""
        return self._body.task

    def cancel(self) -> None:
        """Stop this one task; its run ends Crashed and is not retried. A task that has ended is left alone."""
        if not self._wrapped_future.cancel():
            self._body.stop("cancelled through its future")

    def logs(self, tail: int = 100) -> str:
        """Return the last lines that the body has printed so far."""
        return "" if self._body.task is None else self._body.task.logs(tail=tail)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end, however it ends; after `timeout` seconds return without."""
        try:
            super().wait(timeout)
        except BaseException as error:
            if not self._ended_by(error):
                raise
            self._final_state = self._crashed(error)

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """Return the value. Raises what the task raised, CrashedRun when it crashed, TimeoutError after `timeout`."""
        try:
            return super().result(timeout, raise_on_failure)
        except BaseException as error:
            if self._final_state is not None or not self._ended_by(error):
                raise
            self._final_state = self._crashed(error)
        return super().result(timeout, raise_on_failure)

    def _ended_by(self, error: BaseException) -> bool:
        """Whether an exception is how the task run ended, and not something that happened to the one who waits."""
        done = self._wrapped_future
        if done.cancelled():
            return isinstance(error, concurrent.futures.CancelledError)
        return done.done() and done.exception() is error

    def _crashed(self, error: BaseException) -> State[R]:
        """Return the state in which Prefect's engine left the run, without what raises instead of being raised."""
        run = self._body.task_run
        if run is not None and run.state is not None and run.state.is_final():
            return run.state.model_copy(update={"data": None})
        never = self._wrapped_future.cancelled()
        return Crashed(message="The task was cancelled before it started." if never else repr(error))
