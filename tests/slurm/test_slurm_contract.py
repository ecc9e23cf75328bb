"""What every provider promises, kept by Slurm: on this machine, with accounting and without, through a login node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from flow_core.ids import random_key
from flow_core.testing import ProviderContract
from tests.infra.slurm import AccountedCluster, Cluster
from tests.infra.ssh import Client, Sshd

COMMON = {"FLOW_PROVIDER": "slurm", "FLOW_SLURM_KILL_GRACE_S": "1.5"}


class TestSlurm(ProviderContract):
    """Slurm's tools on this machine, no accounting: the queue and our own records must do."""

    @pytest.fixture
    def environment(self, slurm_cluster: Cluster, tmp_path: Path) -> Mapping[str, str]:
        return {**COMMON, "FLOW_SLURM_HOME": str(tmp_path / "a'; echo b %j")}


class TestSlurmWithAccounting(ProviderContract):
    """The queue forgets ended jobs in seconds, and the accounting knows them."""

    @pytest.fixture
    def environment(
        self, slurm_cluster_with_accounting: AccountedCluster, tmp_path: Path
    ) -> Mapping[str, str]:
        return {**COMMON, "FLOW_SLURM_HOME": str(tmp_path / "home")}


class TestSlurmThroughLogin(ProviderContract):
    """Everything goes over one SSH connection to a login node, as another user."""

    @pytest.fixture
    def environment(self, slurm_login: Sshd, ssh_client: Client) -> Mapping[str, str]:
        home = slurm_login.lab.home / "ada" / f"flow {random_key()}"
        return {
            **COMMON,
            "FLOW_SLURM_HOST": "ada@login",
            "FLOW_SLURM_HOME": str(home),
            "FLOW_SSH_CONFIG": str(ssh_client.config),
        }
