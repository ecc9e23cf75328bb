"""What the documentation's screenshots show: a sweep, each run of which takes a while, and its best."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG

from flow_airflow import FlowGPUOperator

RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)

with DAG(
    "training",
    default_args={"retries": 1, "retry_delay": timedelta(seconds=2), "flow_conn_id": "gpus"},
    is_paused_upon_creation=False,
):
    losses = FlowGPUOperator.partial(
        task_id="train",
        module="train.py",
        function="train",
        gpu="a100",
        deferrable=True,
        defer_after_s=4,
        map_index_template="{{ task.op_kwargs['rate'] }}",
    ).expand(op_kwargs=[{"epochs": 8, "rate": rate} for rate in RATES])
    FlowGPUOperator(
        task_id="pick_best",
        module=str(Path(__file__).parent / "train.py"),
        function="pick_best",
        op_args=[losses.output],
        instance_type="cpu",
    )
