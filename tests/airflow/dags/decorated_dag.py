"""`@task.flow_gpu`: functions of the DAG file, with what they refer to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from airflow.sdk import DAG, task

RATE = 3


@dataclass
class Scale:
    factor: int

    def of(self, value: float) -> float:
        return self.factor * value


def helper(value: float) -> float:
    return Scale(RATE).of(value)


def scaled_by(offset: int) -> Any:
    def with_offset(value: float) -> float:
        return helper(value) + offset

    return with_offset


with DAG("decorated", default_args={"retries": 0}):

    @task
    def numbers() -> list[int]:
        return [1, 2, 3]

    @task.flow_gpu(gpu="a100")
    def uses_helpers(value: float) -> dict[str, Any]:
        return {"value": helper(value), "gpus": len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))}

    @task.flow_gpu
    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)  # type: ignore[operator]

    @task.flow_gpu(deferrable=True, defer_after_s=0)
    def triple(value: int, *, plus: int = 0) -> int:
        return int(helper(value)) + plus

    @task.flow_gpu(serialization="pickle", multiple_outputs=True)
    def several(values: Any) -> Any:
        return {"kinds": sorted({type(one).__name__ for one in values}), "unique": set(values)}

    @task.flow_gpu(gpu="a100", deferrable=True, defer_after_s=0)
    def fails(value: int) -> float:
        return value / 0

    @task
    def total(values: Any) -> int:
        return sum(values)

    given: Any = numbers()
    uses_helpers.override(task_id="two_gpus", gpu="2xa100")(0.5)
    uses_helpers(1.5)
    factorial(5)
    task.flow_gpu(task_id="closure")(scaled_by(10))(2)
    tripled = triple.partial(plus=1).expand(value=given)
    total(tripled)
    several([given, (1, 2)])
    several.override(task_id="from_lazy")(tripled)
    fails(given)
    task.flow_gpu(task_id="from_template")(lambda run: f"in {run}")("{{ run_id }}")
