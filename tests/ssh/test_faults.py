"""A host that crashes, freezes, is cut off or rejects us, in the middle of everything that can be asked of it.

For each fault, tasks are started on one host, the fault begins, and every question is asked at once, each in a thread
of its own. Then the fault ends, and nothing may be lost or doubled. Each host has a fault of its own at the same time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flow_core import config, providers
from flow_core.engine import Engine
from flow_core.errors import ProviderUnavailable
from flow_core.ids import TaskId, random_key
from flow_core.models import Snapshot, TaskConfig, TaskSpec, TaskStatus
from flow_core.providers.spi import Provider
from tests.infra import notice
from tests.infra.lab import until
from tests.infra.ssh import Client, Machine, Machines

PATIENCE_S = 120.0
HOME = "/home/ada"


@dataclass(frozen=True)
class Fault:
    """What happens to a machine, how it ends, and whether the processes there live on."""

    begin: Callable[[Machine], None]
    end: Callable[[Machine], None]
    survived: bool = True


def lose_power(machine: Machine) -> None:
    machine.cut()
    machine.crash()


def come_back(machine: Machine) -> None:
    machine.boot()
    machine.heal()


FAULTS = {
    "crash": Fault(Machine.crash, Machine.boot, survived=False),
    "power loss": Fault(lose_power, come_back, survived=False),
    "freeze": Fault(Machine.freeze, Machine.thaw),
    "cut": Fault(Machine.cut, Machine.heal),
    "reject": Fault(Machine.reject, Machine.clear),
}


@dataclass
class Asked:
    """What became of a question."""

    seconds: float
    value: Any = None
    error: Exception | None = None


def spec(shell: str, **fields: Any) -> TaskSpec:
    return TaskSpec.from_config(TaskConfig(shell=shell, instance_type="cpu", **fields))


def new_id() -> str:
    return str(TaskId.first("fault", random_key()))


@dataclass
class Trial:
    """One fault, and what was seen of it."""

    name: str
    fault: Fault
    machine: Machine
    provider: Provider
    running: str = field(default_factory=new_id)
    unwanted: str = field(default_factory=new_id)
    fresh: str = field(default_factory=new_id)
    asked: dict[str, Asked] = field(default_factory=dict)
    waited: Asked | None = None

    def counted(self, task_id: str, then: str) -> TaskSpec:
        """A task that leaves a line per start on the host's disk, outside its own folder."""
        return spec(f"echo start >> {HOME}/starts-{task_id}; {then}")

    def starts(self, task_id: str) -> int:
        return self.machine.read(f"{HOME}/starts-{task_id}").count("start")

    def run(self) -> None:
        """Start tasks, let the fault begin, ask everything, let it end."""
        go = f"n=0; until test -e {HOME}/go-{self.running}; do n=$((n+1)); echo $n; sleep 0.1; done"
        self.provider.submit(self.counted(self.running, go), task_id=self.running)
        self.provider.submit(self.counted(self.unwanted, "echo ready; sleep 1000"), task_id=self.unwanted)
        for task_id in (self.running, self.unwanted):
            until(lambda one=task_id: self.provider.read_log(one).data != b"", "tasks that run")  # type: ignore[misc]
        waiter = threading.Thread(target=self._wait)
        waiter.start()
        self.fault.begin(self.machine)
        threads = [
            threading.Thread(target=self._ask, args=(what, question))
            for what, question in self.questions().items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in threads), (
            f"no answer after {PATIENCE_S:g} s: {self.asked}"
        )
        self.fault.end(self.machine)
        self.machine.run(f"touch {HOME}/go-{self.running}")
        waiter.join(PATIENCE_S)
        assert not waiter.is_alive(), "the wait does not end"

    def questions(self) -> dict[str, Callable[[], Any]]:
        return {
            "submit": lambda: self.provider.submit(self.counted(self.fresh, "echo done"), task_id=self.fresh),
            "poll": lambda: self.provider.poll([self.running])[self.running],
            "read_log": lambda: self.provider.read_log(self.running),
            "cancel": lambda: self.provider.cancel([self.unwanted]),
        }

    def _ask(self, what: str, question: Callable[[], Any]) -> None:
        begin = time.monotonic()
        try:
            value = question()
            self.asked[what] = Asked(time.monotonic() - begin, value=value)
        except Exception as error:
            self.asked[what] = Asked(time.monotonic() - begin, error=error)
        seen = self.asked[what]
        notice.record("ssh", self.name, what, seen.seconds, type(seen.error or seen.value).__name__)

    def _wait(self) -> None:
        begin = time.monotonic()
        try:
            value = Engine(self.provider).wait([self.running], timeout=PATIENCE_S)[self.running]
            self.waited = Asked(time.monotonic() - begin, value=value)
        except Exception as error:
            self.waited = Asked(time.monotonic() - begin, error=error)

    def end(self, task_id: str) -> Snapshot:
        return Engine(self.provider).wait([task_id], timeout=PATIENCE_S)[task_id]

    def output(self, task_id: str) -> str:
        data, offset = b"", 0
        while True:
            chunk = self.provider.read_log(task_id, offset=offset)
            data, offset = data + chunk.data, chunk.next_offset
            if chunk.end:
                return data.decode()


