"""What a provider gets and what it answers: TaskSpec, TaskStatus, Snapshot, LogChunk, Volume, Instance."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_core.errors import ValidationError
from flow_core.models import (
    Instance,
    LogChunk,
    Snapshot,
    SpecFile,
    TaskConfig,
    TaskSpec,
    TaskStatus,
    Volume,
)

NASTY = 'a\'; echo $HOME "`x`"\n\\ä€'


def resolved(**fields: Any) -> TaskSpec:
    config: Any = TaskConfig
    return TaskSpec.from_config(config(**{"gpu": "a100", **fields}))


@pytest.mark.parametrize(
    ("fields", "entry", "argv", "script"),
    [
        ({"command": NASTY}, "shell", (NASTY,), ""),
        ({"shell": NASTY}, "shell", (NASTY,), ""),
        ({"command": ["python", NASTY, ""]}, "argv", ("python", NASTY, ""), ""),
        ({"script": NASTY}, "script", (), NASTY),
        ({}, "argv", ("sleep", "infinity"), ""),
    ],
)
def test_each_way_to_say_a_command_is_resolved_and_arrives_unchanged(
    fields: dict[str, Any], entry: str, argv: tuple[str, ...], script: str
) -> None:
    spec = resolved(**fields)
    assert (spec.entry, spec.argv, spec.script) == (entry, argv, script)
    assert TaskSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("machine", "canonical", "count"),
    [
        ({"gpu": "h100"}, "8xh100", 8),
        ({"gpu": "A100x2"}, "2xa100", 2),
        ({"gpu": "cpu"}, "cpu", 0),
        ({"gpu": "it_AbC"}, "it_AbC", 1),
        ({"gpu": None, "min_gpu_memory_gb": 40}, "", 1),
    ],
)
def test_the_machine_is_resolved(machine: dict[str, Any], canonical: str, count: int) -> None:
    spec = resolved(**machine)
    assert (spec.instance_type, spec.gpu_count) == (canonical, count)
    assert spec.min_gpu_memory_gb == machine.get("min_gpu_memory_gb")


def test_everything_else_is_carried_over() -> None:
    fields: dict[str, Any] = {
        "name": "job",
        "env": {"A": NASTY},
        "image": "python:3.11",
        "working_dir": "sub",
        "volumes": [{"name": "data"}],
        "data_mounts": [{"source": "s3://b", "target": "/s3"}],
        "ports": [8888],
        "ssh_keys": ["key"],
        "region": "eu",
        "max_price_per_hour": 2.5,
        "num_instances": 4,
        "labels": {"team": "vision"},
    }
    spec = resolved(**fields, max_run_time_hours=1.5)
    assert spec.max_run_time_s == 5400
    for name in (
        "name",
        "env",
        "image",
        "working_dir",
        "region",
        "max_price_per_hour",
        "num_instances",
        "labels",
    ):
        assert getattr(spec, name) == fields[name]
    assert (spec.ports, spec.ssh_keys) == ((8888,), ("key",))
    assert spec.volumes[0].mount_path == "/volumes/data"
    assert spec.data_mounts[0].target == "/s3"
    assert resolved().max_run_time_s is None


@pytest.mark.parametrize(
    "fields",
    [
        {
            "command": "train --all",
            "name": "job",
            "env": {"A": "b"},
            "num_instances": 3,
            "max_run_time_hours": 2.0,
        },
        {
            "command": ["a", "b"],
            "volumes": [{"name": "x", "size_gb": 3}, {"volume_id": "vol-1"}],
            "ports": [1, 2],
        },
        {"script": "#!/bin/sh\nls", "gpu": None, "min_gpu_memory_gb": 40},
        {"gpu": "8xh100"},
    ],
)
def test_a_config_can_be_read_back_from_its_stored_spec(fields: dict[str, Any]) -> None:
    config: Any = TaskConfig
    original: TaskConfig = config(**{"gpu": "a100", "upload_code": False, **fields})
    stored = TaskSpec.from_config(original).model_dump(mode="json", exclude={"files"})
    again = TaskConfig.from_spec(TaskSpec.model_validate(stored))
    assert again == original


def test_files_travel_as_bytes_whatever_they_hold() -> None:
    config: Any = TaskConfig
    files = [
        SpecFile(name="payload", data=bytes(range(256))),
        SpecFile(name="code.tar.gz", path=Path("/tmp/x")),
    ]
    spec = TaskSpec.from_config(config(gpu="a100"), files=files)
    assert spec.files == tuple(files)
    assert TaskSpec.model_validate_json(spec.model_dump_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize("source", [{}, {"path": "/x", "data": b"x"}])
def test_a_file_has_exactly_one_source(source: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="exactly one of path and data"):
        SpecFile(name="payload", **source)


def test_an_empty_file_is_a_file() -> None:
    assert SpecFile(name="empty", data=b"").data == b""


@given(
    st.lists(st.text().filter(lambda text: "\0" not in text), min_size=1).filter(lambda argv: bool(argv[0]))
)
def test_any_argument_list_reads_back_from_json(argv: list[str]) -> None:
    spec = resolved(command=argv)
    assert TaskSpec.model_validate_json(spec.model_dump_json()).argv == tuple(argv)


# -- TaskStatus and Snapshot


def test_finality_belongs_to_the_status() -> None:
    assert {status.name for status in TaskStatus if status.final} == {
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "LOST",
    }
    assert [status.name for status in TaskStatus if status.succeeded] == ["COMPLETED"]


def test_a_status_reads_as_its_word() -> None:
    assert f"{TaskStatus.RUNNING}" == str(TaskStatus.RUNNING) == TaskStatus.RUNNING.value == "running"
    assert TaskStatus("preempted") is TaskStatus.PREEMPTED
    assert pickle.loads(pickle.dumps(TaskStatus.PAUSED)) is TaskStatus.PAUSED


def test_a_snapshot_says_nothing_that_is_not_known() -> None:
    seen = Snapshot(task_id="t-1", name="t", status=TaskStatus.PENDING)
    assert (seen.reason, seen.exit_code, seen.signal, seen.started_at, seen.total_cost_usd) == (
        "",
        None,
        None,
        None,
        None,
    )
    assert (seen.preemptions, seen.hosts, seen.gpus, dict(seen.labels)) == (0, (), (), {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.name = "x"  # type: ignore[misc]


def test_a_snapshot_and_a_chunk_travel() -> None:
    seen = Snapshot(
        task_id="t-1", name="t", status=TaskStatus.FAILED, ended_at=datetime(2025, 1, 31, tzinfo=timezone.utc)
    )
    assert pickle.loads(pickle.dumps(seen)) == seen
    assert LogChunk(data=b"\xff", next_offset=1, end=True) == LogChunk(b"\xff", 1, True)


# -- Volume and Instance


def test_instances_read_like_the_documented_mappings() -> None:
    found = Instance(instance_type="8xh100", gpu_type="h100", gpu_count=8, price_per_hour=20.5, region="eu")
    assert f"{found['instance_type']}: ${found['price_per_hour']}/hr" == "8xh100: $20.5/hr"
    assert found.instance_type == found["instance_type"] == dict(found)["instance_type"]
    assert found.get("nothing", 3) == 3
    assert "region" in found
    with pytest.raises(KeyError):
        found["nothing"]


def test_a_volume_has_its_id_under_both_names() -> None:
    volume = Volume(volume_id="vol-1", name="data", size_gb=100, region="eu")
    assert volume.id == volume["volume_id"] == "vol-1"
    assert Volume.model_validate_json(volume.model_dump_json()) == volume


def test_a_status_needs_no_pydantic() -> None:
    probe = "import sys, flow_core.status; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
