"""The trigger, and what the operator does when a deferral ends badly, on the local provider without a triggerer."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flow_airflow import FlowGPUOperator, FlowTaskTrigger
from flow_airflow.compat import TaskDeferralError, TaskDeferralTimeout
from flow_airflow.nodes import Node
from flow_core import Flow, Task, TaskStatus

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def flow(home: Path) -> Flow:
    return Flow(provider="local")


def context(*, try_number: int = 1, retries: int = 0) -> Any:
    ti = SimpleNamespace(
        dag_id="dag", run_id="run", task_id="node", map_index=-1, try_number=try_number, max_tries=retries
    )
    started = datetime(2025, 1, 1, tzinfo=timezone.utc)
    return {
        "ti": ti,
        "task": SimpleNamespace(retries=retries),
        "dag_run": SimpleNamespace(start_date=started),
    }


def running(flow: Flow, context: Any) -> Task:
    return flow.run(["sleep", "60"], upload_code=False, idempotency_key=Node.from_context(context).key)


async def event_of(trigger: FlowTaskTrigger) -> Any:
    async for event in trigger.run():
        return event.payload
    raise AssertionError("the trigger ended without an event")


async def test_the_trigger_shows_the_output_and_fires_at_the_end(
    flow: Flow, capsys: pytest.CaptureFixture[str]
) -> None:
    task = flow.run("echo one; sleep 1; echo two; printf three", upload_code=False)
    event = await event_of(
        FlowTaskTrigger(flow_task_id=task.task_id, log_offsets=[4], hold_s=0, poll_interval_s=0.2)
    )
    assert event == {"flow_task_id": task.task_id, "outcome": "ended", "log_offsets": [13]}
    shown = [line for line in capsys.readouterr().out.splitlines() if "FlowTaskTrigger" in line]
    assert ["two" in shown[0], "three" in shown[1], len(shown)] == [True, True, 2]


async def test_a_trigger_can_wait_for_the_start_alone(flow: Flow) -> None:
    task = flow.run(["sleep", "60"], upload_code=False)
    event = await event_of(
        FlowTaskTrigger(flow_task_id=task.task_id, until="started", hold_s=0, poll_interval_s=0.1)
    )
    assert event["outcome"] == "ended"
    assert flow.get_task(task.task_id).is_running


async def test_the_first_event_is_held_back(flow: Flow) -> None:
    task = flow.run(["true"], upload_code=False)
    task.wait(30)
    began = time.monotonic()
    await event_of(FlowTaskTrigger(flow_task_id=task.task_id, hold_s=1.5, poll_interval_s=0.1))
    assert time.monotonic() - began >= 1.5


async def test_at_the_deadline_the_trigger_cancels_the_work(flow: Flow) -> None:
    task = flow.run(["sleep", "60"], upload_code=False)
    event = await event_of(FlowTaskTrigger(flow_task_id=task.task_id, deadline=time.time() + 1, hold_s=0))
    assert event["outcome"] == "deadline"
    task.wait(30)
    assert task.status is TaskStatus.CANCELLED


async def test_a_user_who_ends_the_task_ends_the_work(flow: Flow) -> None:
    task = flow.run(["sleep", "60"], upload_code=False)
    await FlowTaskTrigger(flow_task_id=task.task_id).on_kill()
    task.wait(30)
    assert task.status is TaskStatus.CANCELLED


async def test_a_sensor_that_is_ended_leaves_the_work_alone(flow: Flow) -> None:
    task = flow.run(["sleep", "60"], upload_code=False)
    await FlowTaskTrigger(flow_task_id=task.task_id, cancel_on_kill=False).on_kill()
    assert flow.poll([task.task_id])[task.task_id].reason != "cancelling"
    assert not task.is_terminal


async def test_a_triggerer_that_stops_leaves_the_work_alone(flow: Flow) -> None:
    task = flow.run(["sleep", "60"], upload_code=False)
    waiting = asyncio.create_task(event_of(FlowTaskTrigger(flow_task_id=task.task_id)))
    await asyncio.sleep(1.0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not flow.get_task(task.task_id).is_terminal


def test_a_deferral_that_times_out_ends_the_work(flow: Flow) -> None:
    now = context(retries=1)
    task = running(flow, now)
    with pytest.raises(TaskDeferralTimeout):
        FlowGPUOperator(task_id="node", command="true").resume_execution(
            "__fail__", {"error": "Trigger timeout"}, now
        )
    task.wait(30)
    assert task.status is TaskStatus.CANCELLED


@pytest.mark.parametrize("error", ["Trigger timeout", "Trigger failure"])
def test_work_that_has_ended_well_needs_no_trigger_to_say_so(flow: Flow, error: str) -> None:
    now = context()
    flow.run("echo done", upload_code=False, idempotency_key=Node.from_context(now).key).wait(30)
    operator = FlowGPUOperator(task_id="node", command="echo done")
    assert operator.resume_execution("__fail__", {"error": error}, now) == "done"


@pytest.mark.parametrize(("try_number", "goes_on"), [(1, True), (2, False)])
def test_a_trigger_that_fails_ends_the_work_unless_a_retry_will_adopt_it(
    flow: Flow, try_number: int, goes_on: bool
) -> None:
    now = context(try_number=try_number, retries=1)
    task = running(flow, now)
    with pytest.raises(TaskDeferralError):
        FlowGPUOperator(task_id="node", command="true").resume_execution(
            "__fail__", {"error": "Trigger failure"}, now
        )
    if not goes_on:
        task.wait(30)
    task.refresh()
    assert task.is_terminal is not goes_on
