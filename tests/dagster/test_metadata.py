"""What Dagster shows of tasks. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import dagster as dg

from flow_core.errors import TaskExecutionError
from flow_core.models import Snapshot, TaskStatus
from flow_dagster.metadata import Seen, describe, plain

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
ENDED = Snapshot(
    task_id="train-0123456789abcdef-2",
    name="train",
    status=TaskStatus.COMPLETED,
    reason="exit",
    message="",
    exit_code=0,
    signal=None,
    submitted_at=START,
    started_at=START + timedelta(seconds=2),
    ended_at=START + timedelta(seconds=12.5),
    peak_memory_bytes=1000,
    preemptions=0,
    hosts=("node1",),
    gpus=("0", "1"),
    instance_type="2xa100",
    num_instances=1,
    region="local",
    cost_per_hour_usd=3.5,
    total_cost_usd=0.01,
    labels={},
)
FAILED = replace(ENDED, task_id="train-fedcba9876543210-1", status=TaskStatus.FAILED, exit_code=3)


def test_one_task_shows_what_is_known_of_it() -> None:
    assert describe([Seen(ENDED, "local", reattached=True)]) == {
        "flow/task_id": "train-0123456789abcdef-2",
        "flow/provider": "local",
        "flow/status": "completed",
        "flow/instance_type": "2xa100",
        "flow/gpu": "a100",
        "flow/gpu_count": 2,
        "flow/region": "local",
        "flow/queue_seconds": 2.0,
        "flow/duration_seconds": 10.5,
        "flow/exit_code": 0,
        "flow/attempts": 2,
        "flow/preemptions": 0,
        "flow/peak_memory_bytes": 1000,
        "flow/price_per_hour_usd": 3.5,
        "flow/cost_usd": 0.01,
        "flow/reattached": True,
    }


def test_what_is_unknown_has_no_key() -> None:
    bare = replace(
        ENDED,
        status=TaskStatus.LOST,
        reason="lost",
        exit_code=None,
        submitted_at=None,
        started_at=None,
        ended_at=None,
        peak_memory_bytes=None,
        instance_type="",
        region="",
        cost_per_hour_usd=None,
        total_cost_usd=None,
    )
    assert describe([Seen(bare, "local")]) == {
        "flow/task_id": "train-0123456789abcdef-2",
        "flow/provider": "local",
        "flow/status": "lost",
        "flow/reason": "lost",
        "flow/attempts": 2,
        "flow/preemptions": 0,
    }


def test_gpus_of_all_nodes_are_counted() -> None:
    shown = describe([Seen(replace(ENDED, instance_type="8xh100", num_instances=4), "local")])
    assert (shown["flow/gpu"], shown["flow/gpu_count"], shown["flow/nodes"]) == ("h100", 32, 4)


def test_a_task_without_gpus_shows_none() -> None:
    shown = describe([Seen(replace(ENDED, instance_type="cpu", gpus=()), "local")])
    assert shown["flow/gpu_count"] == 0
    assert "flow/gpu" not in shown


def test_many_tasks_show_totals_and_a_table() -> None:
    error = TaskExecutionError("task failed: exit code 3")
    shown = describe([Seen(ENDED, "local", item=0), Seen(FAILED, "local", item=1, error=error)])
    assert (shown["flow/tasks"], shown["flow/failed_tasks"]) == (2, 1)
    assert (shown["flow/duration_seconds"], shown["flow/cost_usd"]) == (21.0, 0.02)
    assert (shown["flow/longest_queue_seconds"], shown["flow/gpu"]) == (2.0, "a100")
    assert "flow/task_id" not in shown
    table = shown["flow/task_table"]
    assert isinstance(table, dg.TableMetadataValue)
    rows = [record.data for record in table.records]
    assert [(row["item"], row["status"], row["exit_code"]) for row in rows] == [
        ("0", "completed", "0"),
        ("1", "failed", "3"),
    ]
    assert rows[1]["error"] == "TaskExecutionError: task failed: exit code 3"


def test_tasks_on_different_machines_show_no_common_gpu() -> None:
    shown = describe([Seen(ENDED, "local"), Seen(replace(FAILED, instance_type="8xh100"), "local")])
    assert not {"flow/gpu", "flow/gpu_count", "flow/instance_type"} & set(shown)


def test_no_task_shows_nothing() -> None:
    assert describe([]) == {}


def test_the_line_for_a_log_leaves_tables_out() -> None:
    line = plain(describe([Seen(ENDED, "local"), Seen(FAILED, "local")]))
    assert line.startswith("tasks=2 failed_tasks=0 provider=local")
    assert "table" not in line
