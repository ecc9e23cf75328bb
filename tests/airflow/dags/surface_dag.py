"""What a DAG author can write: arguments at any depth, templates of numbers, values that JSON does not carry."""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, task

from flow_airflow import FlowGPUOperator

with DAG("surface", default_args={"retries": 0}):

    @task(multiple_outputs=True)
    def produce() -> Any:
        return {"lr": 0.5, "layers": [1, 2], "name": "deep"}

    produced: Any = produce()

    FlowGPUOperator(
        task_id="deep_arguments",
        module="work.py",
        function="echo",
        op_args=[[{"a": [produced["lr"], {"b": (produced["layers"], "{{ 1 + 1 }}")}]}]],
        op_kwargs={},
    )
    FlowGPUOperator(
        task_id="deep_command",
        command=["printf", "%s|", produced["name"], produced["lr"]],
        env={"NAME": produced["name"]},
        labels={"of": produced["name"]},
    )
    FlowGPUOperator(
        task_id="deep_environment",
        command='echo "$NAME $CUDA_VISIBLE_DEVICES" | tr , "\\n" | wc -l; test "$NAME" = deep',
        env={"NAME": produced["name"]},
        gpu="{{ 1 + 1 }}xa100",
        max_run_time_hours="{{ 1 / 2 }}",
        upload_code="{{ 1 > 2 }}",
    )
    FlowGPUOperator(task_id="not_a_file", command="echo no.sh; echo train.sh")
    FlowGPUOperator(
        task_id="pickled", module="work.py", function="names", op_args=[["a", "b"]], serialization="pickle"
    )
    FlowGPUOperator(
        task_id="pickled_deferred",
        module="work.py",
        function="names",
        op_args=[["a", "b"], 3],
        serialization="pickle",
        deferrable=True,
        defer_after_s=0,
    )
    FlowGPUOperator(
        task_id="several",
        module="work.py",
        function="echo",
        op_args=[{"loss": 0.5, "epochs": 3}],
        multiple_outputs=True,
    )

with DAG("connected", default_args={"retries": 0, "flow_conn_id": "{{ 'surface' }}", "gpu": "a100"}):
    FlowGPUOperator(task_id="sync", command="pwd -P; echo $FLOW_TASK_DIR")
    FlowGPUOperator(
        task_id="deferred", command="sleep 2; echo $FLOW_TASK_DIR", deferrable=True, defer_after_s=0
    )
    FlowGPUOperator(task_id="long", command="sleep {{ dag_run.conf.get('seconds', 0) }}")
    FlowGPUOperator(task_id="unknown", command="true", flow_conn_id="nowhere")
