"""FlowTaskSensor in a real Airflow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flow_core import Flow
from tests.airflow.deployment import DAGS
from tests.airflow.harness import Airflow, Run
from tests.airflow.held import let_end


@pytest.fixture(scope="module")
def watching(airflow: Airflow, flow: Flow, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    trail: Path = tmp_path_factory.mktemp("sensors") / "trail"
    work = str(DAGS / "work.py")
    good = flow.invoke_async(work, "long", [str(trail), 600])
    bad = flow.invoke_async(work, "fail", [str(trail)])
    run = airflow.trigger("sensors", watch=good.task_id, watch_failed=bad.task_id)
    try:
        for task_id, waits in (
            ("poke", "running"),
            ("reschedule", "up_for_reschedule"),
            ("deferred", "deferred"),
        ):
            run.task(task_id).reaches(waits)
        let_end(trail)
        yield run
    finally:
        flow.cancel([good.task_id])


@pytest.mark.every_airflow
@pytest.mark.parametrize("task_id", ["poke", "reschedule", "deferred"])
def test_a_sensor_hands_on_the_result(watching: Run, task_id: str) -> None:
    task = watching.task(task_id)
    assert task.ended() == "success", task.log()
    assert task.xcom()["starts"] >= 1


def test_a_sensor_fails_with_the_task_it_watches(watching: Run) -> None:
    task = watching.task("failed")
    assert task.ended() == "failed"
    assert "Remote execution failed: ZeroDivisionError: division by zero" in task.log()
