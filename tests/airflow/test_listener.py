"""What the listener cancels, when Airflow says that a task is over; test_matrix.py has a real Airflow say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_airflow.listener import Account, cancel
from flow_airflow.nodes import labels_of
from flow_core import Flow

MINE = labels_of("dag", "run", "node", 3)


@pytest.fixture
def flow(home: Path) -> Flow:
    return Flow(provider="local")


def test_the_work_of_the_task_is_cancelled(flow: Flow) -> None:
    work = flow.run(["sleep", "60"], upload_code=False, labels={**MINE, "team": "vision"})
    cancel(Account(None, None), {work.task_id: MINE})
    work.wait(30)
    assert work.status.value == "cancelled"


@pytest.mark.parametrize(
    "labels", [{}, labels_of("dag", "run", "node", 2), labels_of("dag", "run", "other", 3)]
)
def test_work_that_an_xcom_only_names_is_left_alone(flow: Flow, labels: dict[str, str]) -> None:
    work = flow.run(["sleep", "60"], upload_code=False, labels=labels)
    cancel(Account(None, None), {work.task_id: MINE})
    work.refresh()
    assert not work.is_terminal


def test_work_that_is_gone_or_has_ended_is_no_error(flow: Flow) -> None:
    ended = flow.run(["true"], upload_code=False, labels=MINE)
    ended.wait(30)
    cancel(Account(None, None), {ended.task_id: MINE, "work-0123456789abcdef-1": MINE})
    ended.refresh()
    assert ended.status.value == "completed"
