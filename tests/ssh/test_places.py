"""Which host a task goes to, that it is on no other one, and what is said while its host cannot be asked."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow, Task, TaskStatus
from flow_core.errors import ConfigError, ProviderUnavailable, SpecRejected
from flow_core.models import TaskConfig, TaskSpec
from flow_core.providers.ssh import SSHProvider
from flow_core.providers.ssh_places import choose
from flow_core.providers.transport import AgentClient
from tests.infra.lab import until
from tests.infra.ssh import Machine, Machines
from tests.ssh.conftest import MakeFlow

QUICK = {"connect_timeout_s": 2}


def running(flow: Flow, command: str = "sleep 1000", **fields: object) -> Task:
    task = flow.run(f"echo ready; {command}", upload_code=False, **fields)  # type: ignore[arg-type]
    until(lambda: "ready" in task.logs(), f"{task}")
    return task


@pytest.fixture
def here(ssh_machines: Machines, flow_on: MakeFlow) -> Flow:
    return flow_on("h1", "h2", "h3", **QUICK)


# -- choosing


def test_gpu_tasks_go_where_a_gpu_is_free(here: Flow) -> None:
    tasks = [running(here, gpu="a100") for _ in range(6)]
    assert Counter(task.host for task in tasks) == {"h1": 2, "h2": 2, "h3": 2}
    last = here.run("true", gpu="a100", upload_code=False)
    waiting = f"waiting for its turn on host {last.host}"
    until(lambda: last.message == waiting, "a task in the queue")
    next(task for task in tasks if task.host == last.host).cancel()
    last.wait(30)
    assert last.status is TaskStatus.COMPLETED


def test_tasks_without_gpus_are_spread(here: Flow) -> None:
    tasks = [running(here) for _ in range(6)]
    assert Counter(task.host for task in tasks) == {"h1": 2, "h2": 2, "h3": 2}


def test_between_hosts_that_are_equally_full_chance_decides(here: Flow) -> None:
    spec = TaskSpec.from_config(TaskConfig(command="true", instance_type="a100"))
    provider = here.provider
    assert isinstance(provider, SSHProvider)
    assert {choose(spec, provider.hosts, {}).popitem()[0].name for _ in range(60)} == {"h1", "h2", "h3"}


def test_a_region_is_a_host(here: Flow) -> None:
    task = here.run("hostname", region="h2", upload_code=False)
    task.wait(30)
    assert (task.logs(), task.region, task.ssh_host) == ("h2\n", "h2", "198.51.100.12")
    with pytest.raises(SpecRejected, match="region='h9' is not the host h1"):
        here.run("true", region="h9", upload_code=False)


def test_gpus_that_no_host_has_are_rejected_with_what_there_is(here: Flow) -> None:
    with pytest.raises(SpecRejected, match="instance_type '4xa100' asks for 4 GPUs, and host h1 has 2"):
        here.run("true", gpu="4xa100", upload_code=False)
    with pytest.raises(SpecRejected, match="instance_type 't4' is not what host h1 has: a100"):
        here.run("true", gpu="t4", upload_code=False)
    with pytest.raises(SpecRejected, match="no volumes"):
        here.run("true", volumes=[{"name": "v"}], upload_code=False)


def test_what_can_be_had_is_shown_host_by_host(here: Flow, ssh_machines: Machines) -> None:
    running(here, gpu="a100", region="h1")
    found = {(one.region, one.instance_type): one.available for one in here.find_instances(limit=100)}
    assert found["h1", "1xa100"] == 1 and found["h1", "2xa100"] == 0 and found["h2", "2xa100"] == 1
    ssh_machines["h2"].crash()
    found = {(one.region, one.instance_type): one.available for one in here.find_instances(limit=100)}
    assert found["h2", "2xa100"] == 0 and found["h3", "2xa100"] == 1


def test_settings_without_hosts_or_with_one_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match="FLOW_SSH_HOSTS"):
        Flow("ssh", ssh={"hosts": []})
    with pytest.raises(ConfigError, match="names h1 twice"):
        Flow("ssh", ssh={"hosts": ["h1", "ada@h1"]})


# -- once


_RACER = """
import sys
from flow_core import Flow
flow = Flow("ssh", ssh={"hosts": sys.argv[3].split(","), "home": sys.argv[1], "notes": sys.argv[2]})
task = flow.run(sys.argv[4], idempotency_key=sys.argv[5], gpu=sys.argv[6], upload_code=False)
print(task.task_id, task.host)
"""


def submitters(tmp_path: Path, count: int, command: str, key: str = "", gpu: str = "cpu") -> list[str]:
    """Submit from several processes at once, each of which stands for a machine of its own; return what they print."""
    orders = ["h1,h2,h3", "h3,h2,h1", "h2,h3,h1"]
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", _RACER, f"~/{tmp_path.name}", str(tmp_path / f"notes-{number}")),
                *(orders[number % 3], command, key or f"key-{number}", gpu),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    return [process.communicate(timeout=120)[0].strip() for process in started]


def test_submitters_that_race_on_machines_of_their_own_start_one_task(
    here: Flow, ssh_machines: Machines, tmp_path: Path
) -> None:
    for round_ in range(3):
        said = submitters(tmp_path, 6, f"echo start >> ~/race-{round_}", key=f"race-{round_}")
        assert len(set(said)) == 1, said
        task = here.find(f"race-{round_}")
        assert task is not None
        task.wait(30)
        time.sleep(0.1)
        starts = [
            machine.run(f"cat ~/race-{round_} 2>/dev/null || true") for machine in ssh_machines.values()
        ]
        assert "".join(starts) == "start\n"


def test_two_submitters_never_give_a_gpu_to_two_tasks(
    here: Flow, ssh_machines: Machines, tmp_path: Path
) -> None:
    # Nobody lets go of a GPU before all have submitted, so there are more who want one than there are.
    use = "mkdir ~/gpu-$CUDA_VISIBLE_DEVICES && until test -e ~/go; do sleep 0.1; done"
    use += " && sleep 0.2 && rmdir ~/gpu-$CUDA_VISIBLE_DEVICES"
    ids = [line.split()[0] for line in submitters(tmp_path, 12, use, gpu="a100")]
    for machine in ssh_machines.values():
        machine.run("touch ~/go")
    seen = here.wait(ids, timeout=120)
    assert {one.status for one in seen.values()} == {TaskStatus.COMPLETED}


# -- a host that is away


def away(machine: Machine) -> None:
    machine.cut()


@pytest.mark.parametrize("lose", [Machine.crash, away], ids=["crash", "cut"])
def test_a_host_that_is_down_is_passed_over_and_said_so(
    here: Flow, ssh_machines: Machines, lose: Callable[[Machine], None], caplog: pytest.LogCaptureFixture
) -> None:
    lose(ssh_machines["h1"])
    with caplog.at_level(logging.WARNING, logger="flow_core.ssh"):
        tasks = [here.run("hostname", upload_code=False) for _ in range(4)]
        for task in tasks:
            task.wait(30)
    assert {task.logs() for task in tasks} == {"h2\n", "h3\n"}
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(told) == 1 and "host h1 is not reachable since" in told[0]


def test_a_task_on_a_host_that_is_away_is_neither_lost_nor_started_elsewhere(
    here: Flow, ssh_machines: Machines, flow_on: MakeFlow, tmp_path: Path
) -> None:
    task = here.run("echo start >> ~/away; sleep 2; hostname", idempotency_key="k", upload_code=False)
    until(lambda: task.is_running, "the start")
    machine = ssh_machines[str(task.host)]
    machine.cut()
    until(lambda: task.snapshot.reason == "unreachable", "the outage", within_s=60)
    assert task.status is TaskStatus.RUNNING
    assert f"host {machine.name}, not reachable since" in str(task.message)

    mine = flow_on("h1", "h2", "h3", **QUICK)
    other = flow_on("h1", "h2", "h3", notes=tmp_path / "notes-of-another-machine", **QUICK)
    for one in (mine, other):
        found = one.find("k")
        assert found is not None and found.task_id == task.task_id
        assert not found.status.final and f"host {machine.name}, not reachable since" in str(found.message)

    assert mine.run("hostname", idempotency_key="k", upload_code=False).task_id == task.task_id
    with pytest.raises(
        ProviderUnavailable, match=f"was placed on host {machine.name}, not reachable"
    ) as caught:
        other.run("hostname", idempotency_key="k", upload_code=False)
    assert "take the host out of ssh.hosts" in str(caught.value)
    with pytest.raises(ProviderUnavailable, match=machine.name):
        task.cancel()

    machine.heal()
    task.wait(60)
    assert (task.status, task.logs()) == (TaskStatus.COMPLETED, f"{machine.name}\n")
    starts = [one.run("cat ~/away 2>/dev/null || true") for one in ssh_machines.values()]
    assert "".join(starts) == "start\n"


def test_a_host_that_is_taken_out_of_the_settings_takes_its_tasks_along(
    here: Flow, ssh_machines: Machines, flow_on: MakeFlow
) -> None:
    task = running(here, idempotency_key="gone")
    ssh_machines[str(task.host)].crash()
    rest = flow_on(*(name for name in ("h1", "h2", "h3") if name != task.host), **QUICK)
    seen = rest.poll([task.task_id])[task.task_id]
    assert (seen.status, seen.message) == (
        TaskStatus.LOST,
        f"it was placed on host {task.host}, which is not among ssh.hosts any more",
    )
    again = rest.run("hostname", idempotency_key="gone", upload_code=False)
    assert again.task_id.endswith("-2")
    again.wait(30)
    assert again.status is TaskStatus.COMPLETED


def test_the_tasks_of_a_rebooted_host_are_lost_once_it_is_back(here: Flow, ssh_machines: Machines) -> None:
    task = running(here)
    machine = ssh_machines[str(task.host)]
    machine.crash()
    until(lambda: task.snapshot.reason == "unreachable", "the outage")
    assert not task.status.final
    machine.boot()
    task.wait(60)
    assert (task.status, task.snapshot.reason) == (TaskStatus.FAILED, "reboot")


def test_the_next_attempt_waits_where_the_one_before_still_ends(here: Flow) -> None:
    first = running(
        here, "trap 'sleep 1; exit 1' TERM; while :; do sleep 0.05; done", idempotency_key="again"
    )
    first.cancel()
    second = here.run("hostname", idempotency_key="again", upload_code=False)
    assert second.task_id != first.task_id
    assert second.host == first.host
    second.wait(30)
    assert first.status is TaskStatus.CANCELLED and second.status is TaskStatus.COMPLETED


def test_a_dead_host_does_not_hold_up_the_answers_of_the_others(here: Flow, ssh_machines: Machines) -> None:
    tasks = [running(here, region=name) for name in ("h1", "h2", "h3")]
    ssh_machines["h1"].freeze()
    until(lambda: tasks[0].snapshot.reason == "unreachable", "the outage", within_s=60)
    begin = time.monotonic()
    for _ in range(10):
        seen = here.poll([task.task_id for task in tasks])
        assert [seen[task.task_id].status for task in tasks[1:]] == [TaskStatus.RUNNING] * 2
    assert time.monotonic() - begin < 10 * 2.0, "each poll waits for the dead one"
    ssh_machines["h1"].thaw()
    until(lambda: tasks[0].snapshot.reason == "", "its return", within_s=60)


def test_without_any_host_everything_says_why(here: Flow, ssh_machines: Machines) -> None:
    for machine in ssh_machines.values():
        machine.crash()
    for ask in (lambda: here.run("true", upload_code=False), here.list_tasks, here.find_instances):
        with pytest.raises(ProviderUnavailable, match=r"no host can be reached: .*h1.*h2.*h3"):
            ask()


# -- what travels


def test_code_travels_once_per_content_and_host(
    flow_on: MakeFlow, ssh_machines: Machines, tmp_path: Path
) -> None:
    flow = flow_on("h1")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "big").write_bytes(os.urandom(3_000_000))
    tasks = [flow.run("sha1sum big", code_root=tree) for _ in range(3)]
    for task in tasks:
        task.wait(30)
    assert len({task.logs() for task in tasks}) == 1 and len(tasks[0].logs()) > 40
    listing = ssh_machines["h1"].run(
        f"cd ~/{tmp_path.name}/h1; ls blobs | grep -vc parts; stat -c %h blobs/*[!s] tasks/*/1/code.tar.gz"
    )
    assert listing.split() == ["1", "4", "4", "4", "4"], "one blob, and hard links to it"


def test_of_a_changed_tree_only_the_changes_travel(
    flow_on: MakeFlow, ssh_machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = flow_on("h1")
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(100):
        (tree / f"module_{number}").write_bytes(os.urandom(30_000))
    total = "cat module_* | sha1sum"
    flow.run(total, code_root=tree).wait(30)
    (tree / "module_50").write_bytes(os.urandom(30_000))
    sent: list[int] = []
    call = AgentClient.call

    def counted(self: AgentClient, verb: str, *args: Any, data: bytes = b"", **more: Any) -> Any:
        sent.append(len(data))
        return call(self, verb, *args, data=data, **more)

    with monkeypatch.context() as patch:
        patch.setattr(AgentClient, "call", counted)
        task = flow.run(total, code_root=tree)
    task.wait(30)
    whole = b"".join((tree / name).read_bytes() for name in sorted(os.listdir(tree)))
    assert task.logs() == f"{hashlib.sha1(whole).hexdigest()}  -\n"
    assert 30_000 < sum(sent) < 1_500_000, "of 3 MB"

    # A task may change what it was given, which is the same file as the blob: then all of it is sent again.
    ssh_machines["h1"].run(f"for b in ~/{tmp_path.name}/h1/blobs/*; do echo harm >> $b; done")
    (tree / "module_51").write_bytes(os.urandom(30_000))
    task = flow.run(total, code_root=tree)
    task.wait(30)
    whole = b"".join((tree / name).read_bytes() for name in sorted(os.listdir(tree)))
    assert task.logs() == f"{hashlib.sha1(whole).hexdigest()}  -\n"


def test_a_large_file_comes_back_whole(flow_on: MakeFlow, ssh_machines: Machines, tmp_path: Path) -> None:
    flow = flow_on("h1")
    task = flow.run('head -c 20000000 /dev/urandom > "$FLOW_TASK_DIR/big"; sha1sum < "$FLOW_TASK_DIR/big"')
    task.wait(30)
    flow.provider.fetch(task.task_id, "big", tmp_path / "big")
    assert f"{hashlib.sha1((tmp_path / 'big').read_bytes()).hexdigest()}  -\n" == task.logs()
