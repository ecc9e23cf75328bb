"""A Dagster instance, and a local provider with two simulated GPUs for every test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from flow_dagster import FlowResource


@pytest.fixture(autouse=True)
def environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own home for tasks, and their Python is ours."""
    monkeypatch.setenv("FLOW_LOCAL_PYTHON", sys.executable)
    monkeypatch.setenv("DAGSTER_DISABLE_TELEMETRY", "yes")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the functions of a test leave their marks; jobs in other processes find it too."""
    path = tmp_path / "marks"
    path.mkdir()
    monkeypatch.setenv("JOB_FOLDER", str(path))
    return path


@pytest.fixture
def flow() -> FlowResource:
    return FlowResource(provider="local", gpu="a100")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance
