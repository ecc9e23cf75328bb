"""Flow, the module-level calls and Task, as their reference describes them, on the local provider."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

import flow_core
from flow_core import (
    ConfigError,
    Flow,
    FlowError,
    SpecRejected,
    Task,
    TaskCancelledError,
    TaskConfig,
    TaskExecutionError,
    TaskNotFoundError,
    TaskStatus,
    TaskTimeLimitError,
    TimeoutError,
    ValidationError,
    VolumeSpec,
)
from flow_core.providers.local import LocalProvider
from flow_core.testing import FakeProvider


@pytest.fixture
def flow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flow:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    return Flow()


# -- starting


def test_a_command_runs_with_one_line(flow: Flow) -> None:
    Path("train.py").write_text("print('loss: 0.1')")
    task = flow.run("python train.py", instance_type="a100")
    task.wait()
    assert (task.status, task.logs()) == (TaskStatus.COMPLETED, "loss: 0.1\n")


def test_a_full_configuration_runs(flow: Flow) -> None:
    config = TaskConfig(
        name="training-run-42",
        command="echo $BATCH_SIZE $FLOW_NUM_GPUS",
        instance_type="2xa100",
        volumes=[VolumeSpec(name="dataset", size_gb=1)],
        env={"BATCH_SIZE": "256"},
        max_price_per_hour=20.0,
        max_run_time_hours=24.0,
        upload_code=False,
    )
    task = flow.run(config)
    task.result(30)
    assert task.logs() == "256 2\n"
    assert task.task_id.startswith("training-run-42-")
    assert task.name == "training-run-42"


def test_a_list_is_an_exact_argument_list_and_a_string_a_shell_line(flow: Flow) -> None:
    exact, line = flow.run(["echo", "$HOME; exit 3"]), flow.run("echo a | tr a b; exit 3")
    exact.wait()
    line.wait()
    assert (exact.logs(), exact.snapshot.exit_code) == ("$HOME; exit 3\n", 0)
    assert (line.logs(), line.snapshot.exit_code) == ("b\n", 3)


def test_a_script_is_run_by_its_first_line_or_by_python(flow: Flow) -> None:
    python = flow.run(TaskConfig(instance_type="cpu", script="import sys\nprint('py', sys.version_info[0])"))
    shell = flow.run(TaskConfig(instance_type="cpu", script="#!/bin/sh\necho sh $0 | cut -d' ' -f1\n"))
    python.wait()
    shell.wait()
    assert (python.logs(), shell.logs()) == ("py 3\n", "sh\n")


def test_without_a_machine_the_default_one_is_used(flow: Flow) -> None:
    assert flow.run("true").instance_type == "cpu"
    assert Flow(default_instance_type="a100").run("true").instance_type == "a100"


def test_both_names_of_a_field_work_and_an_unknown_one_names_the_close_ones(flow: Flow) -> None:
    assert flow.run("true", gpu="A100").instance_type == "a100"
    with pytest.raises(ValidationError, match="max_run_time_hours"):
        flow.run("true", max_runtime_hours=3)
    with pytest.raises(ValidationError, match="nvidia-a100"):
        flow.run("true", gpu="nvidia-a100")
    with pytest.raises(ValidationError) as caught:
        flow.run("python train.py", instance_type="invalid")
    assert caught.value.suggestions


def test_a_command_that_cannot_start_says_why(flow: Flow) -> None:
    task = flow.run(["no-such-program"])
    with pytest.raises(TaskExecutionError, match="could not start 'no-such-program'.*No such file") as caught:
        task.result(30)
    assert caught.value.reason == "start-failed"


def test_the_code_of_another_folder_travels(flow: Flow, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("there")
    task = flow.run("cat file.txt", code_root=tmp_path / "other")
    task.wait()
    assert task.logs() == "there"


def test_the_same_key_is_the_same_task_in_every_form(flow: Flow) -> None:
    first = flow.run("sleep 0.2", idempotency_key="nightly")
    assert flow.run("sleep 0.2", idempotency_key="nightly").task_id == first.task_id
    config = TaskConfig(command="sleep 0.2", instance_type="cpu", idempotency_key="nightly")
    assert flow.run(config).task_id == first.task_id
    found = flow.find("nightly")
    assert found is not None and found.task_id == first.task_id
    assert flow.find("never used") is None
    assert flow.run("sleep 0.2").task_id != flow.run("sleep 0.2").task_id


def test_a_key_that_was_used_for_something_else_is_told(flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
    first = flow.run("sleep 0.2", idempotency_key="nightly", labels={"run": "1"})
    Path("new-file").write_text("the code may change")
    flow.run("sleep 0.2", idempotency_key="nightly", labels={"run": "2"})
    assert caplog.messages == []
    assert flow.run("sleep 0.3", idempotency_key="nightly").task_id == first.task_id
    assert [first.task_id in message and "something else" in message for message in caplog.messages] == [True]
    config = Flow().get_task(first.task_id).config
    assert config is not None and config.labels == {"run": "1"}
    Path("f.py").write_text("def f(x):\n    return x\n")
    assert flow.invoke("f.py", "f", [1], idempotency_key="call") == 1
    caplog.clear()
    assert flow.invoke("f.py", "f", [2], idempotency_key="call") == 1
    assert len(caplog.messages) == 1


# -- the handle


def test_a_task_tells_all_about_itself(flow: Flow) -> None:
    before = datetime.now(timezone.utc)
    task = flow.run(
        "echo one; sleep 0.2", instance_type="a100", name="job", ports=[8888], env={"TOKEN": "secret"}
    )
    task.wait()
    assert task.created_at is not None and task.started_at is not None and task.completed_at is not None
    assert before <= task.created_at <= task.started_at <= task.completed_at
    assert (task.instance_type, task.num_instances, task.region) == ("a100", 1, "local")
    assert len(task.instances) == 1 and task.host == task.instances[0]
    assert (task.cost_per_hour, task.total_cost) == ("$0.00", "$0.00")
    assert (task.ssh_host, task.ssh_command, task.ssh_port) == (None, None, 22)
    assert (task.is_terminal, task.is_running, task.message) == (True, False, None)
    assert task.endpoints == {"8888": "http://127.0.0.1:8888"}
    assert "secret" not in repr(task) + repr(task.config) + repr(task.snapshot)


def test_another_process_gets_the_configuration_back(flow: Flow) -> None:
    task = flow.run("echo one", instance_type="a100", name="job", env={"A": "1"}, max_run_time_hours=2)
    config = Flow().get_task(task.task_id).config
    assert config is not None
    assert (config.name, config.command, config.instance_type) == ("job", "echo one", "a100")
    assert (config.env, config.max_run_time_hours) == ({"A": "1"}, 2)


def test_status_is_fresh_without_refresh(flow: Flow) -> None:
    task = flow.run("sleep 0.2")
    deadline = time.monotonic() + 30
    while not task.is_terminal:
        assert time.monotonic() < deadline
    assert task.status is TaskStatus.COMPLETED


def test_following_lines_can_stop_when_the_task_has_ended(flow: Flow) -> None:
    task = flow.run("for i in 1 2 3; do echo loss: $i; done; echo no newline | tr -d '\\n'")
    lines = [line.strip() for line in task.logs(follow=True) if "loss:" in line]
    assert lines == ["loss: 1", "loss: 2", "loss: 3"]
    assert task.logs(tail=1) == "no newline"
    assert task.logs(tail=2) == "loss: 3\nno newline"


def test_wait_raises_for_time_alone(flow: Flow) -> None:
    task = flow.run("sleep 100")
    with pytest.raises(TimeoutError, match="waited 0.1 s"):
        task.wait(timeout=0.1)
    task.stop()
    task.wait(30)
    assert task.status is TaskStatus.CANCELLED
    with pytest.raises(TaskCancelledError):
        task.result()


def test_a_failed_command_shows_its_exit_code_and_the_end_of_its_output(flow: Flow) -> None:
    task = flow.run("seq 1 100; echo the reason >&2; exit 7")
    with pytest.raises(TaskExecutionError, match="exit code 7") as caught:
        task.result()
    assert (caught.value.exit_code, caught.value.task_id) == (7, task.task_id)
    assert "the reason" in str(caught.value)
    assert "\n1\n" not in str(caught.value)


def test_the_time_limit_has_its_own_error(flow: Flow) -> None:
    task = flow.run("sleep 100", max_run_time_hours=0.3 / 3600)
    with pytest.raises(TaskTimeLimitError, match="stopped at its limit of 0.3 s"):
        task.result(30)


# -- finding


def test_tasks_are_listed_the_newest_first(flow: Flow) -> None:
    ids = [flow.run("true").task_id for _ in range(3)]
    assert [task.task_id for task in flow.list_tasks()] == ids[::-1]
    assert [task.task_id for task in flow.list_tasks(limit=1)] == ids[2:]
    assert flow.get_task(ids[0]).task_id == ids[0]


@pytest.mark.parametrize("unknown", ["no-such-task", "task-0123456789abcdef-1", "../x"])
def test_an_unknown_task_is_an_error_with_a_way_out(flow: Flow, unknown: str) -> None:
    with pytest.raises(TaskNotFoundError, match="list_tasks"):
        flow.get_task(unknown)


def test_many_are_polled_cancelled_and_released_at_once(flow: Flow) -> None:
    tasks = [flow.run("sleep 100") for _ in range(3)]
    ids = [task.task_id for task in tasks]
    assert {seen.status.final for seen in flow.poll(ids).values()} == {False}
    flow.cancel(ids)
    for task in tasks:
        task.wait(30)
    flow.release(ids)
    assert {seen.reason for seen in flow.poll(ids).values()} == {"released"}


# -- instances, volumes, providers


def test_instances_are_found_by_requirement_and_can_be_asked_for(flow: Flow) -> None:
    found = flow.find_instances({"min_gpu_count": 1})
    assert [one["gpu_count"] for one in found] == [1, 2]
    assert flow.run("true", instance_type=found[0]["instance_type"]).instance_type in ("a100", "1xa100")
    assert flow.find_instances({"instance_type": "8xh100"}) == []
    assert flow.find_instances({"region": "mars"}) == []
    assert len(flow.find_instances(limit=1)) == 1
    with pytest.raises(ValidationError, match="'gpu_memory' is not a requirement") as caught:
        flow.find_instances({"gpu_memory": 80})
    assert "gpu_memory_gb" in str(caught.value)


def test_a_volume_is_made_listed_attached_and_deleted(flow: Flow) -> None:
    volume = flow.create_volume(size_gb=100, name="checkpoints")
    assert flow.create_volume(100, "checkpoints").volume_id == volume.volume_id
    assert [(one.name, one.size_gb, one.region) for one in flow.list_volumes()] == [
        ("checkpoints", 100, "local")
    ]
    task = flow.run("ls volumes", volumes=[{"volume_id": volume.volume_id}])
    task.wait()
    assert task.logs() == "checkpoints\n"
    flow.delete_volume(volume.volume_id)
    assert flow.list_volumes() == []


def test_a_provider_is_never_guessed(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MITHRIL_API_KEY", "mithril-secret")
    assert isinstance(Flow().provider, LocalProvider)
    with pytest.raises(ConfigError, match="no provider named 'locale'") as caught:
        Flow("locale")
    assert "'local'" in str(caught.value) and "secret" not in str(caught.value)


def test_a_provider_object_is_used_as_it_is(flow: Flow) -> None:
    fake = FakeProvider()
    task = Flow(fake).run("true", gpu="8xh100", upload_code=False)
    assert fake.specs[task.task_id].gpu_count == 8
    with pytest.raises(FlowError, match="has no volumes"):
        Flow(fake).list_volumes()
    with pytest.raises(FlowError, match="cannot open a shell"):
        task.shell("true")


def test_the_default_of_h100_shows_in_the_message(flow: Flow) -> None:
    with pytest.raises(SpecRejected, match="8 GPUs"):
        flow.run("true", gpu="h100")


def test_debug_shows_what_happens_and_no_secret(home: Path) -> None:
    code = "from flow_core import run; run('true', upload_code=False, env={'TOKEN': 'hunter2'}).wait()"
    quiet = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loud = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FLOW_DEBUG": "1"},
    )
    assert quiet.stderr == ""
    assert "submitting task-" in loud.stderr and "hunter2" not in loud.stderr


# -- the package


def test_every_public_name_can_be_imported_and_documents_itself() -> None:
    for name in flow_core.__all__:
        assert getattr(flow_core, name).__doc__, name
    assert flow_core.__all__ == sorted(flow_core.__all__)
    assert set(dir(flow_core)) == set(flow_core.__all__)
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        flow_core.rum  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("pydantic", "requests", "paramiko", "yaml", "cloudpickle", "asyncio", "typing")
    code = f"import sys, flow_core; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("[]"), out


def test_a_task_says_what_it_is(flow: Flow) -> None:
    task = flow.run("true")
    assert repr(task) == f"<Task {task.task_id}>"
    task.wait()
    assert repr(task) == f"<Task {task.task_id} completed>"
    assert isinstance(task, Task)
