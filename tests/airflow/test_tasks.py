"""Operators about Flow tasks and volumes that are there already, in a real Airflow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flow_airflow.compat import TRIGGERER_RENDERS_TEMPLATES
from flow_core import Flow, Task
from tests.airflow.deployment import DAGS
from tests.airflow.harness import Airflow, Run

WORK = str(DAGS / "work.py")


@pytest.fixture(scope="module")
def watching(airflow: Airflow, flow: Flow) -> Iterator[Run]:
    watch = flow.invoke_async(WORK, "double", [21])
    long = flow.run(["sleep", "300"], upload_code=False)
    pickled = flow.invoke_async(WORK, "names", [["a"]], serialization="pickle")
    yield airflow.trigger("watching", watch=watch.task_id, long=long.task_id, pickled=pickled.task_id)
    assert not long.is_terminal  # a sensor never cancels
    long.cancel()


@pytest.mark.every_airflow
@pytest.mark.parametrize("task_id", ["from_trigger", "from_trigger_by_xcom"])
def test_a_sensor_that_starts_in_the_triggerer_hands_on_the_result(watching: Run, task_id: str) -> None:
    task = watching.task(task_id)
    assert task.ended() == "success", task.log()
    assert task.xcom() == 42
    if TRIGGERER_RENDERS_TEMPLATES:
        assert "goes on" not in task.log()


def test_a_sensor_that_starts_in_the_triggerer_gives_up_in_time(watching: Run) -> None:
    task = watching.task("too_long")
    assert task.ended() == "failed"
    assert "Timeout" in task.log()


def test_a_sensor_unpickles_where_it_is_told_to(watching: Run) -> None:
    task = watching.task("pickled")
    assert task.ended() == "success", task.log()
    assert "a" in str(task.xcom())


def sleeper(flow: Flow, key: str | None = None) -> Task:
    return flow.run(["sleep", "300"], upload_code=False, idempotency_key=key)


def test_tasks_are_cancelled_by_id_and_by_key_also_after_a_failure_and_twice(
    airflow: Airflow, flow: Flow
) -> None:
    by_id, by_key = sleeper(flow), sleeper(flow, "test: to be cancelled")
    run = airflow.trigger("cancelling", ids=by_id.task_id, key="test: to be cancelled")
    assert run.ended() == "failed"
    assert run.task("breaks").state() == "failed"
    end = run.task("end")
    assert end.state() == "success", end.log()
    assert sorted(end.xcom()) == sorted([by_id.task_id, by_key.task_id])
    for one in (by_id, by_key):
        one.refresh()
        assert one.status.value == "cancelled"

    again = airflow.trigger("cancelled", ids=by_id.task_id, key="test: to be cancelled")
    assert again.ended() == "success"
    assert again.task("again").xcom() == []


def test_a_volume_is_there_for_the_tasks_between_its_operators(airflow: Airflow, flow: Flow) -> None:
    run = airflow.trigger("volumes", name="between")
    assert run.ended() == "success", [run.task(one).log() for one in ("create", "write", "read", "delete")]
    assert run.task("read").xcom() == "kept"
    assert run.task("create").xcom().startswith("vol-")
    assert "There is no volume between" in run.task("delete_again").log()
    assert "between" not in [one.name for one in flow.list_volumes()]