#: What happens at once, and where: most of a fault is waiting. What survives a fault must not meet the next one.
ROUNDS = ({"h1": "power loss", "h2": "freeze", "h3": "cut"}, {"h1": "crash", "h3": "reject"})


@pytest.fixture(scope="class")
def trials(
    _machines: Machines, _client: Client, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Trial]]:
    folder = tmp_path_factory.mktemp("fault")
    trials: dict[str, Trial] = {}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        for name, value in settings(_client, folder).items():
            patch.setenv(name, value)
        try:
            for faults in ROUNDS:
                now = []
                for host, name in faults.items():
                    provider = providers.load(config.load(ssh={"hosts": [host]}))
                    now.append(Trial(name, FAULTS[name], _machines[host], provider))
                trials |= {trial.name: trial for trial in now}
                list(pool.map(Trial.run, now))
            yield trials
        finally:
            _machines.tidy()


@pytest.fixture(params=list(FAULTS))
def trial(request: pytest.FixtureRequest, trials: dict[str, Trial]) -> Trial:
    return trials[request.param]


def settings(client: Client, folder: Path) -> dict[str, str]:
    return {
        "HOME": str(client.home),
        "FLOW_CONFIG": str(empty(folder / "config.yaml")),
        "FLOW_PROVIDER": "ssh",
        "FLOW_SSH_HOME": f"{HOME}/{folder.name}",
        "FLOW_SSH_NOTES": str(folder / "notes"),
        "FLOW_SSH_KILL_GRACE_S": "1",
    }


def empty(path: Path) -> Path:
    path.write_text("{}")
    return path


class TestOneHost:
    @pytest.mark.parametrize("what", ["submit", "read_log", "cancel"])
    def test_what_cannot_be_done_is_an_error_that_names_the_host_and_asks_for_patience(
        self, trial: Trial, what: str
    ) -> None:
        error = trial.asked[what].error
        assert isinstance(error, ProviderUnavailable), trial.asked[what]
        assert trial.machine.name in str(error)

    def test_a_host_that_is_silent_is_not_taken_for_the_end_of_a_task(self, trial: Trial) -> None:
        seen = trial.asked["poll"]
        if seen.error is not None:
            assert isinstance(seen.error, ProviderUnavailable), seen
        else:
            assert not seen.value.status.final, seen

    def test_what_was_running_ends_as_what_it_is_and_was_started_once(self, trial: Trial) -> None:
        seen = trial.end(trial.running)
        if trial.fault.survived:
            assert (seen.status, seen.exit_code) == (TaskStatus.COMPLETED, 0)
        else:
            assert (seen.status.succeeded, seen.reason) == (False, "reboot")
        assert trial.starts(trial.running) == 1

    def test_those_who_wait_hear_of_the_end(self, trial: Trial) -> None:
        assert trial.waited is not None and trial.waited.error is None, trial.waited
        assert trial.waited.value.status == trial.end(trial.running).status

    def test_the_log_is_whole(self, trial: Trial) -> None:
        lines = trial.output(trial.running).splitlines()
        assert len(lines) > 0 and lines == [str(number) for number in range(1, len(lines) + 1)]

    def test_submitting_again_starts_the_work_once(self, trial: Trial) -> None:
        for _ in range(2):
            trial.provider.submit(trial.counted(trial.fresh, "echo done"), task_id=trial.fresh)
        assert trial.end(trial.fresh).status is TaskStatus.COMPLETED
        assert (trial.output(trial.fresh), trial.starts(trial.fresh)) == ("done\n", 1)

    def test_cancelling_again_ends_what_lived_on(self, trial: Trial) -> None:
        trial.provider.cancel([trial.unwanted])
        seen = trial.end(trial.unwanted)
        if trial.fault.survived:
            assert (seen.status, seen.reason) == (TaskStatus.CANCELLED, "cancelled")
        else:
            assert seen.reason in ("reboot", "cancelled")  # both are true of it
        assert trial.starts(trial.unwanted) == 1
        assert trial.machine.run(f"pgrep -f '[s]tarts-{trial.unwanted}' || true") == ""
