"""kill -9 of the submitting process at steps of submit and collect on Slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults import crash_loop
from tests.infra.slurm import Cluster

RUNS = int(os.environ.get("FLOW_CRASH_RUNS", "30"))


@pytest.mark.timeout(900)
def test_no_crash_of_the_submitter_loses_doubles_or_leaves_a_task(
    slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    monkeypatch.setenv("FLOW_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("FLOW_PROVIDER", "slurm")
    monkeypatch.setenv("FLOW_SLURM_HOME", str(tmp_path / "home"))
    crash_loop.check(tmp_path, RUNS)
