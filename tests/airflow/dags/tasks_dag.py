"""Operators about Flow tasks and volumes that are there already: sensors, cancelling, storage."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, task

from flow_airflow import (
    FlowCancelOperator,
    FlowCreateVolumeOperator,
    FlowDeleteVolumeOperator,
    FlowGPUOperator,
    FlowTaskSensor,
)

WATCH = "{{ dag_run.conf['watch'] }}"

with DAG("watching", default_args={"retries": 0}):

    @task
    def hand_on(watch: str) -> str:
        return watch

    handed = hand_on(WATCH)
    FlowTaskSensor(
        task_id="from_trigger",
        task_id_to_watch=WATCH,
        deferrable=True,
        start_from_trigger=True,
        timeout=120,
        hold_event_s=1,
    )
    FlowTaskSensor(
        task_id="from_trigger_by_xcom",
        task_id_to_watch=handed,  # type: ignore[arg-type]
        deferrable=True,
        start_from_trigger=True,
        timeout=120,
        hold_event_s=1,
    )
    FlowTaskSensor(
        task_id="too_long",
        task_id_to_watch="{{ dag_run.conf['long'] }}",
        deferrable=True,
        start_from_trigger=True,
        timeout=5,
    )
    FlowTaskSensor(
        task_id="pickled",
        task_id_to_watch="{{ dag_run.conf['pickled'] }}",
        serialization="pickle",
        poke_interval=1,
        timeout=60,
    )

with DAG("cancelling", default_args={"retries": 0}):
    start = FlowGPUOperator(task_id="start", command="true")
    started: Any = start.output

    @task
    def breaks() -> None:
        raise ValueError("so the teardown has a reason")

    broken = breaks()
    end = FlowCancelOperator(
        task_id="end",
        flow_task_ids=["{{ dag_run.conf['ids'] }}", [started["flow_task_id"]], None, "unknown-1"],
        idempotency_keys="{{ dag_run.conf['key'] }}",
    ).as_teardown(setups=start)
    start >> broken >> end

with DAG("cancelled", default_args={"retries": 0}):
    FlowCancelOperator(
        task_id="again",
        flow_task_ids="{{ dag_run.conf['ids'] }}",
        idempotency_keys=["{{ dag_run.conf['key'] }}", "never used"],
    )

with DAG("volumes", default_args={"retries": 0, "retry_delay": timedelta(seconds=1)}):
    create = FlowCreateVolumeOperator(
        task_id="create", name="{{ dag_run.conf['name'] }}", size_gb="{{ 2 + 3 }}"
    )
    write = FlowGPUOperator(
        task_id="write",
        command="echo kept > /data/file; echo written",
        volumes=[{"volume_id": create.output, "mount_path": "/data"}],
    )
    read = FlowGPUOperator(
        task_id="read",
        command="cat /data/file",
        volumes=[{"name": "{{ dag_run.conf['name'] }}", "mount_path": "/data"}],
    )
    delete = FlowDeleteVolumeOperator(task_id="delete", volume=create.output).as_teardown(  # type: ignore[arg-type]
        setups=create
    )
    again = FlowDeleteVolumeOperator(task_id="delete_again", volume="{{ dag_run.conf['name'] }}")
    create >> write >> read >> delete >> again
