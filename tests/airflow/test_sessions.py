"""Warm sessions between a setup and a teardown, in a real Airflow."""

from __future__ import annotations

import pytest

from flow_core import Flow, Session, TaskStatus
from tests.airflow.harness import Airflow, Run, until


@pytest.fixture(scope="module")
def run(airflow: Airflow) -> Run:
    started = airflow.trigger("sessions")
    started.ended()
    return started


@pytest.mark.every_airflow
def test_calls_of_many_tasks_share_the_workers_of_one_session(run: Run) -> None:
    found = []
    for index in range(4):
        node = run.task("embed", index)
        assert node.ended() == "success", node.log()
        assert f"embedding {index + 1}" in node.lines()
        found.append(node.xcom())
    assert [one["square"] for one in found] == [1, 4, 9, 16]
    assert len({one["pid"] for one in found}) <= 2
    assert len({(one["pid"], one["loaded"], one["gpu"]) for one in found}) == len(
        {one["pid"] for one in found}
    )


@pytest.mark.every_airflow
def test_a_function_of_a_file_is_loaded_once_per_worker(run: Run) -> None:
    found = []
    for index in range(3):
        node = run.task("loaded", index)
        assert node.ended() == "success", node.log()
        found.append(node.xcom())
    pids = {one["pid"] for one in found}
    assert len({(one["pid"], one["at"]) for one in found}) == len(pids) <= 2
    assert run.task("total").xcom() == 3.5


def test_a_call_hands_on_a_reference_that_outlives_its_session(run: Run) -> None:
    node = run.task("length")
    assert node.ended() == "success", node.log()
    assert node.xcom() == 1000


def test_the_teardown_ends_the_session_also_when_a_call_has_failed(run: Run, flow: Flow) -> None:
    failed = run.task("breaks")
    assert failed.state() == "failed"
    assert "ValueError: no such token" in failed.log()
    close = run.task("close")
    assert close.state() == "success", close.log()
    session = run.task("start").xcom()
    assert close.xcom() == [session]
    assert flow.get_task(session).status is TaskStatus.CANCELLED


def test_a_call_that_a_user_ends_is_stopped_and_its_session_goes_on(airflow: Airflow, flow: Flow) -> None:
    session = Session.start(flow=flow, workers=1, idle_limit=120)
    run = airflow.trigger("in_session", session=session.task_id, seconds=600)
    naps = run.task("naps")
    naps.reaches("running")
    until("the call runs", lambda: "Calling naps" in naps.log())
    naps.mark("failed")
    until("the call was stopped", lambda: "Airflow ended this task, and its work was cancelled" in naps.log())
    after = airflow.trigger("in_session", session=session.task_id, seconds=0).task("naps")
    assert after.ended() == "success", after.log()  # the one worker is free again
    assert session.is_running
    session.cancel()
    session.wait(30)


@pytest.mark.every_airflow
def test_a_session_waits_for_its_machine_in_the_triggerer(airflow: Airflow, flow: Flow) -> None:
    other = flow.run(["sleep", "600"], gpu="4xa100", upload_code=False)
    try:
        until("the GPUs are taken", lambda: flow.get_task(other.task_id).is_running, 60)
        given_up, start = (airflow.trigger("session_to_wait_for").task("start") for _ in range(2))
        for one in (given_up, start):
            one.reaches("deferred")
        session = flow.get_task(given_up.xcom("flow_task_id"))
        given_up.mark("failed")
        session.wait(60)
        assert session.status is TaskStatus.CANCELLED
        assert start.state() == "deferred"
    finally:
        other.cancel()
    assert start.ended() == "success", start.log()
    session = flow.get_task(start.xcom())
    assert session.is_running
    session.cancel()
    session.wait(60)


def test_a_call_in_a_session_that_has_ended_fails_without_a_retry(airflow: Airflow, flow: Flow) -> None:
    session = Session.start(flow=flow, workers=1, idle_limit=1)
    session.wait(30)
    naps = airflow.trigger("in_session", session=session.task_id, seconds=0).task("naps")
    assert naps.ended() == "failed"
    assert session.task_id in naps.log() and "AirflowFailException" in naps.log()
