"""FlowApp: each call is a task of its own."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core import FlowApp
from flow_core.config import SlurmSettings
from flow_core.errors import (
    RemoteExecutionError,
    ResultError,
    SerializationError,
    TaskCancelledError,
    TaskNotFoundError,
    TaskTimeLimitError,
    ValidationError,
)
from flow_core.futures import Future
from flow_core.models import TaskConfig, TaskSpec
from flow_core.providers.slurm_script import wishes
from flow_core.sessions import Session
from flow_core.several import as_completed, gather, get, wait

FACTOR = 3


@pytest.fixture
def app(home: Path) -> FlowApp:
    return FlowApp(provider="local")


def train(data: str, epochs: int = 100) -> dict[str, Any]:
    """Train."""
    return {"data": data, "epochs": epochs * FACTOR, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}


# ------------------------------------------------------------ one call


def test_a_direct_call_runs_here_and_remote_on_a_machine(app: FlowApp) -> None:
    handle = app.function(gpu="a100", memory=32768)(train)
    assert handle("x", epochs=1)["epochs"] == 3
    assert handle.local("x")["epochs"] == 300
    assert app.flow.list_tasks() == []
    assert handle.remote("x", epochs=2) == {"data": "x", "epochs": 6, "gpus": "0"}
    (task,) = app.flow.list_tasks()
    assert (task.name, task.instance_type) == ("train", "a100")
    assert task.config is not None
    assert task.config.memory_mb == 32768


def test_spawn_gives_a_future_with_a_task_id(app: FlowApp) -> None:
    @app.function
    def talk(x: int) -> int:
        print("said", x)
        return x * FACTOR

    future = talk.spawn(2)
    assert future.result(30) == future.get() == future.get_result() == 6
    assert future.done()
    assert (future.status, future.exception()) == ("done", None)
    assert future.id == future.task_id == app.flow.get_task(future.task_id).task_id
    assert future.logs() == "said 2\n"
    assert not future.cancel()


def test_another_process_collects_a_call_by_its_id(app: FlowApp) -> None:
    future = app.function(serialization="pickle")(lambda: {1}).spawn()
    again = Future.from_id(future.id, serialization="pickle")
    assert again.result(30) == {1}
    assert again.task_id == future.task_id
    with pytest.raises(ResultError, match="pickle"):
        Future.from_id(future.id).result(30)
    with pytest.raises(ValidationError, match="is not a call"):
        Future.from_id(app.flow.run("true").task_id)
    with pytest.raises(TaskNotFoundError):
        Future.from_id("train-0123456789abcdef-1")


def test_a_handle_looks_like_its_function_and_travels_as_it(app: FlowApp) -> None:
    handle = app.function(train)
    assert (handle.__wrapped__, handle.__doc__) == (train, "Train.")
    assert inspect.signature(handle) == inspect.signature(train)
    assert pickle.loads(pickle.dumps(handle)) is train

    @app.function
    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    assert factorial.remote(5) == 120


def test_arguments_are_checked_before_anything_starts(app: FlowApp) -> None:
    handle = app.function(train)
    with pytest.raises(TypeError, match=r"do not fit train\(.*missing a required argument: 'data'"):
        handle.remote()  # type: ignore[call-arg]
    with pytest.raises(SerializationError, match=r"Save to disk and pass path. kwargs\['epochs'\] is a set"):
        handle.remote("x", epochs={1})  # type: ignore[arg-type]
    lock = threading.Lock()
    with pytest.raises(SerializationError, match=r"closure variable 'lock'\) is a _thread.lock"):
        app.function(lambda: lock).spawn()
    assert app.flow.list_tasks() == []


def test_pickle_takes_any_value_and_json_plain_ones(app: FlowApp) -> None:
    @app.function(serialization="pickle")
    def double(x: Any) -> Any:
        return x * 2

    assert double.remote(np.arange(3)).tolist() == [0, 2, 4]
    kind = app.function(lambda x: [type(x).__name__, x])
    assert kind.remote((1, 2)) == ["list", [1, 2]]


def test_options_are_checked_when_they_are_given(app: FlowApp) -> None:
    with pytest.raises(ValidationError, match=r"has no field 'gpus'(.|\n)*Did you mean gpu"):
        app.function(gpus=1)
    with pytest.raises(ValidationError, match="serialization='xml' must be 'json' or 'pickle'"):
        app.function(serialization="xml")
    with pytest.raises(ValidationError, match="command is no option of a function"):
        app.function(command="ls")
    with pytest.raises(ValidationError, match="max_concurrent=0"):
        app.function(train).map([], max_concurrent=0)
    with pytest.raises(ValidationError, match="both provider and flow"):
        FlowApp(provider="local", flow=app.flow)


def test_defaults_of_the_app_and_options_of_the_function_go_together(home: Path) -> None:
    app = FlowApp(env={"WHO": "app"}, name="jobs")
    who = app.function(lambda: os.environ["WHO"])
    assert [who.remote(), who.options(env={"WHO": "me"}).remote()] == ["app", "me"]
    assert {task.name for task in app.flow.list_tasks()} == {"jobs"}


def test_memory_is_asked_of_a_scheduler() -> None:
    spec = TaskSpec.from_config(TaskConfig(instance_type="cpu", memory_mb=32768, command="x"))
    assert wishes(spec, SlurmSettings(), {"mem": "1G"})["mem"] == "32768M"


# ------------------------------------------------------------ ends


def test_its_own_exception_comes_back(app: FlowApp) -> None:
    @app.function
    def fails() -> None:
        raise LookupError("not here")

    with pytest.raises(LookupError, match="Remote execution failed: LookupError: not here"):
        fails.remote()
    future = fails.spawn()
    assert isinstance(future.exception(30), RemoteExecutionError)
    assert future.status == "failed"


def test_a_call_can_be_cancelled_and_limited(app: FlowApp) -> None:
    sleep = app.function(lambda: time.sleep(60))
    future = sleep.spawn()
    assert future.cancel()
    assert isinstance(future.exception(30), TaskCancelledError)
    assert future.status == "cancelled"
    with pytest.raises(TaskTimeLimitError):
        sleep.options(max_run_time_hours=0.1 / 3600).remote()


def test_an_interrupted_remote_call_cancels_its_task(app: FlowApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = app.function(lambda: time.sleep(60))
    monkeypatch.setattr("flow_core.task_futures._TaskRun.drive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle.remote()
    (task,) = app.flow.list_tasks()
    task.wait(30)
    assert task.status.value == "cancelled"


# ------------------------------------------------------------ several


def test_map_yields_values_in_order_with_so_many_tasks_at_a_time(app: FlowApp, tmp_path: Path) -> None:
    asked = 0

    def inputs() -> Iterator[int]:
        nonlocal asked
        for n in range(6):
            asked += 1
            yield n

    scale = app.function(lambda n, by=1: n * by)
    values = scale.map(inputs(), kwargs={"by": 2}, max_concurrent=2)
    assert asked == 0
    assert next(values) == 0
    assert asked <= 3
    assert list(values) == [2, 4, 6, 8, 10]
    assert list(scale.starmap([(1, 2), [3, 4]])) == [2, 12]
    assert sorted(scale.map([1, 2, 3], order_outputs=False)) == [1, 2, 3]
    assert list(scale.map([(1,)])) == [[1]]  # one argument, whatever it is


def test_map_raises_the_first_failure_or_yields_it_and_stops_the_rest(app: FlowApp) -> None:
    @app.function
    def check(n: int) -> int:
        if n == 0:
            raise ValueError(n)
        time.sleep(60 if n == 9 else 0)
        return n

    values: list[Any] = list(check.map([1, 0, 2], return_exceptions=True))
    assert (values[0], values[2]) == (1, 2)
    assert isinstance(values[1], ValueError)
    with pytest.raises(ValueError, match="0"):
        list(check.map([0, 9]))
    for task in app.flow.list_tasks():
        task.wait(30)


def test_spawned_calls_can_be_waited_for_together(app: FlowApp) -> None:
    @app.function
    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    slow, quick = sleep.spawn(1.0), sleep.spawn(0)
    assert wait([slow, quick], num_returns=1) == ([quick], [slow])
    assert list(as_completed([slow, quick])) == [quick, slow]
    assert gather(slow, quick) == get([slow, quick]) == [1.0, 0]
    called: list[Any] = []
    slow.add_done_callback(called.append)
    assert called == [slow]

    async def later() -> Any:
        return await asyncio.gather(sleep.spawn(0.01), sleep.spawn(0))

    assert asyncio.run(later()) == [0.01, 0]


def test_a_spawned_call_can_be_the_argument_of_a_sessions(app: FlowApp) -> None:
    future: Any = app.function(lambda: [1, 2]).spawn()
    with Session(flow=app.flow, workers=1) as session:
        assert session.function(lambda xs: sum(xs)).remote(future).result(30) == 3  # noqa: PLW0108


def test_an_app_can_be_made_before_there_are_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_CONFIG", "/no/such/file")
    app = FlowApp()
    handle = app.function(train)
    assert handle("x")["epochs"] == 300
