"""kill -9 of the submitting process at steps of submit and collect over SSH."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flow_core.ids import random_key
from tests.faults import crash_loop
from tests.infra.ssh import Client, Sshd
from tests.ssh.test_faults import settings

RUNS = int(os.environ.get("FLOW_CRASH_RUNS", "40"))


@pytest.mark.timeout(900)
def test_no_crash_of_the_submitter_loses_doubles_or_leaves_a_task(
    loopback_sshd: Sshd, ssh_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = loopback_sshd.lab.home / loopback_sshd.user / f"loop-{random_key()}"
    folder.mkdir()
    folder.chmod(0o777)  # the tasks are another user's
    for name, value in settings(ssh_client, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLOW_SSH_HOSTS", "lo")
    monkeypatch.setenv("FLOW_SSH_HOME", str(folder / "home"))
    crash_loop.check(folder, RUNS)
