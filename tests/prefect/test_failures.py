"""How bodies end otherwise: with an exception, with the machine, out of time, by exit. And what Prefect makes of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.exceptions import CrashedRun

from flow_core import RemoteExecutionError, SerializationError, WorkerDiedError
from flow_prefect import FlowTaskRunner
from tests.prefect.machine import Machine, until


class MyError(Exception):
    pass


def tries(mark: str) -> int:
    """Count this try of a body, and say the how many-th it is."""
    with Path(mark).open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(Path(mark).read_text().splitlines())


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def ends(future: Any) -> State[Any]:
    future.wait()
    state: State[Any] = future.state
    return state


def outcome(task_: Any, *args: Any) -> State[Any]:
    """Run one task in a flow of its own and return the state in which it ended."""
    seen: list[State[Any]] = []

    @flow(task_runner=FlowTaskRunner())
    def one() -> None:
        seen.append(ends(task_.submit(*args)))

    one()
    return seen[0]


def test_the_user_s_exception_comes_back_as_itself(machine: Machine) -> None:
    @task
    def fails() -> None:
        raise MyError("line 3 of the input")

    state = outcome(fails)
    assert state.is_failed()
    with pytest.raises(MyError) as error:
        state.result()
    assert isinstance(error.value, RemoteExecutionError)
    assert "Remote execution failed: MyError: line 3 of the input" in str(error.value)
    assert 'raise MyError("line 3 of the input")' in error.value.remote_traceback


def test_one_failure_of_a_map_leaves_the_others_alone(machine: Machine) -> None:
    @task
    def fussy(x: int) -> int:
        if x == 2:
            raise ValueError("not two")
        return x

    @flow(task_runner=FlowTaskRunner())
    def mapped() -> list[Any]:
        return [future.result(raise_on_failure=False) for future in fussy.map([1, 2, 3])]

    one, two, three = mapped()
    assert (one, three) == (1, 3)
    assert isinstance(two, ValueError)


def test_retries_start_the_body_again_until_it_succeeds(machine: Machine) -> None:
    @task(retries=2)
    def third_time_lucky(mark: str) -> int:
        if (n := tries(mark)) < 3:
            raise ValueError(f"try {n}")
        return n

    assert outcome(third_time_lucky, machine.mark("tries")).result() == 3
    assert machine.count("tries") == 3


def test_retries_apply_when_the_process_dies(machine: Machine) -> None:
    @task(retries=2)
    def dies_twice(mark: str) -> int:
        if (n := tries(mark)) < 3:
            os._exit(137)
        return n

    assert outcome(dies_twice, machine.mark("tries")).result() == 3


def test_retries_apply_when_the_machine_is_lost(machine: Machine) -> None:
    @task(retries=1)
    def loses_its_runner(mark: str) -> int:
        if (n := tries(mark)) == 1:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        return n

    assert outcome(loses_its_runner, machine.mark("tries")).result() == 2
    first = int(Path(machine.mark("tries")).read_text().split()[0])
    assert not alive(first)  # the second started after the last process of the first was gone


def test_without_retries_a_lost_machine_is_an_error_that_says_so(machine: Machine) -> None:
    @task
    def loses_its_runner() -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    state = outcome(loses_its_runner)
    assert state.is_failed()
    with pytest.raises(WorkerDiedError):
        state.result()


def test_a_retry_condition_sees_our_errors(machine: Machine) -> None:
    def is_lost(_task: Any, _run: Any, state: State[Any]) -> bool:
        return isinstance(state.result(raise_on_failure=False), WorkerDiedError)

    @task(retries=5, retry_condition_fn=is_lost)
    def fails(mark: str) -> None:
        tries(mark)
        raise ValueError("my own fault")

    assert outcome(fails, machine.mark("tries")).is_failed()
    assert machine.count("tries") == 1


def test_a_timeout_ends_the_work_on_the_machine(machine: Machine) -> None:
    @task(timeout_seconds=1)
    def endless(mark: str) -> None:
        tries(mark)
        time.sleep(60)

    began = time.monotonic()
    state = outcome(endless, machine.mark("started"))
    took = time.monotonic() - began
    assert (state.name, state.type.value) == ("TimedOut", "FAILED")
    assert "timeout_seconds=1 are over" in str(state.message)
    until("the end of its processes", lambda: not machine.processes(), 20)
    assert took < 40


def test_a_timeout_is_retried(machine: Machine) -> None:
    @task(timeout_seconds=2, retries=1)
    def slow_at_first(mark: str) -> int:
        if (n := tries(mark)) == 1:
            time.sleep(60)
        return n

    assert outcome(slow_at_first, machine.mark("tries")).result() == 2


@pytest.mark.parametrize("how", ["exit", "interrupt"])
def test_a_body_that_exits_crashes_its_run_is_not_retried_and_waiting_does_not_raise(
    machine: Machine, how: str
) -> None:
    @task(retries=3)
    def leaves(mark: str) -> None:
        tries(mark)
        if how == "exit":
            sys.exit(3)
        raise KeyboardInterrupt

    state = outcome(leaves, machine.mark("tries"))
    assert state.is_crashed()
    with pytest.raises(CrashedRun, match="system exit" if how == "exit" else "interrupt"):
        state.result()
    assert machine.count("tries") == 1


def test_what_follows_a_failure_does_not_start(machine: Machine) -> None:
    @task
    def fails() -> None:
        raise ValueError

    @task
    def follows(value: Any, mark: str) -> None:
        tries(mark)

    @flow(task_runner=FlowTaskRunner())
    def chain() -> None:
        states.append(ends(follows.submit(fails.submit(), machine.mark("ran"))))

    states: list[State[Any]] = []
    chain()
    assert states[0].name == "NotReady"
    assert machine.count("ran") == 0


def test_what_cannot_travel_is_named(machine: Machine) -> None:
    @task
    def takes(thing: Any) -> None: ...

    @task
    def gives() -> Any:
        return {"lock": threading.Lock()}

    with pytest.raises(SerializationError, match=r"args\[0\]\['lock'\]"):
        outcome(takes, {"lock": threading.Lock()}).result()
    with pytest.raises(Exception, match=r"result\['lock'\]"):
        outcome(gives).result()


def test_a_task_that_somebody_cancels_crashes_and_is_not_retried(machine: Machine) -> None:
    @task(retries=3)
    def endless(mark: str) -> None:
        tries(mark)
        time.sleep(60)

    @flow(task_runner=FlowTaskRunner())
    def cancelled() -> list[State[Any]]:
        by_future: Any = endless.submit(machine.mark("one"))
        by_hand: Any = endless.submit(machine.mark("two"))
        machine.wait_for("one")
        machine.wait_for("two")
        by_future.cancel()
        by_hand.task.cancel()
        seen.extend([ends(by_future), ends(by_hand)])
        return []

    seen: list[State[Any]] = []
    cancelled()
    assert [state.name for state in seen] == ["Crashed", "Crashed"]
    assert "cancelled" in str(seen[0].message)
    until("the end of all processes", lambda: not machine.processes(), 30)
    assert (machine.count("one"), machine.count("two")) == (1, 1)


def test_a_future_can_be_cancelled_before_its_body_starts(machine: Machine) -> None:
    @task
    def marks(mark: str) -> None:
        tries(mark)
        time.sleep(0.5)

    @flow(task_runner=FlowTaskRunner(max_workers=1))
    def cancelled() -> None:
        first = marks.submit(machine.mark("first"))
        second: Any = marks.submit(machine.mark("second"))
        second.cancel()
        first.result()
        states.append(ends(second))

    states: list[State[Any]] = []
    cancelled()
    assert states[0].is_crashed()
    assert (machine.count("first"), machine.count("second")) == (1, 0)


def test_prefect_s_own_warning_about_timeouts_in_threads_is_not_shown(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    @task(timeout_seconds=30)
    def quick() -> int:
        return 1

    assert outcome(quick).result() == 1
    assert "cannot interrupt" not in json.dumps([entry.getMessage() for entry in caplog.records])
