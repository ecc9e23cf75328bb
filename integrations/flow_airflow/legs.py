"""The legs of a try that stands for one Flow task: submit or adopt, follow, defer, take over, stop, abandon.

What the task is, a subclass says. Waiting and cancelling are engine calls; nothing here knows of commands or functions.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from airflow.configuration import conf
from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowRuntimeError

from flow_airflow.arguments import refuse_unknown
from flow_airflow.compat import AirflowTaskTimeout, TaskDeferralError, TaskDeferralTimeout
from flow_airflow.failures import to_airflow
from flow_airflow.hooks import opener
from flow_airflow.lineage import TellsLineage
from flow_airflow.links import FlowTaskLink
from flow_airflow.logs import TaskLog
from flow_airflow.nodes import TASK_ID_XCOM, Node, will_retry
from flow_airflow.stopping import Stop, cancel_key, next_try_takes_over
from flow_airflow.telemetry import closing_line, mark_outlets
from flow_airflow.tracing import emit_span
from flow_airflow.triggers import FlowEvent, FlowTaskTrigger
from flow_core.errors import FlowError, FlowTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airflow.sdk import Context

    from flow_core import Flow, Task, TaskStatus

#: Whether a task is deferred unless it is told otherwise.
DEFERRABLE = conf.getboolean("operators", "default_deferrable", fallback=False)

#: Under this name Airflow 3.3 remembers, across tries and clears, which key a task instance last worked
#: under.
_STATE_KEY = "flow_key"

#: The worker looks at the output this often.
_LOOK_S = 0.5

#: Airflow's own timeout of the deferral is this much behind ours: it only matters while no triggerer runs.
_TRIGGERER_GRACE_S = 60.0


class FlowOperator(TellsLineage, BaseOperator):
    """An Airflow task that stands for one Flow task, which its node's key names.

    `flow_conn_id` is a connection of type `flow`, see FlowHook; without it the worker's settings hold. `provider`
    replaces the one that they name.

    The work outlives the worker: a retry after the worker died adopts the running task, a retry after the
    work itself failed starts anew, and so does a clear after success. Marking or clearing the task and
    `execution_timeout` cancel the work. With `deferrable` the worker waits for the first `defer_after_s`
    seconds, then the triggerer does: it asks every `poll_interval_s`, in one poll with all others that wait
    for tasks of the provider and connection, and tells `hold_event_s` after the deferral at the earliest; see
    FlowTaskTrigger.

    Results stay on the provider for its retention time and are not released here: Airflow stores the XCom
    only after `execute` has returned, and a worker that dies in between must find the result again.
    """

    operator_extra_links = (FlowTaskLink(),)
    ui_color = "#d8f0dc"

    def __init__(
        self,
        *,
        provider: str | None = None,
        flow_conn_id: str | None = None,
        deferrable: bool = DEFERRABLE,
        defer_after_s: float = 10.0,
        hold_event_s: float = 10.0,
        poll_interval_s: float = 2.0,
        **kwargs: Any,
    ) -> None:
        refuse_unknown(type(self), kwargs)
        super().__init__(**kwargs)
        self.provider = provider
        self.flow_conn_id = flow_conn_id
        self.deferrable = deferrable
        self.defer_after_s = defer_after_s
        self.hold_event_s = hold_event_s
        self.poll_interval_s = poll_interval_s
        self._stop: Stop | None = None
        self._executing = False
        self._notes: dict[str, str] = {}  # XComs that lead to the task and are not stored yet
        self._open: Callable[[], Flow] | None = None
        #: The page about the task of this try, empty where there is none, None before that is known; see FlowTaskLink.
        self.task_url: str | None = None

    # -- what a subclass says

    @abstractmethod
    def submit(self, context: Context, flow: Flow, node: Node) -> Task:
        """Submit what the node is to do, under `node.key`, and return its task; the same one when it is there."""

    def adopt(self, context: Context, flow: Flow, node: Node) -> Task | None:  # noqa: ARG002  # for subclasses
        """Return a task from before a clear that makes a new one unnecessary; None where there is none."""
        return None

    def reopen(self, flow: Flow, task_id: str) -> Task:
        """Return the handle of what `submit` has submitted in another process."""
        return flow.get_task(task_id)

    def value(self, context: Context, task: Task) -> Any:  # noqa: ARG002  # for subclasses
        """Return what an ended task hands on. Raises what says how it failed."""
        return task.result(timeout=0)

    #: What the triggerer waits for: the task's end, or only its start.
    waits_until: Literal["ended", "started"] = "ended"

    def done(self, status: TaskStatus) -> bool:
        """Whether a task with this status is what `follow` waits for, and no failure."""
        return status.succeeded

    @property
    def machines(self) -> int:
        """The number of machines whose output there is."""
        return 1

    # -- the legs

    def execute(self, context: Context) -> Any:
        """Submit or adopt the node's task and wait for it; return its result. Defers when it takes long."""
        node = Node.from_context(context)
        with self.leg(context, node) as flow:
            self._retire_predecessors(context, flow, node)
            task = self.adopt(context, flow, node) or self.submit(context, flow, node)
            self._tell(context, flow, task)
            return self.follow(context, task, TaskLog(task, nodes=self.machines))

    def execute_complete(self, context: Context, event: FlowEvent) -> Any:
        """Take over from the trigger: show the rest of the output and return the result."""
        node = Node.from_context(context)
        with self.leg(context, node) as flow:
            task = self.reopen(flow, event["flow_task_id"])
            self.task_url = flow.task_url(task.task_id) or ""
            if event["outcome"] == "deadline":
                task.cancel()
                raise AirflowTaskTimeout(f"Flow task {task.task_id} took over {self.execution_timeout}.")
            return self.follow(context, task, TaskLog(task, offsets=event["log_offsets"]))

    def _tell(self, context: Context, flow: Flow, task: Task) -> None:
        """Leave what leads to the task, for people and for other Airflow tasks, while it runs."""
        self.log.info("Flow task %s.", task.task_id)
        self.task_url = flow.task_url(task.task_id) or ""
        self._notes[TASK_ID_XCOM] = task.task_id
        if self.task_url:
            self._notes[FlowTaskLink().xcom_key] = self.task_url
        self._leave_notes(context)

    def _leave_notes(self, context: Context) -> None:
        """Store what is not stored yet. An Airflow that is slow to answer is no reason to end work that costs money."""
        for key, value in [*self._notes.items()]:
            try:
                context["ti"].xcom_push(key=key, value=value)
            except AirflowRuntimeError as error:
                self.log.warning("Airflow has not stored the XCom %r, which is tried again: %s", key, error)
                return
            del self._notes[key]

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Do what Airflow does, but leave no work behind that nobody will ask for again."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except (TaskDeferralTimeout, TaskDeferralError) as error:
            return self._without_event(context, error)

    def _without_event(self, context: Context, error: TaskDeferralTimeout | TaskDeferralError) -> Any:
        """Return the result if the work is done, though the trigger could not say so; else raise `error`.

        A time that is up ends the work; after a trigger's failure a retry adopts it.
        """
        node = Node.from_context(context)
        with self.leg(context, node) as flow:
            task = flow.find(node.key)
            if task is not None and self.done(task.status):
                self.log.warning("The work is done, but its trigger has not said so: %s", error)
                task = self.reopen(flow, task.task_id)
                # From the start: how much of it the trigger has shown went with its word.
                return self.follow(context, task, TaskLog(task, nodes=self.machines))
            if isinstance(error, TaskDeferralTimeout):
                self._abandon(context)
            raise error

    def on_kill(self) -> None:
        """Cancel the node's task, unless the next try takes it over: Airflow ends this one."""
        if self._stop is not None:
            # In a signal's handler the leg goes on, and waits itself; else its time is up, or it is over.
            self._stop.request(ask=self._executing)
            if not self._executing:
                self._stop.wait(30.0)

    @contextmanager
    def leg(self, context: Context, node: Node) -> Iterator[Flow]:
        """Make `on_kill` work, and translate errors, while `execute` or its continuation runs."""
        self._executing = True
        try:
            flow = self._connect()
            self._stop = Stop(self._connect, node.key, lambda: next_try_takes_over(context))
            yield flow
        except Exception as error:
            hopeless = to_airflow(error)
            if hopeless is not None or not will_retry(context):
                self._abandon(context)
            if hopeless is not None:
                raise hopeless from error
            raise
        finally:
            self._executing = False

    def _abandon(self, context: Context) -> None:
        """Cancel what may still run under this node: no later try will come for it."""
        try:
            cancelled = cancel_key(self._connect(), Node.from_context(context).key)
        except FlowError as error:
            self.log.warning("The work may still run, it could not be cancelled: %s", error)
        else:
            if cancelled is not None:
                self.log.info("Cancelled Flow task %s.", cancelled.task_id)

    def _connect(self) -> Flow:
        if self._open is None:  # once: a signal's handler cannot ask Airflow
            self._open = opener(self.provider, self.flow_conn_id)
        return self._open()

    # -- what was here before

    def _retire_predecessors(self, context: Context, flow: Flow, node: Node) -> None:
        """Return when nothing runs any more of what this task instance did before it was cleared.

        Whoever was there for the clear has cancelled it, but nobody was when no triggerer ran, or the worker
        was dead and not yet missed; and it may take its time. Airflow 3.3 remembers the key, also across the
        end of the run.
        """
        keys = [one.key for one in node.predecessors]
        store: Any = context.get("task_state_store")
        if store is not None:
            before = store.get(_STATE_KEY)
            if before != node.key:
                keys += [before] if isinstance(before, str) and before not in keys else []
                store.set(_STATE_KEY, node.key)
        for key in keys:
            task = cancel_key(flow, key)
            if task is not None:
                self.log.info(
                    "Waiting for the end of Flow task %s: it ran before this task was cleared.", task.task_id
                )
                self._await_end(task)

    def _await_end(self, task: Task) -> None:
        while not ends_within(task, _LOOK_S):
            self.check_stop()

    # -- waiting

    def follow(self, context: Context, task: Task, log: TaskLog) -> Any:
        """Show the output until the task has ended and return its result, or defer."""
        defer_at = time.monotonic() + self.defer_after_s
        ended = False
        while not ended:
            ended = ends_within(task, _LOOK_S)
            self.check_stop()
            self._show(log)
            if not ended and self.deferrable and time.monotonic() >= defer_at:
                self.go_on_deferred(context, task, log.offsets)
        self._leave_notes(context)
        self._close(task)
        value = self.written = self.value(context, task)
        mark_outlets(context, task.task_id, value)
        return value

    def _close(self, task: Task) -> None:
        """Say what the ended task has used, to people and to their tools."""
        self.ended = task.snapshot
        self.log.info("%s", closing_line(self.ended))
        try:
            emit_span(self.ended)
        except Exception:
            self.log.warning("The span of the work could not be emitted.", exc_info=True)

    def check_stop(self) -> None:
        """Raise if Airflow has ended this try meanwhile, once its work is cancelled."""
        if self._stop is not None:
            self._stop.check()

    def _show(self, log: TaskLog) -> None:
        while not log.ended:
            try:
                lines = log.read()
            except FlowError as error:
                if not error.retryable:
                    raise
                self.log.warning("The output is out of reach at the moment: %s", error.message)
                return
            for line in lines:
                self.log.info("%s", line)
            if log.caught_up:
                return

    def go_on_deferred(self, context: Context, task: Task, log_offsets: list[int] | None) -> NoReturn:
        """Leave the waiting to the triggerer, which shows the output from there on; none of it for None."""
        self._leave_notes(context)
        deadline = self._deadline(context)
        left = None if deadline is None else max(1.0, deadline - time.time())
        self.log.info("Flow task %s goes on; the triggerer waits for it.", task.task_id)
        self.defer(
            trigger=FlowTaskTrigger(
                flow_task_id=task.task_id,
                provider=self.provider,
                flow_conn_id=self.flow_conn_id,
                log_offsets=log_offsets,
                deadline=deadline,
                hold_s=self.hold_event_s,
                poll_interval_s=self.poll_interval_s,
                until=self.waits_until,
            ),
            method_name="execute_complete",
            timeout=None if left is None else timedelta(seconds=left + _TRIGGERER_GRACE_S),
        )
        raise AssertionError("defer() returned")

    def _deadline(self, context: Context) -> float | None:
        """When `execution_timeout` is up, as Unix time: Airflow forgets it while a task is deferred."""
        if self.execution_timeout is None:
            return None
        return (context["ti"].start_date + self.execution_timeout).timestamp()


def ends_within(task: Task, seconds: float) -> bool:
    """Wait for the end of a task, but not longer than this; return whether it has come."""
    try:
        task.wait(timeout=seconds)
    except FlowTimeoutError:
        return False
    return True
