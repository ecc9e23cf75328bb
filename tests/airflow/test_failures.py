"""What goes wrong in a node, and which of it is tried again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.airflow.conftest import Passive


def starts(trail: Path, name: str) -> int:
    path = trail.with_name(f"{trail.name}-{name}")
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("task_id", ["raises", "raises_deferred"])
def test_the_remote_traceback_is_in_the_log(passive: Passive, task_id: str) -> None:
    task = passive.failures.task(task_id)
    assert task.ended() == "failed"
    log = task.log()
    assert "about to divide" in log
    assert "Remote execution failed: ZeroDivisionError: division by zero" in log
    assert "in fail\n    return 1 / 0" in log


def test_an_exception_of_the_function_is_tried_again(passive: Passive) -> None:
    task = passive.failures.task("raises_once")
    assert task.ended() == "success", task.log()
    assert task.info["try_number"] == 2
    assert task.xcom() == {"starts": 2}
    assert "ValueError: not this time" in task.log(1)


def test_an_exception_of_the_function_is_tried_as_often_as_retries_says(passive: Passive) -> None:
    task = passive.failures.task("raises_twice")
    assert task.ended() == "failed"
    assert task.info["try_number"] == 2
    assert starts(passive.trail, "raises-twice") == 2


@pytest.mark.parametrize(
    ("task_id", "message"), [("wrong_gpu", "nvidia-a100"), ("wrong_argument", "args[0]")]
)
def test_what_cannot_be_right_is_not_tried_again(passive: Passive, task_id: str, message: str) -> None:
    task = passive.failures.task(task_id)
    assert task.ended() == "failed"
    assert task.info["try_number"] == 1
    assert message in task.log()


def test_a_command_that_fails_fails_the_node_and_says_how(passive: Passive) -> None:
    task = passive.failures.task("exit_code")
    assert task.ended() == "failed"
    assert "so long" in task.log()
    assert "5" in task.log().split("TaskExecutionError", 1)[1]


def test_a_function_that_exits_fails_the_node(passive: Passive) -> None:
    task = passive.failures.task("exits")
    assert task.ended() == "failed"
    assert "SystemExit" in task.log()
