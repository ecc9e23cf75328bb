"""The remote output is in the task's log once and in order, however often the triggerer is killed meanwhile."""

from __future__ import annotations

import time

from tests.airflow.harness import Airflow

COUNT, PAUSE_S = 1200, 0.05


def test_every_line_is_in_the_log_once_and_in_order_though_the_triggerer_is_killed_twice(
    airflow: Airflow,
) -> None:
    task = airflow.trigger("counting", lines=COUNT, pause=PAUSE_S).task("count")
    task.reaches("deferred")
    for number in (60, 400):
        wanted = f"line {number:03d}"
        while wanted not in task.log():
            time.sleep(0.2)
        time.sleep(0.4)  # somewhere between two ticks, or in one
        airflow.control("kill", "triggerer")
        airflow.control("start", "triggerer")
    assert task.ended(240) == "success", task.log()
    # Where Airflow does not keep pace, one event of its log holds several lines.
    shown = [line for line in task.log().split("\n") if line.startswith("line ")]
    assert shown == [f"line {number:03d} 100% {{x}} %s ü \\n" for number in range(COUNT)]
    assert task.info["try_number"] == 1
