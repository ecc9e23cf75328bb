"""A trigger fires before the scheduler has seen the worker leave: Airflow then fails the task (apache/airflow#71580).

The operator waits in the worker first, has the trigger hold its event back, and adopts on a retry.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.airflow.harness import Airflow, TaskRun, until
from tests.airflow.held import alive, pids

pytestmark = pytest.mark.timeout(600)

ROUNDS = 20


def test_quick_work_is_not_failed_in_twenty_rounds(airflow: Airflow) -> None:
    rounds = [airflow.trigger("quick_rounds") for _ in range(ROUNDS)]
    assert {one.ended(500) for one in rounds} == {"success"}, "\n".join(str(one) for one in rounds)
    tasks = [task for one in rounds for task in one.tasks()]
    assert len(tasks) == ROUNDS * 4
    assert {task["try_number"] for task in tasks} == {1}


@contextmanager
def scheduler_frozen(airflow: Airflow) -> Iterator[None]:
    airflow.control("freeze", "scheduler")
    try:
        yield
    finally:
        airflow.control("thaw", "scheduler")


def work_ends_while_the_scheduler_is_frozen(airflow: Airflow, dag_id: str, trail: Path, then: str) -> TaskRun:
    """Freeze the scheduler before the task is deferred, until the work has ended and the task is in state `then`."""
    task = airflow.trigger(dag_id, trail=str(trail)).task("work")
    until("the work has started", lambda: bool(pids(trail)), 120)
    with scheduler_frozen(airflow):
        task.reaches("deferred", timeout_s=60)
        Path(f"{trail}.go").touch()
        until("the work has ended", lambda: not alive(pids(trail)[0]), 30)
        task.reaches(then)
    return task


def test_a_late_scheduler_fails_no_task_whose_event_is_held_back(airflow: Airflow, trail: Path) -> None:
    task = work_ends_while_the_scheduler_is_frozen(airflow, "late_held_back", trail, then="deferred")
    assert task.ended() == "success", task.log()
    assert (task.info["try_number"], len(pids(trail))) == (1, 1)


def test_when_the_event_is_not_held_back_a_try_that_airflow_fails_is_adopted_by_its_retry(
    airflow: Airflow, trail: Path
) -> None:
    task = work_ends_while_the_scheduler_is_frozen(airflow, "late_at_once", trail, then="scheduled")
    assert task.ended() == "success", task.log()
    # It is a race, of which Airflow loses most.
    assert task.info["try_number"] in (1, 2)
    assert len(pids(trail)) == 1
    assert task.xcom()["starts"] == 1
