"""When a flow ends early, nothing of it goes on; when its process is killed, the next one takes over what runs."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import cloudpickle
import pytest
from prefect import Flow as PrefectFlow
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flow_core import Flow
from flow_prefect import FlowTaskRunner
from tests.prefect.flows import three, work
from tests.prefect.machine import Machine, until


def run_id(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("flow run "):
            return line.split()[2]
    raise AssertionError("the flow's process ended before it had a flow run")


def output(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=90)
    return text


def task_states(flow_run_id: str) -> list[str]:
    """The states that Prefect's server knows of a flow run's tasks, each once it is final."""

    def final() -> list[str]:
        with get_client(sync_client=True) as client:
            one = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run_id)]))
            states = [run.state for run in client.read_task_runs(flow_run_filter=one)]
        return [str(state.name) for state in states if state is not None and state.is_final()]

    until("three final task runs", lambda: len(final()) == 3)
    return final()


def flow_state(flow_run_id: str) -> str:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(flow_run_id)).state
    return "" if state is None else str(state.name)


@pytest.mark.parametrize("name", ["three", "three_async"])
def test_sigterm_stops_everything_at_once(machine: Machine, name: str) -> None:
    process = machine.execute(name, mark=machine.mark("work"), seconds=60)
    flow_run_id = run_id(process)
    machine.wait_for("work", 2)  # the third waits for a GPU slot or a processor, or runs already
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    text = output(process)
    took = time.monotonic() - began
    assert process.returncode == -signal.SIGTERM, text
    until("the end of all processes", lambda: not machine.processes(), 20)
    assert took < 40
    assert machine.count("work.done") == 0
    assert task_states(flow_run_id) == ["Crashed"] * 3
    assert flow_state(flow_run_id) == "Crashed"


def test_a_flow_that_raises_stops_what_it_has_running(machine: Machine) -> None:
    process = machine.execute("fails_early", mark=machine.mark("work"), seconds=60)
    text = output(process)
    assert "the flow itself failed" in text
    until("the end of all processes", lambda: not machine.processes(), 20)
    assert machine.count("work.done") == 0


def test_a_flow_that_returns_waits_for_what_it_has_running(machine: Machine) -> None:
    process = machine.execute("leaves_early", mark=machine.mark("work"), seconds=1)
    text = output(process)
    assert process.returncode == 0, text
    assert "Waiting for 1 GPU task to end" in text
    assert machine.count("work.done") == 1


def test_a_killed_flow_process_leaves_its_bodies_to_the_next(machine: Machine) -> None:
    mark = machine.mark("work")
    process = machine.execute("quick_then_slow", mark=mark, seconds=60)
    flow_run_id = run_id(process)
    machine.wait_for("work", 2)
    process.kill()
    process.wait()
    assert len(machine.processes()) > 0
    again = machine.execute("quick_then_slow", mark=mark, seconds=60, run=flow_run_id)
    run_id(again)
    time.sleep(0.1)
    Path(mark + ".go").touch()
    text = output(again)
    assert "result [10, 20]" in text, text
    assert (machine.count("work"), machine.count("work.done")) == (2, 2)  # each ran once
    assert machine.processes() == []


def test_the_next_process_takes_over_by_what_is_called_and_stops_what_nobody_asks_for(
    machine: Machine,
) -> None:
    mark = machine.mark("work")
    process = machine.execute("quick_then_slow", mark=mark, seconds=60, number=2)
    flow_run_id = run_id(process)
    machine.wait_for("work", 2)
    process.kill()
    process.wait()
    again = machine.execute("quick_then_slow", mark=mark, seconds=0, number=3, run=flow_run_id)
    text = output(again)
    assert "result [10, 30]" in text, text
    until("the end of what nobody asked for", lambda: not machine.processes(), 30)
    assert [line.split()[0] for line in Path(mark).read_text().splitlines()] == ["1", "2", "3"]
    assert Path(mark + ".done").read_text().split() == ["1", "3"]


def test_a_flow_run_that_was_stopped_starts_its_bodies_anew(machine: Machine) -> None:
    mark = machine.mark("work")
    process = machine.execute("quick_then_slow", mark=mark, seconds=60)
    flow_run_id = run_id(process)
    machine.wait_for("work", 2)
    process.send_signal(signal.SIGTERM)
    output(process)
    Path(mark + ".go").touch()
    text = output(machine.execute("quick_then_slow", mark=mark, seconds=60, run=flow_run_id))
    assert "result [10, 20]" in text, text
    assert [line.split()[0] for line in Path(mark).read_text().splitlines()] == ["1", "2", "2"]


def test_cancel_all_on_the_flow_s_runner_reaches_the_duplicate_that_runs(machine: Machine) -> None:
    runner: FlowTaskRunner = FlowTaskRunner()

    @flow(task_runner=runner)
    def waits() -> list[str]:
        futures = work.map([machine.mark("work")] * 2, [60.0] * 2, [1, 2])
        futures.wait()
        return [str(future.state.name) for future in futures]

    def cancel() -> None:
        machine.wait_for("work", 2)
        runner.cancel_all()
        runner.cancel_all()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    assert waits() == ["Crashed", "Crashed"]
    canceller.join()
    until("the end of all processes", lambda: not machine.processes(), 20)
    assert machine.count("work.done") == 0


def test_a_failed_flow_that_is_retried_does_not_pay_twice(machine: Machine) -> None:
    tries: list[int] = []

    @flow(task_runner=FlowTaskRunner(), retries=1)
    def second_time_lucky() -> int:
        value = work.submit(machine.mark("work"), 0, 4).result()
        tries.append(value)
        if len(tries) == 1:
            raise ValueError("after the body had ended")
        return value

    assert second_time_lucky() == 40
    assert (len(tries), machine.count("work")) == (2, 1)


def test_runners_of_the_same_settings_are_equal_and_travel() -> None:
    runner: FlowTaskRunner = FlowTaskRunner(gpu="a100", max_workers=3, env={"A": "1"})
    assert runner.name == "flow"
    assert runner.duplicate() == runner
    assert runner != FlowTaskRunner(gpu="a100", max_workers=4, env={"A": "1"})
    assert cloudpickle.loads(cloudpickle.dumps(runner)) == runner
    with runner as started:
        assert cloudpickle.loads(cloudpickle.dumps(started)) == runner
    shipped: PrefectFlow[Any, Any] = cloudpickle.loads(cloudpickle.dumps(three))
    assert shipped.task_runner == three.task_runner


def test_nothing_is_submitted_by_a_runner_that_was_not_started(machine: Machine) -> None:
    with pytest.raises(RuntimeError, match="not started"):
        FlowTaskRunner().submit(work, {"mark": machine.mark("work"), "seconds": 0.0, "number": 1})
    assert Flow().list_tasks() == []
