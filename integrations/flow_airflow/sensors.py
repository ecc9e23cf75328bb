"""FlowTaskSensor: wait for a Flow task that somebody else started, and hand on its result."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from airflow.configuration import conf
from airflow.sdk import BaseSensorOperator, PokeReturnValue, XComArg
from airflow.sdk.definitions.xcom_arg import PlainXComArg
from airflow.triggers.base import StartTriggerArgs, TriggerEvent

from flow_airflow.arguments import refuse_serialization, refuse_unknown
from flow_airflow.compat import TRIGGERER_RENDERS_TEMPLATES, AirflowFailException
from flow_airflow.hooks import opener
from flow_airflow.results import REFERENCE_OVER_BYTES
from flow_airflow.triggers import FlowEvent, FlowTaskTrigger
from flow_airflow.xcom_values import flaw
from flow_core.errors import FlowError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class FlowTaskSensor(BaseSensorOperator):
    """Succeed, with its result as XCom, when the Flow task `task_id_to_watch` has; fail when it has failed.

    A failure is final here: waiting again cannot change how the task ended. The sensor never cancels the
    task, which belongs to whoever started it. The id of a FlowGPUOperator's task is its XCom `flow_task_id`.
    `serialization="pickle"` says that the value was sent so, and may be unpickled. One of more than a mebibyte comes as
    a reference, as from a FlowGPUOperator.

    With `deferrable` the triggerer asks every `poll_interval_s`, in one poll with all others that wait for
    tasks of the provider and connection, and tells `hold_event_s` after the deferral at the earliest; see
    FlowTaskTrigger. With `start_from_trigger` too no worker is needed before the task has ended. (A mapped
    sensor begins in a worker all the same, and so does one whose templates call `xcom_pull` without `map_indexes`.)
    """

    template_fields: Sequence[str] = ("task_id_to_watch", "provider", "flow_conn_id")
    ui_color = "#d8f0dc"
    start_from_trigger = False

    def __init__(
        self,
        *,
        task_id_to_watch: str,
        provider: str | None = None,
        flow_conn_id: str | None = None,
        serialization: Literal["json", "pickle"] = "json",
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        start_from_trigger: bool = False,
        hold_event_s: float = 10.0,
        poll_interval_s: float = 2.0,
        **kwargs: Any,
    ) -> None:
        refuse_unknown(type(self), kwargs)
        super().__init__(**kwargs)
        self.task_id_to_watch = task_id_to_watch
        self.provider = provider
        self.flow_conn_id = flow_conn_id
        self.serialization = serialization
        self.deferrable = deferrable
        self.hold_event_s = hold_event_s
        self.poll_interval_s = poll_interval_s
        refuse_serialization(self, serialization)
        if start_from_trigger and not deferrable:
            raise ValueError(
                f"FlowTaskSensor {self.task_id!r}: start_from_trigger goes with deferrable=True."
            )
        if start_from_trigger and TRIGGERER_RENDERS_TEMPLATES:
            path, arguments = self._trigger().serialize()
            renderable = {name: _for_the_triggerer(value) for name, value in arguments.items()}
            self.start_from_trigger = not any(map(_hangs, renderable.values()))
            self.start_trigger_args = StartTriggerArgs(
                trigger_cls=path,
                trigger_kwargs=renderable,
                next_method="execute_complete",
                timeout=timedelta(seconds=self.timeout),
            )

    def execute(self, context: Context) -> Any:
        """Wait in the way that `mode` and `deferrable` say; return the watched task's result."""
        if not self.deferrable:
            return super().execute(context)
        seen = self.poke(context)
        if seen.is_done:
            return seen.xcom_value
        self.defer(
            trigger=self._trigger(), method_name="execute_complete", timeout=timedelta(seconds=self.timeout)
        )
        raise AssertionError("defer() returned")

    def poke(self, context: Context) -> PokeReturnValue:  # noqa: ARG002  # Airflow's signature
        """Ask once. Done only on success."""
        try:
            flow = opener(self.provider, self.flow_conn_id)()
            task = flow.get_task(
                self.task_id_to_watch, serialization=self.serialization, result=REFERENCE_OVER_BYTES
            )
            if not task.is_terminal:
                self.log.info("Flow task %s: %s.", task.task_id, task.status.value)
                return PokeReturnValue(is_done=False)
            value = task.result(timeout=0)
            wrong = flaw(value) if self.do_xcom_push else None
            if wrong is not None:
                raise AirflowFailException(
                    f"The result of Flow task {task.task_id} cannot be an XCom: {wrong}"
                )
            return PokeReturnValue(is_done=True, xcom_value=value)
        except FlowError as error:
            if error.retryable and not getattr(error, "task_id", None):
                self.log.warning("No answer about Flow task %s: %s", self.task_id_to_watch, error.message)
                return PokeReturnValue(is_done=False)
            raise AirflowFailException(str(error)) from error

    def execute_complete(self, context: Context, event: FlowEvent) -> Any:  # noqa: ARG002  # likewise
        """Return the result of the task that the trigger saw end."""
        return self.poke(context).xcom_value

    def _trigger(self) -> FlowSensorTrigger:
        return FlowSensorTrigger(
            task_id_to_watch=self.task_id_to_watch,
            provider=self.provider,
            flow_conn_id=self.flow_conn_id,
            hold_s=self.hold_event_s,
            poll_interval_s=self.poll_interval_s,
        )


def _for_the_triggerer(value: Any) -> Any:
    """Return a template that the triggerer can render.

    Its `xcom_pull` never returns, unless it is told which map index is meant: Airflow's triggerer answers no question
    for all of them (GetXComSequenceSlice, in 3.3.2).
    """
    if isinstance(value, PlainXComArg) and not value.operator.is_mapped:
        where = f"task_ids={value.operator.task_id!r}, key={value.key!r}, map_indexes=-1"
        return f"{{{{ ti.xcom_pull({where}) }}}}"
    return str(value) if isinstance(value, XComArg) else value


def _hangs(template: Any) -> bool:
    text = str(template)
    return "xcom_pull" in text and "map_indexes" not in text


class FlowSensorTrigger(FlowTaskTrigger):
    """A trigger that leaves the task alone, and whose arguments are named as the sensor's template fields.

    That is how the triggerer knows which of them to render when no worker has.
    """

    def __init__(
        self,
        *,
        task_id_to_watch: str,
        provider: str | None = None,
        flow_conn_id: str | None = None,
        hold_s: float = 10.0,
        poll_interval_s: float = 2.0,
    ) -> None:
        super().__init__(
            flow_task_id=task_id_to_watch,
            provider=provider,
            flow_conn_id=flow_conn_id,
            hold_s=hold_s,
            poll_interval_s=poll_interval_s,
            cancel_on_kill=False,
        )
        self.task_id_to_watch = task_id_to_watch

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class path and the arguments with which another process makes this trigger again."""
        arguments = {
            "task_id_to_watch": self.task_id_to_watch,
            "provider": self.provider,
            "flow_conn_id": self.flow_conn_id,
            "hold_s": self.hold_s,
            "poll_interval_s": self.poll_interval_s,
        }
        return f"{__name__}.{type(self).__name__}", arguments

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield one event, when the task has ended."""
        self.flow_task_id = self.task_id_to_watch  # it may have been rendered since
        async for event in super().run():
            yield event
