"""Kills, clears, timeouts and restarts: the work is neither lost, nor doubled, nor left behind."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Literal

import pytest

from tests.airflow.harness import Airflow, TaskRun, until


def pids(trail: Path) -> list[int]:
    """Return the process ids of the work that has started, in order."""
    lines = trail.read_text().splitlines() if trail.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("start ")]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def started(trail: Path, count: int = 1) -> int:
    """Wait until the work has started `count` times; return the process id of the last."""
    return until(f"start {count} of the work", lambda: len(pids(trail)) >= count and pids(trail)[count - 1])


def gone(pid: int) -> None:
    until(f"the work with process id {pid} is gone", lambda: not alive(pid), 30)


def long(airflow: Airflow, dag_id: str, trail: Path, seconds: float) -> TaskRun:
    return airflow.trigger(dag_id, trail=str(trail), seconds=seconds).task("work")


@pytest.mark.parametrize(("dag_id", "state"), [("long", "running"), ("long_deferred", "deferred")])
def test_marking_a_task_failed_ends_its_work(airflow: Airflow, trail: Path, dag_id: str, state: str) -> None:
    task = long(airflow, dag_id, trail, 300)
    pid = started(trail)
    task.reaches(state)
    until("the output is in the log while the work runs", lambda: "half second 3" in task.log())
    task.mark("failed")
    gone(pid)
    assert task.run.ended() == "failed"
    assert len(pids(trail)) == 1


@pytest.mark.parametrize(("dag_id", "state"), [("long", "running"), ("long_deferred", "deferred")])
def test_clearing_a_task_ends_its_work_and_starts_anew(
    airflow: Airflow, trail: Path, dag_id: str, state: str
) -> None:
    task = long(airflow, dag_id, trail, 20)
    first = started(trail)
    task.reaches(state)
    task.run.clear("work")
    second = started(trail, 2)
    assert task.ended() == "success", task.log()
    assert task.xcom() == {"starts": 2, "pid": second}
    assert trail.read_text().splitlines() == [f"start {first}", f"tidied up {first}", f"start {second}"]


def test_a_retry_after_the_worker_died_adopts_the_running_work(airflow: Airflow, trail: Path) -> None:
    task = long(airflow, "long", trail, 40)
    pid = started(trail)
    until("Airflow knows the worker's process", lambda: task.info["pid"])
    worker = task.info["pid"]
    supervisor = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    for one in (supervisor, worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    assert task.ended(150) == "success", task.log()
    assert task.info["try_number"] == 2
    assert task.xcom() == {"starts": 1, "pid": pid}
    assert "half second 0" in task.lines(2)


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


@pytest.mark.parametrize("dag_id", ["limited", "limited_deferred"])
def test_the_execution_timeout_ends_the_work(airflow: Airflow, trail: Path, dag_id: str) -> None:
    task = long(airflow, dag_id, trail, 300)
    pid = started(trail)
    assert task.ended(60) == "failed"
    gone(pid)
    assert "AirflowTaskTimeout" in task.log()


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_deferred_task_survives_a_restart_of_the_triggerer(
    airflow: Airflow, trail: Path, end: Literal["kill", "stop"]
) -> None:
    task = long(airflow, "long_deferred", trail, 20)
    pid = started(trail)
    task.reaches("deferred")
    airflow.control(end, "triggerer")
    airflow.control("start", "triggerer")
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
