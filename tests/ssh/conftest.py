"""What the tests of the ssh provider share: settings of their own, and a provider with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flow_core import Flow
from flow_core.providers import ssh_connection
from flow_core.providers.ssh import SSHProvider
from tests.infra.ssh import Client, Machines, Sshd

MakeFlow = Callable[..., Flow]


@pytest.fixture(autouse=True, scope="module")
def _no_connections_of_others() -> Iterator[None]:
    """Connections are shared by all of a process; those of a module's tests end with it."""
    yield
    ssh_connection.close_connections()


@pytest.fixture
def flow_on(tmp_path: Path, ssh_client: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeFlow]:
    """Make a Flow for some hosts; its tasks are in a folder of this test alone."""
    monkeypatch.setenv("FLOW_CONFIG", "/dev/null")
    monkeypatch.chdir(tmp_path)
    made: list[Flow] = []

    def make(*hosts: object, **settings: object) -> Flow:
        own = {"home": f"~/{tmp_path.name}", "notes": tmp_path / "notes", "kill_grace_s": 1.5, **settings}
        made.append(Flow("ssh", ssh={"hosts": hosts, **own}))
        return made[-1]

    yield make
    for flow in made:
        provider = flow.provider
        assert isinstance(provider, SSHProvider)
        for host in provider.hosts:
            host.transport.close()


@pytest.fixture
def lo(loopback_sshd: Sshd, flow_on: MakeFlow) -> Flow:
    """A Flow on the one host that shares this machine's files."""
    return flow_on("lo")


@pytest.fixture
def three(ssh_machines: Machines, flow_on: MakeFlow) -> Flow:
    """A Flow on three machines with two GPUs each."""
    return flow_on("h1", "h2", "h3")
