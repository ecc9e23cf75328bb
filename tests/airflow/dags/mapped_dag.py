"""Many at once."""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, task

from flow_airflow import FlowGPUOperator

with DAG("mapped"):

    @task
    def total(values: Any) -> float:
        return float(sum(values))

    doubled = FlowGPUOperator.partial(
        task_id="double", module="work.py", function="double", gpu="a100", retries=0
    ).expand(op_args=[[number] for number in range(8)])
    total(doubled.output)
    FlowGPUOperator(
        task_id="remote_total", module="work.py", function="total", op_args=[doubled.output], retries=0
    )

with DAG("quick", max_active_tasks=20):
    FlowGPUOperator.partial(
        task_id="quick", retries=0, deferrable=True, defer_after_s=0, poll_interval_s=1
    ).expand(command=[f"echo {number}" for number in range(20)])
