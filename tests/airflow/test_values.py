"""What a node is given and what it returns, through a real Airflow."""

from __future__ import annotations

from typing import Any

import pytest

from tests.airflow.conftest import Passive


@pytest.mark.parametrize(
    ("task_id", "value"),
    [
        ("give_dict", {"a": 1, "b": [1, 2, {"c": None}]}),
        ("give_list", [1, "two", 3.5]),
        ("give_int", 7),
        ("give_float", 0.25),
        ("give_str", "7"),
        ("give_bool", True),
        ("give_none", None),
        ("deferred_dict", {"a": 1, "b": [0.5]}),
        ("from_xcom", {"lr": 0.5, "layers": [1, 2], "name": "é"}),
        ("scaled", 1.5),
    ],
)
def test_what_the_function_returns_is_the_xcom(passive: Passive, task_id: str, value: Any) -> None:
    task = passive.values.task(task_id)
    assert task.ended() == "success", task.log()
    result = task.xcom()
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("name", ["dict", "int", "float"])
def test_a_downstream_task_gets_the_type_that_the_function_returned(passive: Passive, name: str) -> None:
    task = passive.values.task(f"type_{name}")
    assert task.ended() == "success", task.log()
    assert task.xcom() == name


def test_arguments_are_templated(passive: Passive) -> None:
    task = passive.values.task("from_template")
    assert task.ended() == "success", task.log()
    assert task.xcom() == ["0.5", passive.values.run_id]


@pytest.mark.parametrize(
    ("task_id", "last_line"),
    [
        ("command", "hello {run_id}"),
        ("argv", "a b; $HOME|it's|2|"),
        ("uploaded", "ran from the uploaded folder"),
    ],
)
def test_the_last_line_of_a_command_is_the_xcom(passive: Passive, task_id: str, last_line: str) -> None:
    task = passive.values.task(task_id)
    assert task.ended() == "success", task.log()
    assert task.xcom() == last_line.format(run_id=passive.values.run_id)


def test_a_node_gets_the_gpus_it_asks_for(passive: Passive) -> None:
    task = passive.values.task("gpus")
    assert task.ended() == "success", task.log()
    assert len(set(task.xcom()["visible"].split(","))) == 2


def test_the_output_of_a_deferred_task_is_in_its_log_once_and_in_order(passive: Passive) -> None:
    task = passive.values.task("deferred_talk")
    assert task.ended() == "success", task.log()
    assert task.xcom() == 60
    lines = [line for line in task.log().split("\n") if line.startswith("line ")]
    assert lines == [f"line {number:03d} 100% {{x}} %s ü \\n" for number in range(60)]


def test_the_output_of_a_command_is_in_the_log(passive: Passive) -> None:
    task = passive.values.task("command")
    task.ended()
    lines = task.lines()
    assert lines.index("first") < lines.index(f"hello {passive.values.run_id}")


def test_the_id_of_the_flow_task_is_an_xcom(passive: Passive) -> None:
    task = passive.values.task("give_int")
    task.ended()
    assert task.xcom("flow_task_id").startswith("values-give-int-")


def test_a_node_mapped_over_eight_inputs_runs_eight_times(passive: Passive) -> None:
    run = passive.mapped
    assert run.ended() == "success", run
    assert [run.task("double", index).xcom() for index in range(8)] == [2.0 * index for index in range(8)]
    assert run.task("total").xcom() == run.task("remote_total").xcom() == 56


def test_twenty_quick_tasks_survive_their_deferral(passive: Passive) -> None:
    run = passive.quick
    assert run.ended(240) == "success", run
    tasks = run.tasks()
    assert len(tasks) == 20
    assert {one["try_number"] for one in tasks} == {1}
    assert [run.task("quick", index).xcom() for index in range(20)] == [str(index) for index in range(20)]
