"""What goes wrong, and what Airflow makes of it. `conf["trail"]` is where the work counts its starts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from flow_airflow import FlowGPUOperator

TRAIL = "{{ dag_run.conf['trail'] }}"
retry: dict[str, Any] = {"retries": 1, "retry_delay": timedelta(seconds=1)}

with DAG("failures", default_args={"retries": 0}):
    FlowGPUOperator(task_id="raises", module="work.py", function="fail", op_args=[TRAIL + "-raises"])
    FlowGPUOperator(
        task_id="raises_twice", module="work.py", function="fail", op_args=[TRAIL + "-raises-twice"], **retry
    )
    FlowGPUOperator(
        task_id="raises_once", module="work.py", function="fail_once", op_args=[TRAIL + "-once"], **retry
    )
    FlowGPUOperator(task_id="wrong_gpu", command="true", gpu="nvidia-a100", **retry)
    FlowGPUOperator(task_id="wrong_argument", module="work.py", function="echo", op_args=[{1, 2}], **retry)
    FlowGPUOperator(task_id="exit_code", command="echo so long; exit 5")
    FlowGPUOperator(task_id="exits", module="work.py", function="exit_badly")
    FlowGPUOperator(
        task_id="raises_deferred",
        module="work.py",
        function="fail",
        op_args=[TRAIL + "-deferred"],
        deferrable=True,
        defer_after_s=0,
    )
