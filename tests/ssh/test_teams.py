"""One task on several machines: they find each other, start together and end together, with nobody else alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flow_core import Flow, Task, TaskStatus
from flow_core.errors import ProviderUnavailable, SpecRejected
from flow_core.providers import ssh
from flow_core.providers.ssh_hosts import Host
from tests.infra.lab import until
from tests.infra.ssh import Machine, Machines

SHOW = 'echo "$FLOW_NODE_RANK/$FLOW_NUM_NODES $RANK/$WORLD_SIZE $FLOW_MAIN_IP=$MASTER_ADDR:$MASTER_PORT $(hostname)"'


def running(flow: Flow, command: str, **fields: object) -> Task:
    """Start a task and wait until every node of it has printed something."""
    task = flow.run(f"echo ready; {command}", upload_code=False, **fields)  # type: ignore[arg-type]
    for node in range(task.num_instances):
        until(lambda node=node: "ready" in task.logs(node=node), f"node {node} of {task}")  # type: ignore[misc]
    return task


def test_each_node_has_a_machine_of_its_own_and_knows_the_others(three: Flow) -> None:
    task = three.run(SHOW, num_instances=3, upload_code=False)
    task.wait(60)
    assert task.status is TaskStatus.COMPLETED, task.message
    lines = [task.logs(node=node).split() for node in range(3)]
    assert [line[:2] for line in lines] == [[f"{rank}/3", f"{rank}/3"] for rank in range(3)]
    assert len({line[2] for line in lines}) == 1
    assert sorted(line[3] for line in lines) == ["h1", "h2", "h3"]
    assert [line[3] for line in lines] == task.instances


def test_the_nodes_can_talk_at_the_main_address(three: Flow) -> None:
    meet = """
import os, socket
at = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    with socket.create_server(("", at[1])) as door:
        for _ in range(2):
            print(door.accept()[0].recv(9).decode())
else:
    while True:
        try:
            with socket.create_connection(at) as to: to.sendall(b"hello")
            break
        except ConnectionRefusedError: pass
"""
    task = three.run(["python3", "-c", meet], num_instances=3, upload_code=False)
    task.wait(60)
    assert (task.status, task.logs()) == (TaskStatus.COMPLETED, "hello\nhello\n")


def test_more_nodes_than_hosts_share_them_evenly(three: Flow) -> None:
    task = three.run("hostname", num_instances=6, upload_code=False)
    task.wait(60)
    assert sorted(task.instances) == ["h1", "h1", "h2", "h2", "h3", "h3"]
    assert [task.logs(node=node).strip() for node in range(6)] == task.instances


def test_more_than_all_hosts_have_is_rejected(three: Flow) -> None:
    with pytest.raises(SpecRejected, match="num_instances=4 with '2xa100' each is more than the hosts have"):
        three.run("true", gpu="2xa100", num_instances=4, upload_code=False)


def test_a_failed_node_ends_the_others_and_tells_how(three: Flow) -> None:
    # It may fail before the others have printed anything.
    task = three.run('test "$RANK" = 1 && exit 5; sleep 1000', num_instances=3, upload_code=False)
    task.wait(60)
    host = task.instances[1]
    assert (task.status, task.snapshot.exit_code, task.snapshot.reason) == (TaskStatus.FAILED, 5, "exit")
    assert task.message == f"host {host}, node 1 of 3: exit code 5"


def test_a_cancel_ends_all_nodes(three: Flow, ssh_machines: Machines) -> None:
    task = running(three, "sleep 1234", num_instances=3)
    task.cancel()
    task.wait(60)
    assert (task.status, task.snapshot.reason) == (TaskStatus.CANCELLED, "cancelled")
    assert all(machine.run("pgrep -x sleep || true") == "" for machine in ssh_machines.values())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("lose", [Machine.crash, Machine.cut], ids=["crash", "cut"])
def test_a_lost_machine_ends_the_nodes_on_the_others(
    three: Flow, ssh_machines: Machines, lose: Callable[[Machine], None], rank: int
) -> None:
    task = running(three, "sleep 1234", num_instances=3)
    until(lambda: task.is_running, "the start")
    victim = ssh_machines[task.instances[rank]]
    lose(victim)
    others = [machine for machine in ssh_machines.values() if machine is not victim]
    until(
        lambda: all(machine.run("pgrep -x sleep || true") == "" for machine in others),
        "the end of the other nodes",
        within_s=60,
    )
    if rank == 0:
        task.refresh()
        assert task.status is TaskStatus.RUNNING, "how it ended is the first machine's word"
        victim.boot()
        victim.heal()
    task.wait(90)
    assert task.status is TaskStatus.FAILED
    assert task.snapshot.reason in ("node-failed", "reboot")


def test_a_team_waits_for_the_gpus_of_all_its_machines_and_starts_at_once(three: Flow) -> None:
    holders = [running(three, "sleep 1000", gpu="2xa100", region=name) for name in ("h1", "h2", "h3")]
    team = three.run(SHOW, gpu="a100", num_instances=3, upload_code=False)
    for holder in holders:
        assert team.status is TaskStatus.PENDING
        assert team.logs() == ""
        holder.cancel()
    team.wait(60)
    assert (team.status, len(team.snapshot.gpus)) == (TaskStatus.COMPLETED, 3)


def test_teams_that_want_the_same_gpus_do_not_wait_for_each_other_for_ever(three: Flow) -> None:
    teams = [
        three.run("sleep 0.1", gpu="2xa100", num_instances=nodes, upload_code=False) for nodes in (3, 2, 3, 2)
    ]
    for team in teams:
        team.wait(90)
        assert team.status is TaskStatus.COMPLETED, team.message


def test_a_cancel_in_the_queue_ends_the_team_and_frees_what_it_had(three: Flow) -> None:
    holder = running(three, "sleep 1000", gpu="2xa100", region="h3")
    team = three.run("true", gpu="2xa100", num_instances=3, upload_code=False)
    until(lambda: "queued" in team.snapshot.reason, "the team in the queue")
    team.cancel()
    team.wait(60)
    assert (team.status, team.snapshot.reason) == (TaskStatus.CANCELLED, "cancelled")
    holder.cancel()
    after = three.run("true", gpu="2xa100", num_instances=3, upload_code=False)
    after.wait(60)
    assert after.status is TaskStatus.COMPLETED


def test_a_submit_that_died_between_two_machines_is_finished_by_the_next(
    three: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ssh.SSHProvider._start
    begun: list[str] = []

    def dying(
        self: ssh.SSHProvider, spec: Any, task_id: str, placement: Any, host: Host, *, leader: Host
    ) -> None:
        if begun:
            raise ProviderUnavailable("killed here")
        begun.append(host.name)
        start(self, spec, task_id, placement, host, leader=leader)

    with monkeypatch.context() as patch:
        patch.setattr(ssh.SSHProvider, "_start", dying)
        with pytest.raises(ProviderUnavailable, match="killed here"):
            three.run(SHOW, num_instances=3, upload_code=False, idempotency_key="half")
    task = three.run(SHOW, num_instances=3, upload_code=False, idempotency_key="half")
    task.wait(60)
    assert task.status is TaskStatus.COMPLETED
    assert task.task_id.endswith("-1")
    assert task.instances[0] == begun[0]
