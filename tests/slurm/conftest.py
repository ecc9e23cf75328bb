"""A Flow on the test cluster, with a home and a configuration of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow
from tests.infra.slurm import Cluster


@pytest.fixture
def flow_with(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Flow]]:
    """Makes a Flow with these settings of the section `slurm`; all of them share one home."""
    for name in [name for name in os.environ if name.startswith("FLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLOW_CONFIG", str(tmp_path / "config.yaml"))
    (tmp_path / "config.yaml").write_text("{}")
    made: list[Flow] = []

    def make(**settings: Any) -> Flow:
        common = {"home": str(tmp_path / "a home %j"), "memory": "100M", "kill_grace_s": 1.0}
        made.append(Flow("slurm", slurm={**common, **settings}))
        return made[-1]

    yield make
    for flow in made[:1]:
        flow.cancel([task.task_id for task in flow.list_tasks(limit=1000)])


@pytest.fixture
def flow(flow_with: Callable[..., Flow]) -> Flow:
    """A Flow on the test cluster."""
    return flow_with()
