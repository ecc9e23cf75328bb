"""Work that counts aloud while it is deferred."""

from __future__ import annotations

from airflow.sdk import DAG

from flow_airflow import FlowGPUOperator

with DAG("counting", render_template_as_native_obj=True):
    FlowGPUOperator(
        task_id="count",
        module="work.py",
        function="talk",
        op_args=["{{ dag_run.conf['lines'] }}", "{{ dag_run.conf['pause'] }}"],
        retries=0,
        deferrable=True,
        defer_after_s=2,
        hold_event_s=5,
        poll_interval_s=1,
    )
