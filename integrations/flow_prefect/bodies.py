"""All bodies of one flow run: what makes each the same when the run is executed again, and the end of all of them."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from prefect.client.schemas import TaskRun
from prefect.utilities.hashing import hash_objects

from flow_core import Flow
from flow_core.errors import FlowError
from flow_prefect.watch import Watch

log = logging.getLogger(__name__)

#: The label by which the tasks of a flow run are found again.
RUN_LABEL = "prefect/flow_run_id"


class Stoppable(Protocol):
    """A body, as far as all of them are one."""

    def stop(self, reason: str) -> None:
        """Let its thread stop it; returns at once."""


class Bodies:
    """All bodies that one running task runner is responsible for. Thread-safe."""

    def __init__(self, connect: Callable[[], Flow]) -> None:
        self._connect = connect
        self._flow: Flow | None = None
        self._watch: Watch | None = None
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._running: dict[Stoppable, str] = {}
        self._succeeded: list[str] = []
        self._flow_run_id: str | None = None
        self._again = False
        self.stop_reason: str | None = None

    @property
    def flow(self) -> Flow:
        """The connection to the provider, made when it is first needed. Raises what `Flow()` raises."""
        with self._lock:
            if self._flow is None:
                self._flow = self._connect()
            return self._flow

    @property
    def watch(self) -> Watch:
        """The one watch over all of them."""
        flow = self.flow
        with self._lock:
            if self._watch is None:
                self._watch = Watch(flow)
            return self._watch

    def belongs_to(self, flow_run_id: uuid.UUID, run_count: int) -> None:
        """Learn whose bodies these are, and whether an earlier process has executed the same flow run."""
        self._flow_run_id = str(flow_run_id)
        self._again = run_count > 1

    def key(self, task_run: TaskRun, source: str | None, args: Any, kwargs: Mapping[str, Any]) -> str:
        """Return what makes a body the same one when its flow run is executed again.

        It is made of the flow run, the task, its source and arguments, and a number among calls that are equal in
        all of that (they are interchangeable, so their order does not matter). Not of the try: a try that follows a
        failure, in whatever process, is the next attempt at the same key. Under a runner that is not a flow's own, or
        when the arguments have no stable hash, no later run can be the same.
        """
        inputs = None if self._flow_run_id is None else hash_objects(args, dict(kwargs), source or "")
        if inputs is None:
            return f"prefect/{task_run.id}"
        same = f"prefect/{self._flow_run_id}/{task_run.task_key}/{inputs}"
        with self._lock:
            self._calls[same] += 1
            return f"{same}/{self._calls[same]}"

    def started(self, body: Stoppable, task_id: str) -> None:
        """Note a body that may be running."""
        with self._lock:
            self._running[body] = task_id

    def ended(self, body: Stoppable, *, succeeded: bool) -> None:
        """Note that a body is over, or has been told to stop."""
        with self._lock:
            task_id = self._running.pop(body, None)
            if succeeded and task_id is not None:
                self._succeeded.append(task_id)

    def count(self) -> int:
        """Return how many bodies may be running."""
        with self._lock:
            return len(self._running)

    def stop(self, reason: str) -> None:
        """Stop all bodies, now and in time to come. After return none will go on. Idempotent."""
        self.stop_reason = self.stop_reason or reason
        with self._lock:
            running = dict(self._running)
        try:
            if running:
                self.flow.cancel(list(running.values()))
        except FlowError:  # each body's own thread tries again
            log.warning("could not stop %d GPU tasks at once", len(running), exc_info=True)
        for body in running:
            body.stop(reason)

    def close(self, *, succeeded: bool) -> None:
        """End what an earlier process left running and nobody asked for again; free the results of a success."""
        if self._flow is None:
            return
        try:
            if self._again:
                self._flow.cancel(self._left_over(self._flow))
            if succeeded and self._succeeded:
                self._flow.release(self._succeeded)
        except FlowError:
            log.warning("could not clean up after flow run %s", self._flow_run_id, exc_info=True)

    def _left_over(self, flow: Flow) -> list[str]:
        with self._lock:
            ours = {*self._running.values(), *self._succeeded}
        live = [task.snapshot for task in flow.list_tasks(limit=1000) if not task.is_terminal]
        mine = [seen.task_id for seen in live if seen.labels.get(RUN_LABEL) == self._flow_run_id]
        return [task_id for task_id in mine if task_id not in ours]
