"""invoke and invoke_async, as their document describes them, on the local provider."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flow_core import (
    Flow,
    InvokeTask,
    RemoteExecutionError,
    TaskCancelledError,
    TaskExecutionError,
    TaskStatus,
    TimeoutError,
    ValidationError,
)
from flow_core.errors import ResultError, SerializationError

MODULE = """
import asyncio, json, os, sys, time

class Broken(Exception):
    pass

def add(a, b=1, *, c=0):
    return a + b + c

def echo(value):
    print("this is not JSON {", flush=True)
    sys.stderr.write("nor is this\\n")
    return value

async def later(value):
    await asyncio.sleep(0.01)
    return value

def stamp():
    import datetime
    return {"at": datetime.datetime(2030, 1, 1)}

def buggy_function():
    raise ValueError("Something went wrong")

def own():
    try:
        raise KeyError("k")
    except KeyError as error:
        raise Broken("mine") from error

def leave(code):
    sys.exit(code)

def hard(code):
    os._exit(code)

def die():
    os.kill(os.getpid(), 9)

def sleep(seconds):
    print("asleep", flush=True)
    time.sleep(seconds)

def array():
    return {"model": object()}

def big(n):
    return "x" * n

def pid():
    return os.getpid()

def where():
    return [os.getcwd(), __name__, os.path.basename(__file__)]
