"""Airflow with CeleryExecutor: two workers, of which one is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.airflow.conftest import plan
from tests.airflow.harness import Airflow, TaskRun, running_airflow, until
from tests.airflow.held import alive, pids

pytestmark = pytest.mark.timeout(600)

WORKERS = ("worker-1", "worker-2")


@pytest.fixture(scope="module")
def celery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    """An Airflow whose tasks run on two workers, with PostgreSQL and Redis."""
    home = tmp_path_factory.mktemp("celery")
    with running_airflow(plan(home, database="postgresql", executor="CeleryExecutor")) as started:
        yield started


def held(celery: Airflow, dag_id: str, trail: Path, state: str) -> TaskRun:
    task = celery.trigger(dag_id, trail=str(trail)).task("work")
    until("the work has started", lambda: bool(pids(trail)), 120)
    task.reaches(state)
    return task


@pytest.mark.parametrize(("dag_id", "state"), [("held_sync", "running"), ("held_deferred", "deferred")])
def test_work_runs_to_its_end(celery: Airflow, trail: Path, dag_id: str, state: str) -> None:
    task = held(celery, dag_id, trail, state)
    Path(f"{trail}.go").touch()
    assert task.ended() == "success", task.log()
    assert task.xcom() == {"starts": 1, "pid": pids(trail)[0]}


def test_a_user_ends_the_work(celery: Airflow, trail: Path) -> None:
    task = held(celery, "held_sync", trail, "running")
    task.mark("failed")
    until("the work is gone", lambda: not alive(pids(trail)[0]), 60)
    assert len(pids(trail)) == 1


@pytest.mark.parametrize("verb", ["kill", "shut"])
def test_the_other_worker_takes_over_from_one_that_is_lost(
    celery: Airflow, trail: Path, verb: Literal["kill", "shut"]
) -> None:
    task = held(celery, "held_sync", trail, "running")
    lost = worker_of(celery, task)
    celery.control(verb, lost)
    try:
        until("the other worker has it", lambda: taken_over(celery, task, lost), 120)
        Path(f"{trail}.go").touch()
        assert task.ended() == "success", task.log()
        assert task.info["try_number"] == 2
        assert task.xcom() == {"starts": 1, "pid": pids(trail)[0]}
    finally:
        celery.control("start", lost)


def worker_of(celery: Airflow, task: TaskRun) -> str:
    """Return the worker in whose session the process of a task is."""
    pid = until("Airflow knows the worker's process", lambda: task.info["pid"])
    session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3]
    return next(name for name in WORKERS if (celery.home / f"{name}.session").read_text() == session)


def taken_over(celery: Airflow, task: TaskRun, lost: str) -> bool:
    info = task.info
    return (
        info["try_number"] == 2
        and info["state"] == "running"
        and info["pid"] is not None
        and worker_of(celery, task) != lost
    )
