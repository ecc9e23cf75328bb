"""FlowCancelOperator: end Flow tasks that other Airflow tasks, or anybody else, have started. Only translates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from flow_airflow.arguments import each, refuse_unknown
from flow_airflow.hooks import opener

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class FlowCancelOperator(BaseOperator):
    """Cancel Flow tasks and wait until nothing of them runs; the XCom lists the ids of those that had not ended.

    `flow_task_ids` are ids, such as the XComs `flow_task_id` of other Airflow tasks; `idempotency_keys` are keys under
    which tasks were submitted, of which the newest attempts are meant. Both may be one or lists at any depth. What has
    ended, what is unknown, and the XComs of tasks that never ran are passed over, so this may run as often as you like,
    and as a teardown.
    """

    template_fields: Sequence[str] = ("flow_task_ids", "idempotency_keys", "provider", "flow_conn_id")
    ui_color = "#d8f0dc"

    def __init__(
        self,
        *,
        flow_task_ids: Any = None,
        idempotency_keys: Any = None,
        provider: str | None = None,
        flow_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown(type(self), kwargs)
        super().__init__(**kwargs)
        self.flow_task_ids = flow_task_ids
        self.idempotency_keys = idempotency_keys
        self.provider = provider
        self.flow_conn_id = flow_conn_id
        if flow_task_ids is None and idempotency_keys is None:
            raise ValueError(f"FlowCancelOperator {self.task_id!r} needs flow_task_ids or idempotency_keys.")

    def execute(self, context: Context) -> list[str]:  # noqa: ARG002  # Airflow's signature
        """Cancel, and wait for the end; return the ids of those that had not ended."""
        flow = opener(self.provider, self.flow_conn_id)()
        found = (flow.find(key) for key in each(self.idempotency_keys))
        asked = dict.fromkeys(
            [*each(self.flow_task_ids), *(task.task_id for task in found if task is not None)]
        )
        running = (
            [task_id for task_id, seen in flow.poll(asked).items() if not seen.status.final] if asked else []
        )
        if running:
            self.log.info("Cancelling %s.", ", ".join(running))
            flow.cancel(running)
            flow.wait(running)
        self.log.info("%d of %d had not ended; none of them runs now.", len(running), len(asked))
        return running
