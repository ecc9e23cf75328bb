"""What is said of a task whose job is held, suspended, forgotten or on another cluster; and the page that says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flow_core import Flow
from flow_core.models import TaskStatus
from flow_core.runner import slurm_tools as tools
from flow_core.runner import task as records
from flow_core.task import Task
from tests.infra.lab import until
from tests.infra.slurm import AccountedCluster, Cluster

PAGE = Path(__file__).parents[2] / "docs" / "slurm.md"
READY = 'echo start; until test -e "$FLOW_TASK_DIR/go"; do sleep 0.05; done'


def folder(flow: Flow, task: Task) -> Path:
    return Path(flow.provider.site.home, "tasks", *task.task_id.split("-")[-2:])  # type: ignore[attr-defined]


def shows(flow: Flow, task: Task, status: TaskStatus) -> None:
    until(lambda: flow.poll([task.task_id])[task.task_id].status is status, f"the task to be {status}")


def test_a_held_requeue_is_paused_and_goes_on_when_it_is_released(flow: Flow, slurm_cluster: Cluster) -> None:
    task = flow.run(READY, upload_code=False)
    until(lambda: task.logs() == "start\n", "its start")
    (job,) = slurm_cluster.job_ids()
    slurm_cluster.command("scontrol", "requeuehold", job)
    shows(flow, task, TaskStatus.PAUSED)
    slurm_cluster.command("scontrol", "release", job)
    until(lambda: task.logs() == "start\n" * 2, "its second start")
    (folder(flow, task) / "go").touch()
    seen = flow.wait([task.task_id], timeout=60)[task.task_id]
    assert (seen.status, seen.preemptions) == (TaskStatus.COMPLETED, 1)


def test_a_suspended_job_is_paused(flow: Flow, slurm_cluster: Cluster) -> None:
    task = flow.run(READY, upload_code=False)
    until(lambda: task.logs() == "start\n", "its start")
    (job,) = slurm_cluster.job_ids()
    slurm_cluster.command("scontrol", "suspend", job)
    shows(flow, task, TaskStatus.PAUSED)
    slurm_cluster.command("scontrol", "resume", job)
    shows(flow, task, TaskStatus.RUNNING)
    task.cancel()
    assert flow.wait([task.task_id], timeout=60)[task.task_id].status is TaskStatus.CANCELLED


def test_a_cancelled_task_that_waits_to_run_again_ends(flow: Flow, slurm_cluster: Cluster) -> None:
    task = flow.run(READY, upload_code=False)
    until(lambda: task.logs() == "start\n", "its start")
    slurm_cluster.requeue(slurm_cluster.job_ids()[0])
    shows(flow, task, TaskStatus.PREEMPTED)
    task.cancel()
    seen = flow.wait([task.task_id], timeout=60)[task.task_id]
    assert (seen.status, seen.reason, task.logs()) == (TaskStatus.CANCELLED, "cancelled", "start\n")


def test_a_reader_of_the_log_alone_hears_of_a_killed_job(flow: Flow, slurm_cluster: Cluster) -> None:
    task = flow.run(READY, upload_code=False)
    until(lambda: task.logs() == "start\n", "its start")
    slurm_cluster.kill_shell(slurm_cluster.job_ids()[0])
    assert list(task.logs(follow=True)) == ["start\n"]


def test_a_job_that_only_the_accounting_remembers_has_its_true_end(
    slurm_cluster_with_accounting: AccountedCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = Flow("slurm", slurm={"home": str(tmp_path / "home"), "memory": "100M"})
    task = flow.run(READY, upload_code=False)
    until(lambda: task.logs() == "start\n", "its start")
    (job,) = slurm_cluster_with_accounting.job_ids()
    slurm_cluster_with_accounting.command("scancel", job)
    known = ["squeue", "-h", "-t", "all", "-o", "%A"]
    until(
        lambda: job not in slurm_cluster_with_accounting.command(*known).split(),
        "the queue to forget",
        within_s=120,
    )
    assert not (folder(flow, task) / "exit.json").exists()
    seen = flow.poll([task.task_id])[task.task_id]
    assert (seen.status, seen.reason) == (TaskStatus.CANCELLED, "cancelled")


def test_a_task_of_another_cluster_is_left_alone(flow: Flow, slurm_cluster: Cluster) -> None:
    task = flow.run(READY, upload_code=False)
    until(lambda: task.logs() == "start\n", "its start")
    record = records.read_json(str(folder(flow, task)), "queued.json")
    assert record is not None and record["cluster"] == slurm_cluster.name
    records.write_json(str(folder(flow, task)), "queued.json", {**record, "cluster": "another"})
    fresh = Flow("slurm", slurm={"home": flow.provider.site.home})  # type: ignore[attr-defined]
    seen = fresh.poll([task.task_id])[task.task_id]
    assert seen.status is TaskStatus.RUNNING and "another" in seen.message
    fresh.cancel([task.task_id])
    assert slurm_cluster.job_ids()
    assert flow.wait([task.task_id], timeout=60)[task.task_id].status is TaskStatus.CANCELLED


def test_many_polls_ask_the_queue_once_in_a_while(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = flow.run_many(["sleep 1000"] * 20, upload_code=False)
    ids = [task.task_id for task in tasks]
    shows(flow, tasks[-1], TaskStatus.RUNNING)
    asked: list[str] = []
    original = tools.tool

    def tool(argv: list[str], *, deadline_s: float, cwd: str | None = None) -> tuple[int, str, str]:
        asked.append(argv[0])
        return original(argv, deadline_s=deadline_s, cwd=cwd)

    monkeypatch.setattr(tools, "tool", tool)
    for _ in range(50):
        flow.poll(ids)
    assert asked.count("squeue") <= 2 and set(asked) <= {"squeue"}


def test_the_pages_example_runs(
    flow_with: Callable[..., Flow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example is not None
    project = tmp_path / "project"
    project.mkdir()
    (project / "train.py").write_text("import sys; print('seed', sys.argv[2])\n")
    monkeypatch.chdir(project)
    monkeypatch.setenv("FLOW_SLURM_HOME", flow_with().provider.site.home)  # type: ignore[attr-defined]
    monkeypatch.setenv("FLOW_SLURM_MEMORY", "100M")
    names: dict[str, object] = {}
    exec(example[1].replace("range(100)", "range(3)"), names)
    ends, tasks = names["ends"], names["tasks"]
    assert isinstance(ends, dict) and isinstance(tasks, list)
    assert {one.status for one in ends.values()} == {TaskStatus.COMPLETED}
    assert [task.logs() for task in tasks] == [f"seed {seed}\n" for seed in range(3)]
