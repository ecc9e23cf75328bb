"""Sessions that nobody owns: started once, joined by whoever calls, ended by a limit or on purpose."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow, Session, ValidationError
from tests.sessions.conftest import eventually, processes_of


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_a_session_without_an_owner_is_there_after_a_silence_longer_than_its_lease(flow: Flow) -> None:
    task = Session.start(flow=flow, workers=1, lease=1, idle_limit=60)
    try:
        pids = set()
        for _ in range(2):
            time.sleep(2.5)  # nobody is there
            with Session.from_id(task.task_id, flow=flow, workers=1) as session:
                pids.add(session.function(pid_after).remote(0).result(30))
        assert len(pids) == 1  # the worker has stayed warm
        assert task.is_running
    finally:
        task.cancel()


def test_a_session_without_an_owner_ends_when_nobody_calls(flow: Flow) -> None:
    task = Session.start(flow=flow, workers=1, idle_limit=1.5)
    task.wait(30)
    assert task.status.succeeded


def test_a_session_without_an_owner_must_have_an_end(flow: Flow) -> None:
    with pytest.raises(ValidationError, match="needs an end"):
        Session.start(flow=flow)


def test_one_key_starts_one_session(flow: Flow) -> None:
    first, second = (Session.start(flow=flow, idle_limit=60, idempotency_key="one") for _ in range(2))
    assert first.task_id == second.task_id
    first.cancel()


def test_clients_of_one_session_spread_over_its_workers(flow: Flow) -> None:
    task = Session.start(flow=flow, workers=3, idle_limit=60)
    sessions = [Session.from_id(task.task_id, flow=flow) for _ in range(3)]
    try:
        calls: list[Any] = []
        for session in sessions:
            call = session.function(pid_after).remote(1.5)
            calls.append(call)
            eventually(lambda: calls[-1].status == "running")
        assert len({call.result(30) for call in calls}) == 3
        fourth = Session.from_id(task.task_id, flow=flow)
        assert fourth.function(pid_after).remote(0).result(30) in {call.result() for call in calls}
        fourth.close()
    finally:
        for session in sessions:
            session.close()
        task.cancel()


def test_a_client_whose_first_call_is_quicker_than_its_connection_takes_one_worker(
    flow: Flow, home: Path
) -> None:
    task = Session.start(flow=flow, workers=4, idle_limit=60)
    others: list[Session] = []
    counts = []
    try:
        for _ in range(3):
            others.append(Session.from_id(task.task_id, flow=flow))
            assert others[-1].function(pid_after).remote(0).result(30)
            counts.append(len(processes_of(home)))
        assert counts == [counts[0], counts[0] + 1, counts[0] + 2]
    finally:
        for session in others:
            session.close()
        task.cancel()


def test_a_call_in_a_joined_session_can_be_cancelled_on_whichever_worker_it_is(flow: Flow) -> None:
    task = Session.start(flow=flow, workers=2, idle_limit=60)
    with (
        Session.from_id(task.task_id, flow=flow) as one,
        Session.from_id(task.task_id, flow=flow) as other,
    ):
        first = one.function(pid_after).remote(2)
        eventually(lambda: first.status == "running")
        second = other.function(pid_after).remote(60)
        eventually(lambda: second.status == "running")
        second.cancel()
        assert second.exception(20) is not None
        assert first.result(20) > 0
    task.cancel()
