"""What a task asks of its machine: the runner's defaults, the function's wish, the moment's wish."""

from __future__ import annotations

import threading

import pytest
from prefect import task

from flow_core import ValidationError
from flow_prefect import FlowTaskRunner, flow_options
from flow_prefect.options import wanted


@task
@flow_options(gpu="8xh100", env={"A": "function", "B": "function"})
def big() -> None: ...


@task
def plain() -> None: ...


DEFAULTS = {"instance_type": "a100", "env": {"A": "runner", "C": "runner"}, "max_price_per_hour": 5.0}


def test_a_function_without_a_wish_gets_the_defaults() -> None:
    assert wanted(DEFAULTS, plain.fn) == DEFAULTS


def test_the_function_wins_over_the_runner_and_variables_are_merged() -> None:
    env = {"A": "function", "B": "function", "C": "runner"}
    assert wanted(DEFAULTS, big.fn) == {"gpu": "8xh100", "env": env, "max_price_per_hour": 5.0}


def test_the_block_wins_over_the_function_and_the_inner_block_over_the_outer() -> None:
    with (
        flow_options(gpu="a100", max_price_per_hour=1.0),
        flow_options(min_gpu_memory_gb=40, env={"A": "block"}),
    ):
        inner = wanted(DEFAULTS, big.fn)
    assert inner == {
        "min_gpu_memory_gb": 40,
        "max_price_per_hour": 1.0,
        "env": {"A": "block", "B": "function", "C": "runner"},
    }
    assert wanted(DEFAULTS, big.fn)["gpu"] == "8xh100"


def test_a_block_ends_with_an_exception_too() -> None:
    with pytest.raises(RuntimeError), flow_options(gpu="h100"):
        raise RuntimeError
    assert wanted({}, plain.fn) == {}


def test_a_block_is_not_seen_by_other_threads() -> None:
    seen: list[object] = []
    with flow_options(gpu="h100"):
        thread = threading.Thread(target=lambda: seen.append(wanted({}, plain.fn)))
        thread.start()
        thread.join()
    assert seen == [{}]


def test_options_survive_with_options_and_may_stand_over_the_task() -> None:
    assert wanted({}, big.with_options(retries=3).fn)["gpu"] == "8xh100"

    @flow_options(gpu="a100")
    @task
    def over() -> None: ...

    assert wanted({}, over.with_options(name="other").fn) == {"gpu": "a100"}


@pytest.mark.parametrize("make", [FlowTaskRunner, flow_options])
def test_what_can_never_be_right_is_refused_at_once(make: type[FlowTaskRunner | flow_options]) -> None:
    with pytest.raises(ValidationError, match="a100"):
        make(gpu="nvidia-a100")
    with pytest.raises(ValidationError, match="max_price_per_hour"):
        make(max_prise_per_hour=1.0)
    with pytest.raises(ValidationError, match="command= cannot be set"):
        make(command="sleep 1")
