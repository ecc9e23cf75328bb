"""The ssh provider keeps the contract: on one host, and on three."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from flow_core.testing import ProviderContract
from tests.infra.ssh import Client, Machines, Sshd


def settings(client: Client, tmp_path: Path, hosts: str) -> dict[str, str]:
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    return {
        "HOME": str(client.home),
        "FLOW_CONFIG": str(config),
        "FLOW_PROVIDER": "ssh",
        "FLOW_SSH_HOSTS": hosts,
        # Every path here meets a shell sooner or later; the tests of one run do not meet.
        "FLOW_SSH_HOME": f"~/it's; echo {tmp_path.name}",
        "FLOW_SSH_NOTES": str(tmp_path / "notes"),
        "FLOW_SSH_KILL_GRACE_S": "1.5",
    }


class TestOneHost(ProviderContract):
    patience_s = float(os.environ.get("FLOW_CONTRACT_PATIENCE_S", "60"))

    @pytest.fixture
    def environment(self, loopback_sshd: Sshd, ssh_client: Client, tmp_path: Path) -> Mapping[str, str]:
        return settings(ssh_client, tmp_path, "lo")


class TestThreeHosts(ProviderContract):
    @pytest.fixture
    def environment(self, ssh_machines: Machines, ssh_client: Client, tmp_path: Path) -> Mapping[str, str]:
        return settings(ssh_client, tmp_path, "h1,h2,h3")
