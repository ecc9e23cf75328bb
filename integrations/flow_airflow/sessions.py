"""Warm sessions as setup and teardown, with calls between them that find their workers started. Only translates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flow_airflow.arguments import plain, texts
from flow_airflow.cancelling import FlowCancelOperator
from flow_airflow.legs import FlowOperator, ends_within
from flow_core import TaskStatus
from flow_core.errors import FlowError, SessionClosedError

if TYPE_CHECKING:
    from airflow.sdk import Context

    from flow_airflow.logs import TaskLog
    from flow_airflow.nodes import Node
    from flow_core import Flow, Task
    from flow_core.models import MountSpec, VolumeSpec

#: The options of a session that are passed on as they are; None stands for "not given".
_OPTIONS = (
    *("workers", "gpu", "image", "env", "idle_limit_s", "max_run_time_hours"),
    *("volumes", "data_mounts", "region", "max_price_per_hour"),
)

_LOOK_S = 0.5


class FlowStartSessionOperator(FlowOperator):
    """Start warm workers for the calls of other Airflow tasks; the XCom is the session's id. A setup, by its nature.

        start = FlowStartSessionOperator(task_id="start", gpu="a100", workers=2)
        close = FlowCloseSessionOperator(task_id="close", session=start.output).as_teardown(setups=start)

        @task.flow_gpu(session=start.output)
        def embed(text: str) -> list[float]: ...

    The options are those of `flow_core.Session`: each of the `workers` has a `gpu` of its own. The session is there
    when this task succeeds, and belongs to nobody: it ends when it is closed, when nothing has been called for
    `idle_limit_s` (an hour unless given), or after `max_run_time_hours`, whatever becomes of Airflow. Until the machine
    is there this task waits: in its worker, or with `deferrable` in the triggerer.
    """

    waits_until = "started"

    template_fields: Sequence[str] = ("name", "labels", "provider", "flow_conn_id", *_OPTIONS)

    def __init__(  # noqa: PLR0913  # a session's options, one by one, so that editors and Airflow's mapping know them
        self,
        *,
        workers: int = 1,
        gpu: str | None = None,
        image: str | None = None,
        env: Mapping[str, str] | None = None,
        idle_limit_s: float = 3600.0,
        max_run_time_hours: float | None = None,
        volumes: Sequence[VolumeSpec | Mapping[str, Any]] | None = None,
        data_mounts: Sequence[MountSpec | Mapping[str, Any]] | None = None,
        region: str | None = None,
        max_price_per_hour: float | None = None,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.workers = workers
        self.gpu = gpu
        self.image = image
        self.env = env
        self.idle_limit_s = idle_limit_s
        self.max_run_time_hours = max_run_time_hours
        self.volumes = volumes
        self.data_mounts = data_mounts
        self.region = region
        self.max_price_per_hour = max_price_per_hour
        self.name = name
        self.labels = labels

    def submit(self, context: Context, flow: Flow, node: Node) -> Task:  # noqa: ARG002  # what the legs give
        """Start the session, under the node's key."""
        from flow_core import Session

        options: dict[str, Any] = {
            name: plain(value) for name in _OPTIONS if (value := getattr(self, name)) is not None
        }
        if isinstance(self.env, Mapping):
            options["env"] = texts(self.env)
        options["name"] = self.name or node.name
        options["labels"] = {**node.labels, **(self.labels or {})}
        return Session.start(flow=flow, idempotency_key=node.key, **options)

    def follow(self, context: Context, task: Task, log: TaskLog) -> str:  # noqa: ARG002  # what the legs give
        """Wait for the machine, or defer; return the session's id."""
        told, defer_at = "", time.monotonic() + self.defer_after_s
        while not self.done(task.status):
            if ends_within(task, _LOOK_S):
                raise _ended(task)
            self.check_stop()
            said = f"{task.status.value} {task.message or ''}".strip()
            if said != told:
                self.log.info("Session %s: %s.", task.task_id, said)
                told = said
            if self.deferrable and time.monotonic() >= defer_at:
                self.go_on_deferred(context, task, log_offsets=None)
        return task.task_id

    def done(self, status: TaskStatus) -> bool:
        """Whether the session takes calls."""
        return status is TaskStatus.RUNNING


class FlowCloseSessionOperator(FlowCancelOperator):
    """End a session and wait until its machine is free. A teardown, by its nature; what has ended already is left."""

    template_fields: Sequence[str] = ("session", "provider", "flow_conn_id")

    def __init__(self, *, session: str, **kwargs: Any) -> None:
        super().__init__(flow_task_ids=session, **kwargs)
        self.session = session

    def execute(self, context: Context) -> list[str]:
        """End the session; return its id, nothing if it had ended."""
        self.flow_task_ids = self.session
        return super().execute(context)


def _ended(task: Task) -> FlowError:
    """Return the error that says why a session takes no calls any more."""
    if not task.status.succeeded:
        return task.error()
    return SessionClosedError(
        f"session {task.task_id} has ended already: it was closed, or idle for too long",
        suggestions=["Clear this task: that starts a new session."],
    )