"""


@pytest.fixture
def flow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flow:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    Path("train.py").write_text(MODULE)
    return Flow("local")


def test_a_function_in_a_plain_file_is_called_and_its_value_comes_back(flow: Flow) -> None:
    assert flow.invoke("train.py", "add", args=[40], kwargs={"c": 1}) == 42
    assert flow.invoke(Path("train.py").resolve(), "add", [1]) == 2


NASTY: list[Any] = [
    None,
    False,
    "",
    0,
    [],
    {},
    "a'b\"c`$(x)\n\0\udcff \U0001f600",
    -(10**400),
    1.5e300,
    {"k": [1, {"n": None}]},
]


@pytest.mark.parametrize("value", NASTY, ids=repr)
def test_values_survive_both_ways_and_prints_do_not_disturb_them(flow: Flow, value: Any) -> None:
    task = flow.invoke_async("train.py", "echo", [value])
    assert task.get_result(30) == value
    assert "this is not JSON {" in task.logs() and "nor is this" in task.logs()


def test_an_async_function_is_awaited(flow: Flow) -> None:
    assert flow.invoke("train.py", "later", ["done"]) == "done"


def test_the_users_exception_comes_back_as_itself_with_the_remote_traceback(flow: Flow) -> None:
    with pytest.raises(RemoteExecutionError) as caught:
        flow.invoke("train.py", "buggy_function")
    assert str(caught.value).startswith("Remote execution failed: ValueError: Something went wrong")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, RuntimeError)
    assert 'raise ValueError("Something went wrong")' in caught.value.remote_traceback
    assert "flow_runner" not in caught.value.remote_traceback, "none of our own frames"
    assert caught.value.exit_code == 1


def test_a_class_that_only_the_remote_module_knows_is_named_with_its_cause(flow: Flow) -> None:
    with pytest.raises(RemoteExecutionError, match="Broken: mine") as caught:
        flow.invoke("train.py", "own")
    assert caught.value.exception_type == "Broken"
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("code", [0, 3])
def test_sys_exit_is_reported_as_what_it_is_and_never_as_success(flow: Flow, code: int) -> None:
    task = flow.invoke_async("train.py", "leave", [code])
    with pytest.raises(RemoteExecutionError, match="SystemExit") as caught:
        task.get_result(30)
    assert task.status is TaskStatus.FAILED
    assert caught.value.exception_type == "SystemExit"


def test_a_process_that_ends_without_a_word_is_reported_with_its_exit_code(flow: Flow) -> None:
    with pytest.raises(TaskExecutionError, match="exit code 5") as caught:
        flow.invoke("train.py", "hard", [5])
    assert caught.value.exit_code == 5
    with pytest.raises(TaskExecutionError, match="result"):
        flow.invoke("train.py", "hard", [0])


def test_a_killed_process_is_reported_as_killed(flow: Flow) -> None:
    with pytest.raises(TaskExecutionError, match="killed by SIGKILL") as caught:
        flow.invoke("train.py", "die")
    assert caught.value.signal == 9


@pytest.mark.parametrize(
    ("args", "path"),
    [
        ([object()], r"args\[0\]"),
        ([{"x": {1, 2}}], r"args\[0\]\['x'\]"),
        ([{1: 2}], r"args\[0\]"),
        ([float("nan")], r"args\[0\]"),
    ],
)
def test_what_json_cannot_carry_is_refused_before_anything_starts(
    flow: Flow, args: list[Any], path: str
) -> None:
    with pytest.raises(TypeError, match="Cannot serialize arguments. Save to disk and pass path.") as caught:
        flow.invoke("train.py", "echo", args)
    assert isinstance(caught.value, SerializationError)
    caught.match(path)
    assert flow.list_tasks() == []


def test_arguments_over_the_limit_are_refused_before_anything_starts(flow: Flow) -> None:
    with pytest.raises(TypeError, match="Save to disk and pass path"):
        flow.invoke("train.py", "echo", ["x" * (10 * 1024 * 1024 + 1)])
    assert flow.list_tasks() == []


def test_a_result_that_cannot_travel_names_its_place(flow: Flow) -> None:
    with pytest.raises(ResultError, match=r"\['model'\]"):
        flow.invoke("train.py", "array")
    with pytest.raises(ResultError, match="return"):
        flow.invoke("train.py", "big", [10 * 1024 * 1024 + 1])


def test_what_could_not_travel_is_collected_in_another_way_without_a_second_run(flow: Flow) -> None:
    with pytest.raises(ResultError, match=r"\['at'\] is a datetime.datetime") as caught:
        flow.invoke("train.py", "stamp", idempotency_key="once")
    assert "kept with its task" in str(caught.value)
    again = flow.invoke_async("train.py", "stamp", idempotency_key="once", serialization="pickle")
    assert list(again.get_result()) == ["at"]
    assert again.ref().codec == "pickle"
    assert [task.status for task in flow.list_tasks()] == [TaskStatus.COMPLETED]


def test_what_is_not_there_is_named_before_anything_starts(flow: Flow) -> None:
    with pytest.raises(ValidationError, match="'trian.py' does not exist"):
        flow.invoke("trian.py", "add")
    with pytest.raises(ValidationError, match="not the name of a function"):
        flow.invoke("train.py", "add; rm -rf /")
    assert flow.list_tasks() == []


def test_a_function_that_is_not_there_is_named_with_those_that_are(flow: Flow) -> None:
    with pytest.raises(TaskExecutionError, match="no function 'ad'") as caught:
        flow.invoke("train.py", "ad")
    assert "add" in str(caught.value)


def test_arguments_that_do_not_fit_are_the_callers_error(flow: Flow) -> None:
    with pytest.raises(TypeError, match="nope"):
        flow.invoke("train.py", "add", kwargs={"nope": 1})


def test_a_handle_follows_cancels_and_times_out(flow: Flow) -> None:
    task = flow.invoke_async("train.py", "sleep", [100])
    assert next(task.logs(follow=True)) == "asleep\n"
    assert task.status is TaskStatus.RUNNING
    with pytest.raises(TimeoutError):
        task.get_result(timeout=0.1)
    task.cancel()
    with pytest.raises(TaskCancelledError):
        task.get_result(30)


def test_another_process_collects_by_id(flow: Flow) -> None:
    task = flow.invoke_async("train.py", "add", [1])
    code = f"from flow_core import InvokeTask; print(InvokeTask.from_id({task.task_id!r}).get_result(30))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "2\n"
    )
    again = flow.get_task(task.task_id)
    assert isinstance(again, InvokeTask) and again.get_result() == 2


def test_the_same_key_is_the_same_call(flow: Flow) -> None:
    first = flow.invoke_async("train.py", "pid", idempotency_key="k")
    second = flow.invoke_async("train.py", "pid", idempotency_key="k")
    assert first.task_id == second.task_id
    assert first.get_result(30) == second.get_result(30)
    third = flow.invoke_async("train.py", "pid", idempotency_key="k")
    assert third.get_result(30) == first.get_result(30), "a success is handed out again"
    assert flow.invoke("train.py", "pid", idempotency_key="other") != first.get_result()


def test_a_failed_call_is_tried_again_under_the_same_key(flow: Flow) -> None:
    with pytest.raises(ValueError, match="Something went wrong"):
        flow.invoke("train.py", "buggy_function", idempotency_key="k")
    with pytest.raises(ValueError, match="Something went wrong"):
        flow.invoke("train.py", "buggy_function", idempotency_key="k")
    found = flow.find("k")
    assert found is not None and found.task_id.endswith("-2")


def test_a_released_result_says_so(flow: Flow) -> None:
    task = flow.invoke_async("train.py", "add", [1])
    task.get_result(30)
    task.release()
    with pytest.raises(ResultError, match="has been released"):
        task.get_result()


def test_one_file_travels_alone_and_a_root_travels_whole(flow: Flow) -> None:
    Path("helper.py").write_text("VALUE = 7\n")
    Path("uses.py").write_text("def get():\n    import helper\n    return helper.VALUE\n")
    with pytest.raises(RemoteExecutionError, match="No module named 'helper'"):
        flow.invoke("uses.py", "get")
    assert flow.invoke("uses.py", "get", code_root=Path.cwd()) == 7


def test_a_module_in_a_package_is_found_by_path_and_by_name(flow: Flow, tmp_path: Path) -> None:
    package = tmp_path / "root" / "pkg"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text("N = 3\n")
    (package / "work.py").write_text("from .base import N\ndef get():\n    return [N, __name__]\n")
    root = tmp_path / "root"
    assert flow.invoke("pkg/work.py", "get", code_root=root) == [3, "pkg.work"]
    assert flow.invoke("pkg.work", "get", code_root=root) == [3, "pkg.work"]
    assert flow.invoke(package / "work.py", "get", code_root=str(root)) == [3, "pkg.work"]
    with pytest.raises(ValidationError, match="not found in code_root"):
        flow.invoke("pkg.wrok", "get", code_root=root)


def test_flowignore_keeps_files_at_home(flow: Flow) -> None:
    Path("ls.py").write_text(
        "import os\ndef ls():\n    return sorted(set(os.listdir('.')) - {'__pycache__'})\n"
    )
    Path("data").mkdir()
    Path("data/big.bin").write_text("x")
    Path("data/keep.txt").write_text("x")
    Path(".flowignore").write_text("data/*\n!data/keep.txt\ntrain.py\n")
    assert flow.invoke("ls.py", "ls", code_root=".") == [".flowignore", "data", "ls.py"]


def test_the_module_level_calls_use_the_settings_of_the_environment(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """if True:
        from flow_core import invoke, invoke_async, list_tasks
        print(invoke("train.py", "add", [1]), invoke_async("train.py", "add", args=[2]).get_result(), len(list_tasks()))
    """
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "2 3 2\n"
    )


def test_the_parallel_experiments_of_the_document(flow: Flow) -> None:
    Path("experiment.py").write_text(
        "def run_experiment(hyperparams, seed):\n    return hyperparams['learning_rate'] * seed\n"
    )
    tasks = [
        flow.invoke_async(
            "experiment.py",
            "run_experiment",
            kwargs={"hyperparams": {"learning_rate": rate}, "seed": seed},
            code_root=Path.cwd(),
            gpu="a100",
        )
        for seed in range(4)
        for rate in (1, 2, 3)
    ]
    assert [task.get_result() for task in tasks] == [rate * seed for seed in range(4) for rate in (1, 2, 3)]


def test_another_python_runs_the_function(flow: Flow, tmp_path: Path) -> None:
    wrapper = tmp_path / "gpu python"
    wrapper.write_text(f'#!/bin/sh\nMARK=yes exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    Path("mark.py").write_text("import os\ndef mark():\n    return os.environ.get('MARK')\n")
    assert Flow("local", local={"python": str(wrapper)}).invoke("mark.py", "mark") == "yes"


def test_the_stored_call_is_json_and_arguments_are_in_no_command_line(flow: Flow, home: Path) -> None:
    task = flow.invoke_async("train.py", "sleep", ["$(touch /tmp/no)"])
    task.wait(30)
    stored = next(home.glob("tasks/*/1/call.json"))
    assert json.loads(stored.read_text())["args"] == ["$(touch /tmp/no)"]
    assert "touch" not in next(home.glob("tasks/*/1/job.json")).read_text()
