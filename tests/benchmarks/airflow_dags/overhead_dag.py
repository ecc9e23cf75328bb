"""The same nothing, in as many ways as an Airflow task can be written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, task

from flow_airflow import FlowGPUOperator

COUNT = int(os.environ["FLOW_BENCH_OVERHEAD"])
FOLDER = os.environ["FLOW_BENCH_FOLDER"]
#: A Python without Airflow, as a user's other environment is.
OTHER_PYTHON = str(Path(sys.base_prefix) / "bin" / "python3")

retries: dict[str, Any] = {"default_args": {"retries": 0}, "max_active_tasks": 64}


@task
def python(number: int) -> int:
    return number


@task.external_python(python=OTHER_PYTHON, expect_airflow=False, expect_pendulum=False)
def external_python(number: int) -> int:
    return number


@task.virtualenv(requirements=[], system_site_packages=False, venv_cache_path=f"{FOLDER}/venvs")
def virtualenv(number: int) -> int:
    return number


with DAG("overhead_bash", **retries):
    BashOperator.partial(task_id="bash").expand(bash_command=["true"] * COUNT)

with DAG("overhead_python", **retries):
    python.expand(number=list(range(COUNT)))

with DAG("overhead_external_python", **retries):
    external_python.expand(number=list(range(COUNT)))

with DAG("overhead_virtualenv", **retries):
    virtualenv.expand(number=list(range(COUNT)))

with DAG("overhead_flow_command", **retries):
    FlowGPUOperator.partial(task_id="command").expand(command=["true"] * COUNT)

with DAG("overhead_flow_function", **retries):
    FlowGPUOperator.partial(task_id="function", module=str(Path(FOLDER) / "noop.py"), function="noop").expand(
        op_args=[[number] for number in range(COUNT)]
    )

with DAG("overhead_flow_deferred", **retries):
    FlowGPUOperator.partial(
        task_id="deferred",
        deferrable=True,
        defer_after_s=0,
        hold_event_s=float(os.environ["FLOW_BENCH_HOLD_S"]),
    ).expand(command=["sleep 1"] * COUNT)
