"""Airflow: sweep, pick the best, refit. The functions are in `../digits.py`, which knows nothing of Airflow.

Every node's body runs on a GPU machine; Airflow keeps the states, the retries and the results (XComs). Trigger it with
{"picture": "/where/the.png"} to choose where the confusion matrix goes.
"""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG

from flow_airflow import FlowGPUOperator

with DAG(
    "digits",
    description="Recognise handwritten digits on GPUs",
    params={"picture": str(Path(tempfile.gettempdir()) / "digits-airflow.png")},
    default_args={
        "module": "digits.py",
        "code_root": Path(__file__).resolve().parent.parent,
        "retries": 1,
        "retry_delay": timedelta(seconds=5),
    },
    is_paused_upon_creation=False,
):
    settings = FlowGPUOperator(task_id="settings", function="sweep_settings", instance_type="cpu")
    evaluated = FlowGPUOperator.partial(task_id="evaluate", function="evaluate", gpu="a100").expand(
        op_args=settings.output.map(lambda setting: [setting])
    )
    best = FlowGPUOperator(
        task_id="pick_best", function="pick_best", op_args=[evaluated.output], instance_type="cpu"
    )
    FlowGPUOperator(
        task_id="refit",
        function="refit",
        gpu="a100",
        op_kwargs={"best": best.output, "picture": "{{ params.picture }}"},
    )
