"""Clears and restarts with their finer points; whatever else can happen is in test_matrix.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.airflow.harness import Airflow, TaskRun, until
from tests.airflow.held import let_end, pids


def started(trail: Path, count: int = 1) -> int:
    """Wait until the work has started `count` times; return the process id of the last."""
    return until(f"start {count} of the work", lambda: len(pids(trail)) >= count and pids(trail)[count - 1])


def long(airflow: Airflow, dag_id: str, trail: Path, seconds: float) -> TaskRun:
    return airflow.trigger(dag_id, trail=str(trail), seconds=seconds).task("work")


@pytest.mark.parametrize(("dag_id", "state"), [("long", "running"), ("long_deferred", "deferred")])
def test_clearing_a_task_ends_its_work_and_starts_anew(
    airflow: Airflow, trail: Path, dag_id: str, state: str
) -> None:
    task = long(airflow, dag_id, trail, 300)
    first = started(trail)
    task.reaches(state)
    until("the output is in the log while the work runs", lambda: "half second 3" in task.log())
    task.run.clear("work")
    second = started(trail, 2)
    let_end(trail)
    assert task.ended() == "success", task.log()
    assert task.xcom() == {"starts": 2, "pid": second}
    assert trail.read_text().splitlines() == [f"start {first}", f"tidied up {first}", f"start {second}"]


@pytest.mark.every_airflow
def test_a_clear_after_success_runs_the_work_again_in_a_run_that_had_ended(
    airflow: Airflow, trail: Path
) -> None:
    task = long(airflow, "long", trail, 1)
    for count in (1, 2, 3):
        assert task.run.ended() == "success", task.log()
        assert task.xcom()["starts"] == count
        if count < 3:
            task.run.clear("work")
            until("the run goes on", lambda: task.run.state() not in ("success", "failed"))


@pytest.mark.every_airflow
def test_a_clear_after_success_runs_the_work_again_while_the_run_goes_on(
    airflow: Airflow, trail: Path
) -> None:
    task = long(airflow, "long_beside", trail, 1)
    for count in (1, 2):
        started(trail, count)
        task.reaches("success")
        assert task.xcom()["starts"] == count
        task.run.clear("work")
    started(trail, 3)
    beside = task.run.task("keeps_the_run_going")
    assert beside.state() == "running", beside.log()
    beside.mark("failed")


def test_a_deferred_task_survives_an_orderly_restart_of_the_triggerer(airflow: Airflow, trail: Path) -> None:
    task = long(airflow, "long_deferred", trail, 300)
    pid = started(trail)
    task.reaches("deferred")
    airflow.control("stop", "triggerer")
    airflow.control("start", "triggerer")
    until("the triggerer runs", airflow.healthy)
    let_end(trail)
    assert task.ended(150) == "success", task.log()
    assert task.info["try_number"] == 1
    assert task.xcom() == {"starts": 1, "pid": pid}


def test_a_clear_while_no_triggerer_runs_still_ends_the_work(airflow: Airflow, trail: Path) -> None:
    task = long(airflow, "long_deferred", trail, 60)
    first = started(trail)
    task.reaches("deferred")
    airflow.control("kill", "triggerer")
    try:
        task.run.clear("work")
        second = started(trail, 2)
        assert trail.read_text().splitlines() == [f"start {first}", f"tidied up {first}", f"start {second}"]
        task.mark("failed")
    finally:
        airflow.control("start", "triggerer")
