"""What goes in and what comes out: commands and functions, in the worker and deferred."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, task

from flow_airflow import FlowGPUOperator

with DAG("values", default_args={"retries": 0}):

    @task(multiple_outputs=True)
    def produce() -> Any:
        return {"lr": 0.5, "layers": [1, 2], "name": "é"}

    @task
    def type_of(value: Any) -> str:
        return type(value).__name__

    produced: Any = produce()
    for name, value in {
        "dict": {"a": 1, "b": [1, 2, {"c": None}]},
        "list": [1, "two", 3.5],
        "int": 7,
        "float": 0.25,
        "str": "7",
        "bool": True,
        "none": None,
    }.items():
        node = FlowGPUOperator(
            task_id=f"give_{name}", module="work.py", function="echo", op_kwargs={"value": value}
        )
        if name in ("dict", "int", "float"):
            type_of.override(task_id=f"type_{name}")(node.output)

    FlowGPUOperator(task_id="from_xcom", module="work.py", function="echo", op_args=[produced])
    FlowGPUOperator(
        task_id="from_template",
        module="work.py",
        function="echo",
        op_args=["{{ ti.xcom_pull(task_ids='produce')['lr'] }}", "{{ run_id }}"],
    ).set_upstream(produced)
    FlowGPUOperator(
        task_id="scaled", module="pack.steps", function="scale", op_args=[produced["lr"]], code_root="tree"
    )
    FlowGPUOperator(task_id="gpus", module="work.py", function="gpus", gpu="2xa100")
    FlowGPUOperator(
        task_id="command", command='echo first; echo "$GREETING"', env={"GREETING": "hello {{ run_id }}"}
    )
    FlowGPUOperator(task_id="argv", command=["printf", "%s|", "a b; $HOME", "it's", "{{ 1 + 1 }}"])
    FlowGPUOperator(task_id="uploaded", command="bash run.txt", code_root="tree")
    FlowGPUOperator(
        task_id="deferred_dict",
        module="work.py",
        function="echo",
        op_kwargs={"value": {"a": 1, "b": [0.5]}},
        deferrable=True,
        defer_after_s=0,
    )
    FlowGPUOperator(
        task_id="deferred_talk",
        module="work.py",
        function="talk",
        op_args=[60, 0.2],
        deferrable=True,
        defer_after_s=1,
        execution_timeout=timedelta(minutes=5),
    )
