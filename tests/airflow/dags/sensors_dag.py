"""Waiting for Flow tasks that somebody else started: `conf["watch"]` ends well, `conf["watch_failed"]` does not."""

from __future__ import annotations

from airflow.sdk import DAG

from flow_airflow import FlowTaskSensor

WATCH = "{{ dag_run.conf['watch'] }}"

with DAG("sensors", default_args={"retries": 0}):
    FlowTaskSensor(task_id="poke", task_id_to_watch=WATCH, poke_interval=1, timeout=600)
    FlowTaskSensor(
        task_id="reschedule", task_id_to_watch=WATCH, poke_interval=3, timeout=600, mode="reschedule"
    )
    FlowTaskSensor(task_id="deferred", task_id_to_watch=WATCH, timeout=600, deferrable=True)
    FlowTaskSensor(
        task_id="failed", task_id_to_watch="{{ dag_run.conf['watch_failed'] }}", poke_interval=1, timeout=60
    )
