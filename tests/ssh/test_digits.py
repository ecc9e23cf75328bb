"""The example's sweep on SSH hosts, as nodes of each orchestrator."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_core import Flow
from tests.infra import digits
from tests.infra.ssh import Machines


@pytest.mark.slow
@pytest.mark.parametrize("host", digits.HOSTS)
def test_the_digits_sweep_runs_on_ssh_hosts(
    host: str, ssh_machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = digits.run(host, "ssh", tmp_path)
    assert f"│ {host}" in shown and "0.9639" in shown
    monkeypatch.setenv("FLOW_CONFIG", str(tmp_path / "config.yaml"))
    tasks = [task.snapshot for task in Flow().list_tasks(12)]
    assert len(tasks) == 12 and all(task.status.succeeded for task in tasks)
    assert len({task.hosts for task in tasks}) > 1
