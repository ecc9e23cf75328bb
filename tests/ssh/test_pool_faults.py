"""One of three hosts is down: it is passed over, what runs there is kept, and what runs elsewhere is not held up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flow_core import config, providers
from flow_core.engine import Engine
from flow_core.errors import ProviderUnavailable
from flow_core.ids import TaskId, random_key
from flow_core.models import Snapshot, SpecFile, TaskConfig, TaskSpec, TaskStatus
from flow_core.providers.spi import Provider
from tests.infra import notice
from tests.infra.lab import until
from tests.infra.ssh import Client, Machine, Machines
from tests.ssh.test_faults import FAULTS, HOME, ROUNDS, Fault, settings

PATIENCE_S = 120.0


@pytest.fixture
def provider(
    ssh_machines: Machines, ssh_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Provider:
    for name, value in settings(ssh_client, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLOW_SSH_HOSTS", "h1,h2,h3")
    return providers.load(config.load())


def start(provider: Provider, then: str, *, instance_type: str = "cpu") -> str:
    task_id = str(TaskId.first("pool", random_key()))
    shell = f"echo start >> {HOME}/starts-{task_id}; {then}"
    spec = TaskSpec.from_config(TaskConfig(shell=shell, instance_type=instance_type))
    provider.submit(spec, task_id=task_id)
    return task_id


def starts(machines: Machines, task_id: str) -> list[str]:
    """The hosts on which a task has started, once for each start."""
    found = []
    for name, machine in machines.items():
        file = machine.folder / "home" / "ada" / f"starts-{task_id}"
        found += [name] * (file.read_text().count("start") if file.exists() else 0)
    return found


def end(provider: Provider, task_id: str) -> Snapshot:
    return Engine(provider).wait([task_id], timeout=PATIENCE_S)[task_id]


def timed(fault: str, what: str, question: Callable[[], object]) -> None:
    begin = time.monotonic()
    question()
    notice.record("ssh, one of three", fault, what, time.monotonic() - begin, "done")


@pytest.fixture(params=list(FAULTS))
def fault(request: pytest.FixtureRequest) -> Fault:
    return FAULTS[request.param]


def test_a_host_that_is_down_is_passed_over_and_its_tasks_are_kept(
    provider: Provider, ssh_machines: Machines, fault: Fault, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["fault"]
    ready = f"until test -e {HOME}/go; do sleep 0.05; done"
    for machine in ssh_machines.values():
        machine.run(f"rm -f {HOME}/go")
    before = [start(provider, ready, instance_type="a100") for _ in range(6)]  # all GPUs of all hosts
    until(lambda: all(starts(ssh_machines, one) for one in before), "six tasks that run")
    placed = {task_id: starts(ssh_machines, task_id)[0] for task_id in before}
    assert sorted(placed.values()) == ["h1", "h1", "h2", "h2", "h3", "h3"]

    fault.begin(ssh_machines["h2"])
    after: list[str] = []
    for _ in range(4):
        timed(name, "submit", lambda: after.append(start(provider, "true")))
    assert all(end(provider, task_id).status is TaskStatus.COMPLETED for task_id in after)
    assert not any("h2" in starts(ssh_machines, task_id) for task_id in after)
    timed(name, "poll", lambda: provider.poll(before))
    seen = provider.poll(before)
    assert not any(one.status.final for one in seen.values()), seen
    assert all(seen[one].status is TaskStatus.RUNNING for one in before if placed[one] != "h2")
    assert provider.find_instances()

    fault.end(ssh_machines["h2"])
    for machine in ssh_machines.values():
        machine.run(f"touch {HOME}/go")
    for task_id in before:
        last = end(provider, task_id)
        if placed[task_id] == "h2" and not fault.survived:
            assert (last.status.succeeded, last.reason) == (False, "reboot")
        else:
            assert last.status is TaskStatus.COMPLETED, last
        assert starts(ssh_machines, task_id) == [placed[task_id]]
    assert all(len(starts(ssh_machines, task_id)) == 1 for task_id in after)


# --- in the middle of a transfer -------------------------------------------------------------------------------------

LARGE_BYTES = 80_000_000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.seek(LARGE_BYTES - 3)  # what is in it matters less than that it takes a while
        file.write(b"end")
    return path


Trial = Callable[[Provider, Machine, Fault], None]
AtOnce = Callable[[Trial], None]


@pytest.fixture(params=ROUNDS, ids=lambda faults: ", ".join(faults.values()))
def at_once(request: pytest.FixtureRequest, ssh_machines: Machines, provider: Provider) -> AtOnce:
    """Does something with several hosts, each of which has a fault of its own; with little patience."""

    def one(trial: Trial, host: str, name: str) -> None:
        alone = providers.load(config.load(ssh={"hosts": [host], "connect_timeout_s": 3}))
        trial(alone, ssh_machines[host], FAULTS[name])

    def run(trial: Trial) -> None:
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(one, trial, host, name) for host, name in request.param.items()]:
                done.result()

    return run


def in_the_middle(machine: Machine, fault: Fault, transfer: Callable[[], object]) -> Exception | None:
    """Begin a fault when some megabytes have passed; return the error that the transfer ended with."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            transfer()
        except Exception as error:
            errors.append(error)

    before = passed(machine)
    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: passed(machine) > before + 5_000_000 or not thread.is_alive(), "some megabytes")
    fault.begin(machine)
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the transfer hangs"
    fault.end(machine)
    return errors[0] if errors else None


