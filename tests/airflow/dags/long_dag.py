"""One long piece of work, in the worker and deferred, to be killed, cleared and timed out."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG

from flow_airflow import FlowGPUOperator

work: dict[str, Any] = {
    "module": "work.py",
    "function": "long",
    "op_args": ["{{ dag_run.conf['trail'] }}", "{{ dag_run.conf['seconds'] }}"],
    "retry_delay": timedelta(seconds=1),
}

with DAG("long", render_template_as_native_obj=True):
    FlowGPUOperator(task_id="work", retries=1, **work)

with DAG("long_beside", render_template_as_native_obj=True):
    FlowGPUOperator(task_id="work", retries=1, **work)
    FlowGPUOperator(
        task_id="keeps_the_run_going", command=["sleep", "{{ 120 }}"], env={"SECONDS_": "{{ 120 }}"}
    )

with DAG("long_deferred", render_template_as_native_obj=True):
    FlowGPUOperator(task_id="work", retries=1, deferrable=True, defer_after_s=0, hold_event_s=5, **work)
