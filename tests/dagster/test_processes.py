"""Real processes: steps in processes of their own, killed workers, interrupted workers. The task is always one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from flow_core import Flow, TaskStatus
from tests.conftest import processes_under
from tests.dagster import jobs

JOBS = Path(jobs.__file__)
ROOT = JOBS.parents[2]
DAGSTER = Path(sys.executable).with_name("dagster")


def until(true: Callable[[], object], *, seconds: float = 60) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def marks(folder: Path) -> list[Path]:
    return list(folder.glob("call-*"))


@pytest.fixture
def dagster_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "dagster"
    path.mkdir()
    (path / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    monkeypatch.setenv("DAGSTER_HOME", str(path))
    return path


@pytest.fixture
def worker(dagster_home: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run worker in a process group of its own, whose step waits for its task."""
    command = [str(DAGSTER), "job", "execute", "-f", str(JOBS), "-j", "counted_job"]
    with (dagster_home / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until(lambda: marks(folder) or process.poll() is not None)
        assert marks(folder), (dagster_home / "worker.log").read_text()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def from_failure(instance: dg.DagsterInstance) -> dg.JobExecutionResult:
    """Re-execute the only run so far as the UI's "from failure" does."""
    [run] = instance.get_runs()
    if not run.is_finished:
        instance.report_run_failed(run)  # what run monitoring does for a worker that vanished
    options = dg.ReexecutionOptions.from_failure(run.run_id, instance)
    job = dg.reconstructable(jobs.load_counted_job)
    return dg.execute_job(
        job, instance=instance, reexecution_options=options, tags=jobs.FROM_FAILURE, raise_on_error=False
    )


def test_a_step_in_its_own_process_returns_the_value(instance: dg.DagsterInstance, folder: Path) -> None:
    with dg.execute_job(dg.reconstructable(jobs.load_fan_out_job), instance=instance) as result:
        assert result.success
        assert result.output_for_node("summed") == 23
    keys = {task.snapshot.labels["dagster/step"] for task in Flow().list_tasks()}
    assert keys == {"added[n1]", "added[n2]"}


def test_a_killed_step_is_retried_and_gets_its_running_task_again(
    instance: dg.DagsterInstance, folder: Path, home: Path
) -> None:
    killer = threading.Thread(target=kill_the_step_once, args=(folder,))
    killer.start()
    with dg.execute_job(dg.reconstructable(jobs.load_counted_job), instance=instance) as result:
        killer.join()
        assert result.output_for_node("counted") == 1
        [output] = [event for event in result.all_events if event.is_successful_output]
        assert output.step_output_data.metadata["flow/reattached"].value is True
    assert_ran_once(folder, home)


def kill_the_step_once(folder: Path) -> None:
    """Kill the step's process when its task works, and let the task end when the retry has begun."""
    until(lambda: marks(folder))
    pid = (folder / "step.pid").read_text()
    os.kill(int(pid), signal.SIGKILL)
    until(lambda: (folder / "step.pid").read_text() not in {"", pid})
    (folder / "gate").touch()


def assert_ran_once(folder: Path, home: Path) -> None:
    assert len(marks(folder)) == 1
    [task] = Flow().list_tasks()
    assert task.status is TaskStatus.COMPLETED
    until(lambda: not processes_under(home), seconds=10)


@pytest.mark.parametrize("open_first", [False, True], ids=["still running", "ended meanwhile"])
def test_after_kill_9_of_the_whole_worker_a_re_execution_gets_the_task(
    worker: subprocess.Popen[bytes], folder: Path, home: Path, open_first: bool
) -> None:
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    [task] = Flow().list_tasks()
    assert task.is_running
    if open_first:
        (folder / "gate").touch()
        task.wait(timeout=30)
    else:
        threading.Timer(1.0, (folder / "gate").touch).start()
    with dg.DagsterInstance.get() as instance, from_failure(instance) as result:
        assert result.output_for_node("counted") == 1
        [output] = [event for event in result.all_events if event.is_successful_output]
        shown = output.step_output_data.metadata
        assert (shown["flow/task_id"].value, shown["flow/reattached"].value) == (task.task_id, True)
    assert_ran_once(folder, home)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_interrupted_worker_leaves_its_task_to_the_retry(
    worker: subprocess.Popen[bytes], folder: Path, home: Path, number: signal.Signals
) -> None:
    os.kill(worker.pid, number)
    assert worker.wait(60) != 0
    with dg.DagsterInstance.get() as instance:
        [run] = instance.get_runs()
        assert run.status is dg.DagsterRunStatus.FAILURE
        [task] = Flow().list_tasks()
        assert task.is_running
        (folder / "gate").touch()
        with from_failure(instance) as result:
            assert result.output_for_node("counted") == 1
    assert_ran_once(folder, home)


def test_an_interrupt_of_a_run_that_nobody_can_continue_cancels_its_task(folder: Path, home: Path) -> None:
    script = "from tests.dagster import jobs; jobs.defs.resolve_job_def('once_job').execute_in_process()"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: marks(folder) or process.poll() is not None)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) != 0
        finally:
            process.kill()
    [task] = Flow().list_tasks()
    assert task.status is TaskStatus.CANCELLED
    until(lambda: not processes_under(home), seconds=10)