def again(action: Callable[[], object]) -> None:
    """Do it as soon as the host is heard of again: who finds it down is told so at once, for some seconds."""

    def done() -> bool:
        try:
            action()
        except ProviderUnavailable:
            return False
        return True

    until(done, "a host that is back", within_s=PATIENCE_S)


def passed(machine: Machine) -> int:
    fields = machine.devices().split("eth0:")[1].split()
    return int(fields[0]) + int(fields[8])


def test_a_submit_that_breaks_in_the_middle_is_finished_by_the_next(
    at_once: AtOnce, ssh_machines: Machines, large: Path
) -> None:
    def trial(alone: Provider, machine: Machine, fault: Fault) -> None:
        task_id = str(TaskId.first("pool", random_key()))
        shell = f'echo start >> {HOME}/starts-{task_id}; wc -c < "$FLOW_TASK_DIR/large"'
        plain = TaskSpec.from_config(TaskConfig(shell=shell, instance_type="cpu"))
        spec = plain.model_copy(update={"files": (SpecFile(name="large", path=large),)})
        error = in_the_middle(machine, fault, lambda: alone.submit(spec, task_id=task_id))
        assert isinstance(error, ProviderUnavailable), (machine.name, error)
        for _ in range(2):
            again(lambda: alone.submit(spec, task_id=task_id))
        assert end(alone, task_id).status is TaskStatus.COMPLETED
        assert int(alone.read_log(task_id).data) == LARGE_BYTES
        assert starts(ssh_machines, task_id) == [machine.name]

    at_once(trial)


def test_a_fetch_that_breaks_in_the_middle_leaves_what_was_there(at_once: AtOnce, tmp_path: Path) -> None:
    def trial(alone: Provider, machine: Machine, fault: Fault) -> None:
        task_id = start(
            alone, f'truncate -s {LARGE_BYTES} "$FLOW_TASK_DIR/made"; echo x >> "$FLOW_TASK_DIR/made"'
        )
        assert end(alone, task_id).status is TaskStatus.COMPLETED
        folder = tmp_path / machine.name
        folder.mkdir()
        into = folder / "into"
        into.write_text("before")
        error = in_the_middle(machine, fault, lambda: alone.fetch(task_id, "made", into))
        assert isinstance(error, ProviderUnavailable), (machine.name, error)
        assert into.read_text() == "before"
        again(lambda: alone.fetch(task_id, "made", into))
        assert into.stat().st_size == LARGE_BYTES + 2
        assert list(folder.iterdir()) == [into]

    at_once(trial)
