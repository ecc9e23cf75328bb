"""A leg of a try as Airflow's worker runs it, against the local provider; what it is given of Airflow is made up."""

from __future__ import annotations

import contextvars
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

from airflow.sdk import DAG
from airflow.sdk.bases.operator import ExecutorSafeguard

from flow_airflow import FlowGPUOperator

NOON = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)


class Events(dict[Any, Any]):
    """Airflow's `outlet_events`, as far as an outlet's event is concerned."""

    def __missing__(self, asset: Any) -> Any:
        return self.setdefault(asset, SimpleNamespace(extra={}))


def worker(operator: FlowGPUOperator, method: str = "execute", **more: Any) -> tuple[Any, dict[str, Any]]:
    """Run one leg of a task as a worker does; return what it returns, and the context it was given."""
    ti = SimpleNamespace(
        dag_id="train",
        run_id="manual__2030",
        task_id=operator.task_id,
        map_index=-1,
        try_number=1,
        max_tries=0,
        start_date=NOON,
        context_carrier=more.pop("carrier", {}),
        xcom_push=more.pop("xcom_push", lambda **_: None),
        is_mapped=False,
    )
    context = {
        "ti": ti,
        "task": operator,
        "dag": operator.dag,
        "dag_run": SimpleNamespace(start_date=NOON),
        "outlet_events": Events(),
    }
    inside = contextvars.copy_context()
    inside.run(ExecutorSafeguard.tracker.set, operator)
    return inside.run(getattr(operator, method), context, **more), context


def node(**arguments: Any) -> FlowGPUOperator:
    with DAG("train"):
        given: dict[str, Any] = {"task_id": "fit", "retries": 0} | arguments
        return FlowGPUOperator(**given)
