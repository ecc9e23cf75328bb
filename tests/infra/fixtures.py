"""The lab and what runs in it, as fixtures; `tests/conftest.py` brings them to every suite.

They start on first use and live as long as the test run, which then lives in the lab's network: nothing it starts can
reach anything else. After each test, faults are undone and what the test left running is ended. Not for pytest-xdist.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NoReturn, TypeVar

import pytest

from tests.infra import packages
from tests.infra.lab import Lab
from tests.infra.packages import Needs, Unavailable
from tests.infra.slurm import AccountedCluster, Cluster
from tests.infra.ssh import Client, Machines, Sshd

_Any = TypeVar("_Any", bound=Cluster)
_LEFT_OUT = "left out: "


def install(*needs: Needs) -> None:
    """Install what a fixture needs. Where that cannot be, the test is left out, and in CI it fails."""
    try:
        packages.install(*needs)
    except Unavailable as reason:
        unavailable(reason)


def unavailable(reason: Unavailable) -> NoReturn:
    """Leave the test out, or fail it in CI: this machine cannot have what it needs."""
    if os.environ.get("CI"):
        pytest.fail(str(reason), pytrace=False)
    pytest.skip(f"{_LEFT_OUT}{reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end what could not run here."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", ()):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        _, found, reason = text.partition(_LEFT_OUT)
        if found:
            reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} tests were left out: {reason}", yellow=True)


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Namespaces of our own, in whose network the rest of the test run lives."""
    install(*_needs_of(request.session.items))
    try:
        lab = Lab()
    except Unavailable as reason:
        unavailable(reason)
    try:
        with lab.entered():
            yield lab
    finally:
        lab.close()


def _needs_of(tests: Iterable[pytest.Item]) -> Iterator[Needs]:
    """Say what tests need that may start a lab: once they are in its network, nothing can be fetched any more."""
    yield packages.SSH
    on_slurm = [test for test in tests if "slurm" in test.path.parts]
    if on_slurm:
        yield packages.SLURM
    if any("_accounted" in getattr(test, "fixturenames", ()) for test in on_slurm):
        yield packages.ACCOUNTING


# --- SSH -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _client(lab: Lab) -> Client:
    return Client(lab.folder / "client")


@pytest.fixture
def ssh_client(_client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A user with a key and an ~/.ssh/config that knows every host of the lab; $HOME is theirs during the test."""
    monkeypatch.setenv("HOME", str(_client.home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return _client


@pytest.fixture(scope="session")
def _loopback(lab: Lab, _client: Client) -> Sshd:
    return Sshd(lab, _client)


@pytest.fixture
def loopback_sshd(_loopback: Sshd, ssh_client: Client) -> Iterator[Sshd]:
    """Host "lo": an sshd that shares this machine's files, so that tests can look at what it did."""
    yield _loopback
    _loopback.start()


@pytest.fixture(scope="session")
def _machines(lab: Lab, _client: Client) -> Iterator[Machines]:
    machines = Machines(lab, _client)
    yield machines
    machines.close()


@pytest.fixture
def ssh_machines(_machines: Machines, ssh_client: Client) -> Iterator[Machines]:
    """Hosts "h1", "h2" and "h3": machines of their own with two simulated GPUs each, and the faults they can have."""
    yield _machines
    _machines.tidy()


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _cluster(lab: Lab) -> Cluster:
    return Cluster(lab)


@pytest.fixture
def slurm_cluster(_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three nodes with eight simulated GPUs each, without accounting; Slurm's tools find it."""
    yield from _in_use(_cluster, monkeypatch)


@pytest.fixture(scope="session")
def _accounted(lab: Lab) -> AccountedCluster:
    return AccountedCluster(lab)


@pytest.fixture
def slurm_cluster_with_accounting(
    _accounted: AccountedCluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AccountedCluster]:
    """The same with slurmdbd; ended jobs leave its queue after seconds."""
    yield from _in_use(_accounted, monkeypatch)


def _in_use(cluster: _Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Any]:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))]:
        monkeypatch.delenv(name)
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.tidy()


@pytest.fixture(scope="session")
def _login(lab: Lab, _cluster: Cluster, _client: Client) -> Sshd:
    environment = " ".join(f"{name}={value}" for name, value in _cluster.env.items())
    return Sshd(lab, _client, name="login", port=2223, more=f"SetEnv {environment}")


@pytest.fixture
def slurm_login(_login: Sshd, slurm_cluster: Cluster, ssh_client: Client) -> Iterator[Sshd]:
    """Host "login": where `slurm_cluster` is used from by others; their home is on every node."""
    yield _login
    _login.start()
