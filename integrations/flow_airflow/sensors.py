"""FlowTaskSensor: wait for a Flow task that somebody else started, and hand on its result."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.configuration import conf
from airflow.sdk import BaseSensorOperator, PokeReturnValue

from flow_airflow.compat import AirflowFailException
from flow_airflow.hooks import opener
from flow_airflow.triggers import FlowEvent, FlowTaskTrigger
from flow_core.errors import FlowError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class FlowTaskSensor(BaseSensorOperator):
    """Succeed, with its result as XCom, when the Flow task `task_id_to_watch` has; fail when it has failed.

    A failure is final here: waiting again cannot change how the task ended. The sensor never cancels the
    task, which belongs to whoever started it. The id of a FlowGPUOperator's task is its XCom `flow_task_id`.

    With `deferrable` the triggerer asks every `poll_interval_s`, in one poll with all others that wait for
    tasks of the provider, and tells `hold_event_s` after the deferral at the earliest; see FlowTaskTrigger.
    """

    template_fields: Sequence[str] = ("task_id_to_watch", "provider", "flow_conn_id")
    ui_color = "#d8f0dc"

    def __init__(
        self,
        *,
        task_id_to_watch: str,
        provider: str | None = None,
        flow_conn_id: str | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        hold_event_s: float = 10.0,
        poll_interval_s: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.task_id_to_watch = task_id_to_watch
        self.provider = provider
        self.flow_conn_id = flow_conn_id
        self.deferrable = deferrable
        self.hold_event_s = hold_event_s
        self.poll_interval_s = poll_interval_s

    def execute(self, context: Context) -> Any:
        """Wait in the way that `mode` and `deferrable` say; return the watched task's result."""
        if not self.deferrable:
            return super().execute(context)
        seen = self.poke(context)
        if seen.is_done:
            return seen.xcom_value
        self.defer(
            trigger=FlowTaskTrigger(
                flow_task_id=self.task_id_to_watch,
                provider=self.provider,
                flow_conn_id=self.flow_conn_id,
                hold_s=self.hold_event_s,
                poll_interval_s=self.poll_interval_s,
                cancel_on_kill=False,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout),
        )
        raise AssertionError("defer() returned")

    def poke(self, context: Context) -> PokeReturnValue:  # noqa: ARG002  # Airflow's signature
        """Ask once. Done only on success."""
        try:
            task = opener(self.provider, self.flow_conn_id)().get_task(self.task_id_to_watch)
            if not task.is_terminal:
                self.log.info("Flow task %s: %s.", task.task_id, task.status.value)
                return PokeReturnValue(is_done=False)
            return PokeReturnValue(is_done=True, xcom_value=task.result(timeout=0))
        except FlowError as error:
            if error.retryable and not getattr(error, "task_id", None):
                self.log.warning("No answer about Flow task %s: %s", self.task_id_to_watch, error.message)
                return PokeReturnValue(is_done=False)
            raise AirflowFailException(str(error)) from error

    def execute_complete(self, context: Context, event: FlowEvent) -> Any:  # noqa: ARG002  # likewise
        """Return the result of the task that the trigger saw end."""
        return self.poke(context).xcom_value
