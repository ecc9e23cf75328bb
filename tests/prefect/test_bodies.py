"""A flow's ordinary tasks under FlowTaskRunner: where bodies run, and what Prefect does around them."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prefect import allow_failure, flow, get_run_logger, task, unmapped
from prefect.cache_policies import INPUTS
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterTaskRunId
from prefect.client.schemas.objects import State
from prefect.futures import as_completed, wait

from flow_core import Flow, TaskStatus
from flow_prefect import FlowFuture, FlowTaskRunner, flow_options
from tests.prefect.machine import Machine, until


def leave(mark: str, text: object = "") -> None:
    """A helper at module level: it travels with the bodies that use it."""
    with Path(mark).open("a") as file:
        file.write(f"{text}\n")


@task
def where() -> dict[str, Any]:
    import importlib.util

    packages = ("prefect", "flow_core", "flow_prefect", "cloudpickle", "pydantic")
    return {
        "pid": os.getpid(),
        "prefix": sys.prefix,
        "found": [name for name in packages if importlib.util.find_spec(name)],
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


@task
def double(x: int, mark: str = "") -> int:
    if mark:
        leave(mark, x)
    return x * 2


@task
def total(values: Any) -> int:
    numbers: list[int] = [*values["numbers"], *values["extra"]]
    return sum(numbers)


def test_a_body_runs_on_the_machine_which_has_no_prefect(machine: Machine) -> None:
    @flow(task_runner=FlowTaskRunner(gpu="a100"))
    def asks() -> tuple[dict[str, Any], dict[str, Any]]:
        there = where.submit()
        with flow_options(gpu="2xa100"):
            with_two = where.submit()
        return there.result(), with_two.result()

    there, with_two = asks()
    assert there["pid"] != os.getpid()
    assert Path(there["prefix"]) == machine.python.parent.parent
    assert [name for name in there["found"] if name != "cloudpickle"] == []  # that one comes with the call
    assert (there["gpus"] in ("0", "1"), with_two["gpus"]) == (True, "0,1")


def test_futures_are_inputs_wherever_they_stand(machine: Machine) -> None:
    @flow(task_runner=FlowTaskRunner())
    def nested() -> int:
        one, two, three = (double.submit(n) for n in (1, 2, 3))
        return total.submit({"numbers": [one, two], "extra": (three,)}).result()

    assert nested() == 2 + 4 + 6


def test_a_task_waits_for_those_it_is_told_to_wait_for(machine: Machine) -> None:
    mark = machine.mark("order")

    @task
    def step(name: str, seconds: float) -> None:
        time.sleep(seconds)
        leave(mark, name)

    @flow(task_runner=FlowTaskRunner())
    def ordered() -> None:
        first = step.submit("first", 0.4)
        step.submit("second", 0.0, wait_for=[first], return_state=False).wait()

    ordered()
    assert Path(mark).read_text().split() == ["first", "second"]


def test_a_map_over_twenty_runs_each_once_and_keeps_the_order(machine: Machine) -> None:
    @task
    def scale(x: int, factors: list[int], mark: str) -> int:
        leave(mark, x)
        return x * factors[0]

    @flow(task_runner=FlowTaskRunner(max_workers=8))
    def mapped() -> list[int]:
        return scale.map(range(20), unmapped([3]), machine.mark("ran")).result()

    assert mapped() == [3 * n for n in range(20)]
    assert sorted(map(int, Path(machine.mark("ran")).read_text().split())) == list(range(20))


def test_a_map_takes_the_futures_of_a_map(machine: Machine) -> None:
    @flow(task_runner=FlowTaskRunner())
    def chained() -> list[int]:
        return double.map(double.map([1, 2, 3])).result()

    assert chained() == [4, 8, 12]


def test_what_a_map_gives_is_a_plain_list_for_the_next_body(machine: Machine) -> None:
    @task
    def sort(results: list[int], named: dict[str, list[int]]) -> tuple[str, list[int]]:
        return type(results).__name__, sorted([*results, *named["too"]], reverse=True)

    @flow(task_runner=FlowTaskRunner())
    def collects() -> tuple[str, list[int]]:
        results: Any = double.map([1, 2, 3])
        found: tuple[str, list[int]] = sort.submit(results, {"too": results}).result()
        return found

    assert collects() == ("list", [6, 6, 4, 4, 2, 2])


def test_an_async_flow_runs_async_and_plain_bodies(machine: Machine) -> None:
    @task
    async def slowly(x: int) -> int:
        await asyncio.sleep(0.01)
        return x + 1

    @flow(task_runner=FlowTaskRunner())
    async def asynchronous() -> int:
        plain: Any = double.submit(4)
        value: Any = slowly.submit(plain).result()
        return int(value)

    assert asyncio.run(asynchronous()) == 9


def test_a_cached_result_is_not_computed_again(machine: Machine) -> None:
    cached = double.with_options(cache_policy=INPUTS, persist_result=True)
    mark = machine.mark("computed")

    @flow(task_runner=FlowTaskRunner())
    def repeats() -> list[State[int]]:
        first = cached.submit(21, mark)
        first.wait()
        again = cached.submit(21, mark)
        again.wait()
        return [first.state, again.state]

    first, again = repeats(return_state=True).result()
    assert (first.name, again.name) == ("Completed", "Cached")
    assert machine.count("computed") == 1
    assert again.result() == 42


def test_equal_calls_in_one_flow_run_are_separate_tasks(machine: Machine) -> None:
    @flow(task_runner=FlowTaskRunner())
    def twice() -> list[int]:
        return [future.result() for future in [double.submit(1, machine.mark("ran")) for _ in range(3)]]

    assert twice() == [2, 2, 2]
    assert machine.count("ran") == 3


def test_waiting_for_many_and_for_the_first(machine: Machine) -> None:
    @flow(task_runner=FlowTaskRunner())
    def several() -> list[int]:
        futures = [double.submit(n) for n in (1, 2, 3)]
        done, not_done = wait(futures)
        assert (len(done), len(not_done)) == (3, 0)
        return sorted(future.result() for future in as_completed(futures))

    assert several() == [2, 4, 6]


def test_an_allowed_failure_reaches_the_next_body(machine: Machine) -> None:
    @task
    def fails() -> None:
        raise ValueError("not this time")

    @task
    def looks(problem: Any) -> str:
        return f"{type(problem).__name__}: {problem}"

    @flow(task_runner=FlowTaskRunner())
    def tolerant() -> str:
        return looks.submit(allow_failure(fails.submit())).result()

    assert "ValueError: not this time" in tolerant()


def test_bodies_use_closures_defaults_and_methods_of_arguments(machine: Machine) -> None:
    offset = 100

    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

        def moved(self, by: int) -> Point:
            return Point(self.x + by)

    @task
    def move(point: Point, by: int = 1) -> Point:
        return point.moved(by + offset)

    @flow(task_runner=FlowTaskRunner())
    def moves() -> int:
        return move.submit(Point(1)).result().x

    assert moves() == 102


def test_a_runner_works_outside_of_a_flow(machine: Machine) -> None:
    with FlowTaskRunner() as runner:
        future = runner.submit(double, {"x": 4, "mark": ""})
        assert future.result() == 8
    with runner:
        assert runner.submit(double, {"x": 5, "mark": ""}).result() == 10


def test_the_future_leads_to_the_gpu_task(machine: Machine) -> None:
    seen: list[Any] = []

    @task
    def prints() -> None:
        print("one")
        print("two")

    @flow(task_runner=FlowTaskRunner(gpu="a100"))
    def looks() -> None:
        future = prints.submit()
        assert isinstance(future, FlowFuture)
        future.wait()
        assert future.task is not None
        seen.extend([future.task.task_id, future.task.status, future.task.instance_type, future.logs()])
        labels = future.task.snapshot.labels
        assert labels["prefect/task_run_id"] == str(future.task_run_id)

    looks()
    assert seen[0].startswith("prints-")
    assert seen[1:] == [TaskStatus.COMPLETED, "a100", "one\ntwo\n"]


def test_a_flow_that_succeeded_frees_the_results_on_the_machine(machine: Machine) -> None:
    @flow(task_runner=FlowTaskRunner())
    def succeeds() -> list[int]:
        return double.map([1, 2]).result()

    succeeds()
    ended = [task.snapshot for task in Flow().list_tasks()]
    assert [(seen.status, seen.reason) for seen in ended] == [(TaskStatus.COMPLETED, "released")] * 2


def test_a_deployment_s_flow_file_is_loaded_under_a_name_of_prefect_s_and_works(machine: Machine) -> None:
    from prefect.flows import load_flow_from_entrypoint

    loaded: Any = load_flow_from_entrypoint(f"{Path(__file__).with_name('flows.py')}:three")
    assert loaded(machine.mark("work"), 0.0) == [10, 20, 30]


def logged(future: FlowFuture[Any]) -> list[tuple[int, str]]:
    """The log of a task run as Prefect's server has it."""
    with get_client(sync_client=True) as client:
        wanted = LogFilter(task_run_id=LogFilterTaskRunId(any_=[future.task_run_id]))
        return [(entry.level, entry.message) for entry in client.read_logs(wanted, limit=200)]


