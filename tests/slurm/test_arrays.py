"""Many tasks at once: one array for those that ask for the same, each element a task of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flow_core import Flow
from flow_core.errors import SpecRejected
from flow_core.models import TaskConfig, TaskStatus
from tests.infra.lab import until
from tests.infra.slurm import Cluster


def jobs(cluster: Cluster) -> set[str]:
    """The jobs that Slurm knows; an array counts as one."""
    return set(cluster.command("squeue", "-h", "-t", "all", "-o", "%F").split())


def test_a_map_is_one_array_and_each_element_its_own_task(flow: Flow, slurm_cluster: Cluster) -> None:
    before = jobs(slurm_cluster)
    commands = [f"echo element {index}; exit {index % 2}" for index in range(8)]
    tasks = flow.run_many(commands, upload_code=False)
    assert len(jobs(slurm_cluster) - before) == 1
    seen = flow.wait([task.task_id for task in tasks], timeout=60)
    assert [seen[task.task_id].exit_code for task in tasks] == [0, 1] * 4
    assert [task.logs() for task in tasks] == [f"element {index}\n" for index in range(8)]
    assert len({task.task_id for task in tasks}) == 8


def test_an_array_runs_no_more_elements_at_once_than_allowed(flow_with: Callable[..., Flow]) -> None:
    flow = flow_with(max_running=4)
    tasks = flow.run_many(["sleep 1000"] * 6, upload_code=False)
    ids = [task.task_id for task in tasks]
    until(lambda: [one.status for one in flow.poll(ids).values()].count(TaskStatus.RUNNING) == 4, "four")
    said = "JobArrayTaskLimit"  # the queue is asked every two seconds
    until(lambda: [said in one.message for one in flow.poll(ids).values()].count(True) == 2, "Slurm's reason")
    flow.cancel(ids[:5])
    until(lambda: flow.poll([ids[5]])[ids[5]].status is TaskStatus.RUNNING, "the last one's turn")
    seen = flow.wait(ids[:5], timeout=60)
    assert {one.status for one in seen.values()} == {TaskStatus.CANCELLED}


def test_tasks_that_ask_for_something_else_are_another_array(flow: Flow, slurm_cluster: Cluster) -> None:
    before = jobs(slurm_cluster)
    wanted = [
        TaskConfig(command="echo $CUDA_VISIBLE_DEVICES", instance_type=kind, upload_code=False)
        for kind in ("cpu", "2xa100", "cpu", "2xa100")
    ]
    tasks = flow.run_many(wanted)
    assert len(jobs(slurm_cluster) - before) == 2
    flow.wait([task.task_id for task in tasks], timeout=60)
    assert [len(task.logs().split(",")) for task in tasks] == [1, 2, 1, 2]


def test_the_same_keys_get_the_same_tasks(flow: Flow, slurm_cluster: Cluster) -> None:
    first = flow.run_many(["echo x"] * 3, upload_code=False, idempotency_key="map")
    before = jobs(slurm_cluster)
    again = flow.run_many(["echo x"] * 3, upload_code=False, idempotency_key="map")
    assert [task.task_id for task in again] == [task.task_id for task in first]
    more = flow.run_many(["echo x"] * 5, upload_code=False, idempotency_key="map")
    assert [task.task_id for task in more][:3] == [task.task_id for task in first]
    assert len(jobs(slurm_cluster) - before) == 2
    seen = flow.wait([task.task_id for task in more], timeout=60)
    assert {one.status for one in seen.values()} == {TaskStatus.COMPLETED}


def test_an_array_that_slurm_refuses_leaves_nothing(flow: Flow) -> None:
    with pytest.raises(SpecRejected, match="partition"):
        flow.run_many(["true"] * 3, upload_code=False, region="no-such-partition", idempotency_key="map")
    assert flow.find("map[0]") is None
    assert flow.list_tasks() == []
