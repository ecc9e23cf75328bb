"""The link from an Airflow task to the page about its Flow task, where there is one. Translates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator


class FlowTaskLink(BaseOperatorLink):
    """Leads to the provider's own page about the task, or to what `task_url` in the settings says.

    Airflow asks for it when a try has ended; so that it is there while the work runs, FlowOperator stores it as soon as
    the task is submitted, under `xcom_key`. Where there is no page the button is not active.
    """

    name = "Flow task"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:
        """Return the address, nothing where there is none."""
        address = getattr(operator, "task_url", None)
        if (
            address is None
        ):  # this leg did not get as far as the task; the one before may have left its address
            address = ti_key.xcom_pull(
                task_ids=ti_key.task_id, key=self.xcom_key, map_indexes=ti_key.map_index
            )
        return address or ""
