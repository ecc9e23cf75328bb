"""Many at once."""

from __future__ import annotations

from airflow.sdk import DAG, task

from flow_airflow import FlowGPUOperator

with DAG("mapped"):

    @task
    def total(values: list[float]) -> float:
        return sum(values)

    doubled = FlowGPUOperator.partial(
        task_id="double", module="work.py", function="double", gpu="a100", retries=0
    ).expand(op_args=[[number] for number in range(8)])
    total(doubled.output)

with DAG("quick", max_active_tasks=20):
    FlowGPUOperator.partial(
        task_id="quick", retries=0, deferrable=True, defer_after_s=0, poll_interval_s=1
    ).expand(command=[f"echo {number}" for number in range(20)])
