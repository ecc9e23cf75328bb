"""`@task.flow_gpu`, as it is read and in a real Airflow."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, task

from flow_airflow.decorators import FlowGPUDecoratedOperator
from flow_airflow.nodes import Node
from flow_core import Flow
from tests.airflow.harness import Airflow, Run
from tests.airflow.test_units import context


@pytest.fixture(scope="module")
def run(airflow: Airflow) -> Run:
    return airflow.trigger("decorated")


@pytest.mark.every_airflow
@pytest.mark.parametrize(
    ("task_id", "value"),
    [
        ("uses_helpers", {"value": 4.5, "gpus": 1}),
        ("two_gpus", {"value": 1.5, "gpus": 2}),
        ("factorial", 120),
        ("closure", 16),
        ("total", 21),
        ("from_template", "in {run_id}"),
    ],
)
def test_a_function_of_the_dag_file_runs_with_all_it_refers_to(run: Run, task_id: str, value: Any) -> None:
    node = run.task(task_id)
    assert node.ended() == "success", node.log()
    assert node.xcom() == (value.format(run_id=run.run_id) if isinstance(value, str) else value)


@pytest.mark.every_airflow
def test_a_mapped_and_deferred_function_gives_one_xcom_each(run: Run) -> None:
    for index in range(3):
        node = run.task("triple", index)
        assert node.ended() == "success", node.log()
        assert node.xcom() == 3 * (index + 1) + 1


def test_a_function_can_give_several_outputs_and_get_any_argument(run: Run) -> None:
    node = run.task("several")
    assert node.ended() == "failed"  # a list cannot be in a set: the arguments came as they are
    assert "TypeError" in node.log()
    node = run.task("from_lazy")
    assert node.ended() == "success", node.log()
    assert node.xcom("kinds") == ["int"]


def test_the_functions_own_exception_fails_the_task(run: Run) -> None:
    node = run.task("fails")
    assert node.ended() == "failed"
    assert "TypeError" in node.log() and "return value / 0" in node.log()


# -- as it is read


def made(function: Any, *args: Any, **options: Any) -> FlowGPUDecoratedOperator:
    with DAG("any"):
        return FlowGPUDecoratedOperator(python_callable=function, task_id="node", op_args=args, **options)


def test_a_retry_has_the_work_of_the_first_try(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    factor = {"a": {1, 2, 3}}

    def work(value: int) -> int:
        return value * len(factor["a"])

    flow, now = Flow("local"), context()
    caplog.set_level(logging.INFO)
    first, second = (
        made(work, 2).submit(now, flow, Node.from_context(now))  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert first.task_id == second.task_id
    assert "used before for something else" not in caplog.text
    assert second.result(30) == 6


@pytest.mark.parametrize("name", ["ti", "ds", "params"])
def test_a_context_variable_is_refused_with_the_way_round(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def work(value, {name}=None): return value", namespace)
    with pytest.raises(TypeError, match=f"'work' asks for Airflow's context variable '{name}'.*run_id"):
        made(namespace["work"], 1)
    made(namespace["work"], 1, 2)
    made(namespace["work"], 1, op_kwargs={name: 2})


def test_an_option_that_is_not_known_is_refused_with_the_one_that_was_meant() -> None:
    @task.flow_gpu(gpus="a100")
    def work() -> None: ...

    with DAG("any"), pytest.raises(TypeError, match="takes no argument 'gpus'. Did you mean 'gpu'?"):
        work()
