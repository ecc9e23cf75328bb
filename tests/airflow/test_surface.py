"""What a DAG author can write, in a real Airflow."""

from __future__ import annotations

from typing import Any

import pytest

from tests.airflow.harness import Airflow, Run


@pytest.fixture(scope="module")
def run(airflow: Airflow) -> Run:
    return airflow.trigger("surface")


@pytest.mark.parametrize(
    ("task_id", "value"),
    [
        ("deep_arguments", [{"a": [0.5, {"b": [[1, 2], "2"]}]}]),
        ("deep_command", "deep|0.5|"),
        ("deep_environment", "2"),
        ("not_a_file", "train.sh"),
    ],
)
def test_arguments_come_at_any_depth(run: Run, task_id: str, value: Any) -> None:
    task = run.task(task_id)
    assert task.ended() == "success", task.log()
    assert task.xcom() == value


@pytest.mark.parametrize("task_id", ["pickled", "pickled_deferred"])
def test_a_value_may_be_what_json_does_not_carry(run: Run, task_id: str) -> None:
    task = run.task(task_id)
    assert task.ended() == "success", task.log()
    assert "b" in str(task.xcom())


def test_a_mapping_can_become_several_xcoms(run: Run) -> None:
    task = run.task("several")
    assert task.ended() == "success", task.log()
    assert (task.xcom("loss"), task.xcom("epochs")) == (0.5, 3)
