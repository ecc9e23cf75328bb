"""What a result becomes: the same value in the next task, a reference, or a refusal from which it is collected."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, task

from flow_airflow import FlowGPUOperator, load


def node(task_id: str, function: str, *op_args: Any, **more: Any) -> FlowGPUOperator:
    return FlowGPUOperator(task_id=task_id, module="work.py", function=function, op_args=op_args, **more)


@task
def describe(value: Any) -> str:
    """Say what has arrived, in words that no serializer changes."""
    return f"{type(value).__name__} {value!r}"


with DAG("typed_results", default_args={"retries": 0}, max_active_tasks=4):
    for name in ("tuple", "nested", "set", "datetime", "decimal", "uuid"):
        made = node(f"make_{name}", "typed", name, serialization="pickle")
        describe.override(task_id=f"got_{name}")(made.output)
    for name in ("int_keys", "bytes", "nan", "path", "exception", "naive_enum", "huge_int", "nul"):
        node(f"refuse_{name}", "typed", name, serialization="pickle", retries=2)
    node("refuse_json", "typed", "bytes", retries=2)
    node("nan_as_none", "typed", "nan", nan_as_none=True)

    outputs: Any = node("outputs", "typed", "plain_dict", multiple_outputs=True).output
    describe.override(task_id="got_output")(outputs["loss"])
    node("no_outputs", "echo", 7, multiple_outputs=True)

    some = FlowGPUOperator.partial(task_id="some_none", module="work.py", function="none_if_two").expand(
        op_args=[[1], [2], [3]]
    )

    @task
    def as_list(values: Any) -> list[Any]:
        return list(values)

    as_list.override(task_id="got_some_none")(some.output)

    empty = node("map_over_none", "echo", None)
    describe.override(task_id="never").expand(value=empty.output)

with DAG("references", default_args={"retries": 0}, max_active_tasks=4):
    small = node("small", "zeros", 10)
    large = node("large", "zeros", 700_000)
    both = FlowGPUOperator.partial(task_id="some_large", module="work.py", function="zeros").expand(
        op_args=[[10], [800_000]]
    )
    node("deep", "lengths", {"list": [large.output, {"small": small.output}]}, both.output)
    node("deferred_large", "zeros", 700_001, deferrable=True, defer_after_s=0)

    @task
    def length(value: Any) -> list[Any]:
        """An ordinary task: what has arrived, and what it stands for."""
        return [type(value).__name__, "uri" in value, len(load(value))]

    length.override(task_id="loaded_large")(large.output)
    length.override(task_id="loaded_small")(small.output)

    @task
    def lengths_loaded(values: Any) -> list[int]:
        return [len(one) for one in load(values)]

    lengths_loaded(both.output)

    asked = node("asked", "typed", "bytes", serialization="pickle", result_as="reference")
    node("use_asked", "count_bytes", asked.output, serialization="pickle")

    mapped = node("mapped_over", "zeros", 3, reference_over_bytes=5)
    describe.override(task_id="each").expand(value=mapped.output)

with DAG("collected", default_args={"retries": 0}):
    changed = Path(os.environ["AIRFLOW_HOME"], "result_as")  # the test edits the operator, so to speak
    how: Any = changed.read_text() if changed.exists() else "auto"
    node("kept", "typed_once", "{{ dag_run.conf['trail'] }}", serialization="pickle", result_as=how)