@task
def talks(go_on: str) -> None:
    logger = get_run_logger()
    print("printed at once", flush=True)
    logger.warning("careful: %s", 42)
    while not Path(go_on).exists():
        time.sleep(0.02)
    for number in range(50):
        print(f"line {number}")
    logger.debug("not at this level")
    logger.error("two\nlines")


def test_output_is_in_the_task_run_s_log_while_the_body_runs_once_and_in_order(machine: Machine) -> None:
    futures: list[FlowFuture[Any]] = []

    @flow(task_runner=FlowTaskRunner())
    def listens() -> None:
        future: Any = talks.submit(machine.mark("go on"))
        futures.append(future)
        early = until("the first lines", lambda: [one for one in logged(future) if "careful" in one[1]])
        assert early == [(30, "careful: 42")]
        assert (20, "printed at once") in logged(future)
        Path(machine.mark("go on")).touch()
        future.result()

    listens()
    last = (40, "lines")
    seen = until("the last line", lambda: logged(futures[0]) if last in logged(futures[0]) else None)
    body = [one for one in seen if "GPU task" not in one[1] and "Finished in state" not in one[1]]
    expected = [(20, "printed at once"), (30, "careful: 42"), *((20, f"line {n}") for n in range(50))]
    assert body == [*expected, (40, "two"), last]


@pytest.mark.parametrize("times", [1, 2])
def test_submit_returns_before_the_body_has_run(machine: Machine, times: int) -> None:
    @task
    def sleeps() -> None:
        time.sleep(1)

    @flow(task_runner=FlowTaskRunner())
    def submits() -> float:
        started = time.monotonic()
        futures = [sleeps.submit() for _ in range(times)]
        took = time.monotonic() - started
        wait(futures)
        return took

    assert submits() < 0.9
