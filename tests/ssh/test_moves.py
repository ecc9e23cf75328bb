"""A task that waits for a GPU goes to a host that has one, and starts once, whoever dies on the way."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow, Task, TaskStatus
from flow_core.errors import FlowError, ProviderUnavailable
from flow_core.providers.ssh_moves import plan
from flow_core.providers.transport import AgentClient
from tests.infra.lab import until
from tests.infra.ssh import Machines
from tests.ssh.conftest import MakeFlow

QUICK = {"connect_timeout_s": 2}
PATIENCE_S = 120.0


@dataclass
class Pair:
    """Two hosts, all of whose GPUs are held; a task waits on `old` and could be on `new`."""

    flow: Flow
    machines: Machines
    holders: dict[str, Task]
    make: MakeFlow
    tmp_path: Path

    def submit(self, name: str = "once", then: str = "hostname", **fields: Any) -> Task:
        """Submit a task that leaves a line per start on its host, outside its own folder."""
        fields = {"gpu": "a100", "upload_code": False, **fields}
        task = self.flow.run(f"echo start >> ~/{self.tmp_path.name}-{name}; {then}", **fields)
        until(lambda: "waiting for its turn" in str(task.message), f"{task} in a queue")
        return task

    def other(self, task: Task) -> str:
        return "h2" if task.host == "h1" else "h1"

    def free(self, *hosts: str) -> None:
        """End what holds the GPUs of hosts, without any client."""
        for host in hosts:
            self.machines[host].run(f"touch ~/{self.tmp_path.name}-go-{host}")

    def starts(self, name: str = "once") -> str:
        said = [
            machine.run(f"cat ~/{self.tmp_path.name}-{name} 2>/dev/null || true")
            for machine in self.machines.values()
        ]
        return "".join(said)

    def someone(self, name: str, *hosts: str) -> Flow:
        """A user on another machine: with notes of its own."""
        return self.make(*(hosts or ("h1", "h2")), notes=self.tmp_path / f"notes-of-{name}", **QUICK)

    def on(self, flow: Flow, task: Task) -> Task:
        """The same task, as somebody else sees it."""
        return flow.get_task(task.task_id)


@pytest.fixture
def pair(ssh_machines: Machines, flow_on: MakeFlow, tmp_path: Path) -> Pair:
    flow = flow_on("h1", "h2", **QUICK)
    hold = "echo ready; until test -e ~/{}; do sleep 0.05; done"
    holders = {}
    for host in ("h1", "h2"):
        command = hold.format(f"{tmp_path.name}-go-{host}")
        holders[host] = flow.run(command, gpu="2xa100", region=host, upload_code=False)
    for task in holders.values():
        until(lambda task=task: "ready" in task.logs(), f"{task}")  # type: ignore[misc]
    return Pair(flow, ssh_machines, holders, flow_on, tmp_path)


@contextlib.contextmanager
def at(verb: str, act: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Have the first request for a verb go through `act`, which is given what sends it."""
    original = AgentClient.call
    left = [True]

    def call(self: AgentClient, asked: str, *args: Any, **more: Any) -> Any:
        def send() -> Any:
            return original(self, asked, *args, **more)

        if asked == verb and left:
            left.clear()
            return act(send)
        return send()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgentClient, "call", call)
        yield


# -- moving


def test_a_task_that_waits_moves_to_a_host_that_has_become_free(pair: Pair) -> None:
    task = pair.submit()
    old, new = str(task.host), pair.other(task)
    assert task.message == f"waiting for its turn on host {old}"
    pair.free(new)
    task.wait(PATIENCE_S)
    assert (task.status, task.host, task.region) == (TaskStatus.COMPLETED, new, new)
    assert (task.logs(), pair.starts()) == (f"{new}\n", "start\n")
    assert task.ssh_host == pair.machines[new].address


def test_what_waited_longest_moves_first_and_the_rest_waits(pair: Pair) -> None:
    three = pair.make("h1", "h2", "h3", notes=pair.tmp_path / "three", **QUICK)
    full = three.run("sleep 1000", gpu="2xa100", region="h3", upload_code=False)
    until(lambda: full.is_running, "a full host")
    tasks = [three.run("sleep 1000", gpu="2xa100", upload_code=False) for _ in range(3)]
    until(lambda: all("waiting" in str(task.message) for task in tasks), "tasks in queues")
    assert {task.host for task in tasks} == {"h1", "h2", "h3"}
    next(task for task in tasks if task.host == "h3").cancel()
    first, second = (task for task in tasks if task.host != "h3")
    full.cancel()
    waiter = threading.Thread(target=lambda: three.wait([first.task_id, second.task_id], any_of=True))
    waiter.start()
    until(lambda: first.is_running, "the first", within_s=PATIENCE_S)
    assert first.host == "h3"
    assert second.status is TaskStatus.PENDING
    three.cancel([first.task_id, second.task_id])
    waiter.join(PATIENCE_S)


def test_a_function_call_moves_with_its_arguments_and_its_code(pair: Pair, tmp_path: Path) -> None:
    module = tmp_path / "tree" / "work.py"
    module.parent.mkdir()
    (module.parent / "big").write_bytes(os.urandom(400_000))
    module.write_text("import os\ndef f(a):\n    return [a, os.path.getsize('big'), os.uname().nodename]\n")
    call = pair.flow.invoke_async(module, "f", ["x" * 100_000], gpu="a100", code_root=module.parent)
    seen = pair.flow.get_task(call.task_id)
    until(lambda: "waiting" in str(seen.message), "a task in a queue")
    new = pair.other(seen)
    pair.free(new)
    assert call.get_result(PATIENCE_S) == ["x" * 100_000, 400_000, new]


@pytest.mark.parametrize("fields", [{"region": "h1"}, {"num_instances": 2, "gpu": "2xa100"}], ids=str)
def test_a_task_that_was_sent_to_a_host_or_needs_several_stays(pair: Pair, fields: dict[str, Any]) -> None:
    task = pair.submit("stays", **fields)
    assert str(task.message).endswith("where it stays")
    folder = pair.machines[str(task.host)].run(f"ls ~/{pair.tmp_path.name}/*/tasks/*/1")
    assert "here" not in folder.split()
    task.cancel()


def test_a_host_that_the_submitter_does_not_know_gets_nothing(pair: Pair) -> None:
    narrow = pair.make("h1", "h3", notes=pair.tmp_path / "narrow", **QUICK)
    full = narrow.run("sleep 1000", gpu="2xa100", region="h3", upload_code=False)
    until(lambda: full.is_running, "a full host")
    task = narrow.run("hostname", gpu="a100", upload_code=False)
    until(lambda: "waiting" in str(task.message), "a task in a queue")
    own = pair.submit()
    pair.free("h2")
    own.wait(PATIENCE_S)  # whoever watches has seen that h2 is free
    assert own.host == "h2"
    time.sleep(3)
    assert pair.on(pair.someone("wide", "h1", "h2", "h3"), task).host in ("h1", "h3")
    task.cancel()


def test_while_nothing_waits_nobody_asks_for_free_gpus(pair: Pair) -> None:
    asked: list[str] = []
    original = AgentClient.call

    def call(self: AgentClient, verb: str, *args: Any, **more: Any) -> Any:
        asked.append(verb)
        return original(self, verb, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgentClient, "call", call)
        begun = time.monotonic()
        polls = 0
        while time.monotonic() - begun < 2.5:
            pair.flow.poll([pair.holders["h1"].task_id])
            polls += 1
    assert asked == ["watch"] * polls


def test_who_looks_once_moves_nothing(pair: Pair) -> None:
    task = pair.submit()
    pair.free(pair.other(task))
    with at("queue", lambda _send: pytest.fail("one look is no watch")):
        seen = pair.on(pair.someone("a glance"), task)
    assert seen.status is TaskStatus.PENDING


def test_who_has_heard_of_the_old_place_reads_the_log_at_the_new_one(pair: Pair) -> None:
    task = pair.submit()
    stranger = pair.someone("a reader")
    theirs = pair.on(stranger, task)
    assert theirs.host == task.host and theirs.logs() == ""
    new = pair.other(task)
    pair.free(new)
    task.wait(PATIENCE_S)
    assert "".join(stranger.engine.follow(task.task_id)) == f"{new}\n"
    task.release()
    assert pair.on(pair.someone("a third"), task).snapshot.reason == "released"


def test_the_same_key_finds_a_task_that_has_moved(pair: Pair) -> None:
    task = pair.submit(then="trap 'sleep 1; exit 1' TERM; while :; do sleep 0.05; done", idempotency_key="k")
    stranger = pair.someone("a submitter")
    assert stranger.find("k").task_id == task.task_id  # type: ignore[union-attr]
    new = pair.other(task)
    pair.free(new)
    until(lambda: task.is_running, "the start", within_s=PATIENCE_S)
    again = stranger.run("hostname", idempotency_key="k", gpu="a100", upload_code=False)
    assert (again.task_id, again.host) == (task.task_id, new)
    # And the next attempt waits for this one where it is now, whatever was noted before.
    pair.someone("another").cancel([task.task_id])
    second = pair.someone("the next").run("hostname", idempotency_key="k", gpu="a100", upload_code=False)
    assert second.task_id.endswith("-2") and second.host == new
    second.wait(PATIENCE_S)
    assert task.status is TaskStatus.CANCELLED
    assert second.snapshot.started_at >= task.snapshot.ended_at  # type: ignore[operator]
    assert pair.starts() == "start\n"


# -- dying on the way


_WATCHER = """
import os, signal, sys, time
from flow_core import Flow
from flow_core.providers.transport import AgentClient
home, notes, hosts, verb, when, *ids = sys.argv[1:]
flow = Flow("ssh", ssh={"hosts": hosts.split(","), "home": home, "notes": notes, "connect_timeout_s": 2})
ask = AgentClient._ask
def dying(self, pending, asked, data, deadline_s):
    if asked["verb"] == verb and when != "after":
        if when == "sent":
            self._send({"id": pending.number, **asked}, data, time.monotonic() + 5)
        os.kill(os.getpid(), signal.SIGKILL)
    answer = ask(self, pending, asked, data, deadline_s)
    if asked["verb"] == verb:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
AgentClient._ask = dying
print(sorted(seen.hosts[0] for seen in flow.wait(ids).values()))
"""


def watcher(
    pair: Pair, name: str, tasks: list[Task], verb: str = "", when: str = ""
) -> subprocess.Popen[str]:
    """Somebody else who waits for tasks, in a process of its own, killed at a word with an agent."""
    notes = str(pair.tmp_path / f"notes-of-{name}")
    words = [f"~/{pair.tmp_path.name}", notes, "h1,h2", verb, when, *(task.task_id for task in tasks)]
    return subprocess.Popen([sys.executable, "-c", _WATCHER, *words], stdout=subprocess.PIPE, text=True)


STEPS = [
    (verb, when)
    for verb in ("pack", "prepare", "withdraw", "settle", "clear", "put_note")
    for when in ("before", "sent", "after")
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("verb", "when"), STEPS, ids=str)
def test_a_mover_that_is_killed_leaves_a_task_that_starts_once(pair: Pair, verb: str, when: str) -> None:
    task = pair.submit()
    new = pair.other(task)
    mover = watcher(pair, "a mover", [task], verb, when)
    pair.free(new)
    mover.communicate(timeout=PATIENCE_S)
    assert mover.returncode == -9
    pair.free("h1", "h2")  # wherever it starts now, nothing is in its way
    theirs = pair.on(pair.someone("the next one"), task)
    theirs.wait(PATIENCE_S)
    assert theirs.status is TaskStatus.COMPLETED
    assert pair.starts() == "start\n"
    assert theirs.logs() == f"{theirs.host}\n"
    task.wait(PATIENCE_S)
    assert (task.status, task.host) == (theirs.status, theirs.host)
    _nothing_is_left(pair)


def _nothing_is_left(pair: Pair) -> None:
    """Nobody stands in a queue for a task that has ended."""
    busy = "pgrep -f '[c]all.py' || true"
    for machine in pair.machines.values():
        until(lambda m=machine: not m.run(busy), f"idle {machine.name}", within_s=90)  # type: ignore[misc]


@pytest.mark.timeout(300)
def test_watchers_that_race_start_every_task_once(pair: Pair) -> None:
    tasks = [pair.submit(f"race-{number}", "sleep 0.3") for number in range(8)]
    watchers = [watcher(pair, f"racer-{number}", tasks) for number in range(3)]
    pair.free("h2")
    for task in tasks:
        task.wait(PATIENCE_S)
    assert {task.status for task in tasks} == {TaskStatus.COMPLETED}
    assert [pair.starts(f"race-{number}") for number in range(8)] == ["start\n"] * 8
    said = {process.communicate(timeout=PATIENCE_S)[0] for process in watchers}
    assert said == {f"{sorted(str(task.host) for task in tasks)}\n"}


@pytest.mark.timeout(600)
def test_watchers_that_are_killed_at_any_time_start_every_task_once(pair: Pair) -> None:
    chance = random.Random(7)
    use = f"mkdir ~/{pair.tmp_path.name}-gpu-$CUDA_VISIBLE_DEVICES && sleep 0.3"
    use += f" && rmdir ~/{pair.tmp_path.name}-gpu-$CUDA_VISIBLE_DEVICES"
    tasks = [pair.submit(f"storm-{number}", use) for number in range(12)]
    pair.free("h2")
    left = {task.task_id for task in tasks}
    for round_ in itertools.count():
        assert round_ < 60, f"{left} have not ended"
        watchers = [watcher(pair, f"storm-{round_}-{number}", tasks) for number in range(2)]
        for process in watchers:
            time.sleep(chance.uniform(1.0, 3.0))
            process.kill()
            process.communicate()
        if round_ == 3:
            pair.free("h1")
        # A look that moves nothing, and finishes what was left half-way.
        left = {one.task_id for one in pair.flow.poll(left).values() if not one.status.final}
        if not left:
            break
    pair.free("h1")  # it may not have come to that
    seen = pair.someone("the last").poll([task.task_id for task in tasks])
    assert {one.status for one in seen.values()} == {TaskStatus.COMPLETED}
    assert [pair.starts(f"storm-{number}") for number in range(12)] == ["start\n"] * 12
    _nothing_is_left(pair)


@pytest.mark.timeout(300)
def test_a_task_that_gets_its_gpu_while_it_is_moved_starts_once(pair: Pair) -> None:
    """The old host's GPU becomes free between the mover's last look and its decision."""
    for wait_s in (0.0, 0.02, 0.05, 0.1, 0.5):
        name = f"turn-{wait_s}"
        task = pair.submit(name, gpu="2xa100")
        old, new = str(task.host), pair.other(task)

        def free_old(send: Callable[[], Any], old: str = old, wait_s: float = wait_s) -> Any:
            pair.free(old)
            time.sleep(wait_s)
            return send()

        with at("withdraw", free_old):
            pair.free(new)
            task.wait(PATIENCE_S)
        assert (task.status, pair.starts(name)) == (TaskStatus.COMPLETED, "start\n")
        assert task.logs() == f"{task.host}\n"
        for host in ("h1", "h2"):
            pair.machines[host].run(f"rm ~/{pair.tmp_path.name}-go-{host}")
            command = f"echo ready; until test -e ~/{pair.tmp_path.name}-go-{host}; do sleep 0.05; done"
            held = pair.flow.run(command, gpu="2xa100", region=host, upload_code=False)
            until(lambda held=held: "ready" in held.logs(), f"{held}")  # type: ignore[misc]


# -- cancelling on the way


@pytest.mark.parametrize("verb", ["prepare", "withdraw", "settle", "clear"])
def test_a_task_that_is_cancelled_while_it_moves_is_cancelled(pair: Pair, verb: str) -> None:
    task = pair.submit(then="sleep 1000")
    stranger = pair.someone("who cancels")
    pair.on(stranger, task)
    reached, go_on = threading.Event(), threading.Event()

    def pause(send: Callable[[], Any]) -> Any:
        reached.set()
        assert go_on.wait(PATIENCE_S)
        return send()

    with at(verb, pause):
        pair.free(pair.other(task))
        waiter = threading.Thread(target=lambda: task.wait(PATIENCE_S))
        waiter.start()
        assert reached.wait(PATIENCE_S)
        stranger.cancel([task.task_id])
        go_on.set()
        waiter.join(PATIENCE_S)
    assert task.status is TaskStatus.CANCELLED
    assert pair.on(pair.someone("a third"), task).status is TaskStatus.CANCELLED
    assert pair.starts() in (("", "start\n") if verb == "clear" else ("",))


# -- hosts that go away on the way


def test_a_move_goes_on_when_the_old_host_is_cut_off_right_after_it_let_go(pair: Pair) -> None:
    task = pair.submit()
    old, new = str(task.host), pair.other(task)

    def cut(send: Callable[[], Any]) -> Any:
        answer = send()
        pair.machines[old].cut()
        return answer

    with at("withdraw", cut):
        pair.free(new)
        task.wait(PATIENCE_S)
    assert (task.status, task.host, task.logs()) == (TaskStatus.COMPLETED, new, f"{new}\n")
    theirs = pair.on(pair.someone("who comes later"), task)
    assert (theirs.status, theirs.host) == (TaskStatus.COMPLETED, new)
    pair.free(old)
    pair.machines[old].heal()
    until(
        lambda: pair.holders[old].status is TaskStatus.COMPLETED,
        "its return",
        within_s=90,
    )
    assert pair.on(pair.someone("who comes last", old, new), task).host == new
    assert pair.starts() == "start\n"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("decided", [True, False])
def test_a_move_that_nobody_knows_the_outcome_of_is_found_out_when_the_old_host_is_back(
    pair: Pair, decided: bool
) -> None:
    task = pair.submit()
    old, new = str(task.host), pair.other(task)

    def cut(send: Callable[[], Any]) -> Any:
        if decided:
            send()
        pair.machines[old].cut()
        raise ProviderUnavailable("the answer is lost")

    with at("withdraw", cut):
        pair.free(new)
        until(lambda: task.snapshot.reason == "unreachable", "the outage", within_s=PATIENCE_S)
    assert task.status is TaskStatus.PENDING and pair.starts() == ""
    pair.free(old)
    pair.machines[old].heal()
    task.wait(PATIENCE_S)
    assert (task.status, pair.starts()) == (TaskStatus.COMPLETED, "start\n")
    if decided:
        assert task.host == new


def test_a_task_whose_new_host_is_away_says_so_and_starts_there_when_it_is_back(pair: Pair) -> None:
    task = pair.submit()
    old, new = str(task.host), pair.other(task)

    def crash(_send: Callable[[], Any]) -> Any:
        pair.machines[new].crash()
        raise ProviderUnavailable("gone")

    with at("settle", crash):
        pair.free(new)
        until(lambda: task.snapshot.reason == "unreachable", "the outage", within_s=PATIENCE_S)
    assert task.status is TaskStatus.PENDING
    assert f"from host {old} to host {new}" in str(task.message) and "not reachable since" in str(
        task.message
    )
    with pytest.raises(FlowError, match=new):
        task.cancel()
    pair.machines[new].boot()
    task.wait(PATIENCE_S)
    assert (task.status, task.host, pair.starts()) == (TaskStatus.COMPLETED, new, "start\n")


# -- who goes where


@dataclass(frozen=True)
class Named:
    """Stands for a host."""

    id: str


def test_the_plan() -> None:
    def told(free: int, *waiting: tuple[str, int, float]) -> dict[str, Any]:
        return {"free": free, "waiting": [list(one) for one in waiting]}

    def planned(tried: tuple[tuple[str, str], ...] = (), **looks: dict[str, Any]) -> list[tuple[str, str]]:
        found = plan({Named(name): look for name, look in looks.items()}, tried)  # type: ignore[misc]
        return [(one.task_id, target.id) for one, target in found]

    assert planned(a=told(0, ("t", 1, 9)), b=told(1)) == [("t", "b")]
    assert planned(a=told(0, ("t", 2, 9)), b=told(1)) == [], "it does not fit"
    assert planned(a=told(1, ("t", 1, 9)), b=told(1)) == [], "it has its turn where it is"
    assert planned(a=told(1, ("t", 2, 9), ("u", 1, 8)), b=told(1)) == [("u", "b")]
    assert planned(a=told(0, ("t", 1, 9)), b=told(1, ("u", 2, 1))) == [], "somebody waits there"
    assert planned(a=told(0, ("t", 1, 5)), b=told(0, ("u", 1, 9)), c=told(1)) == [("u", "c")]
    assert planned(a=told(0, ("t", 1, 9), ("u", 1, 8)), b=told(1), c=told(1)) == [("t", "b"), ("u", "c")]
    assert planned(a=told(0, ("t", 1, 0.1)), b=told(1)) == [], "it has just come"
    assert planned((("t", "b"),), a=told(0, ("t", 1, 9)), b=told(2), c=told(1)) == [("t", "c")]


def test_an_ended_task_leaves_its_mark_where_it_was(pair: Pair) -> None:
    task = pair.submit(then="echo $SECRET", env={"SECRET": "hush"})
    old = str(task.host)
    pair.free(pair.other(task))
    task.wait(PATIENCE_S)
    digest = task.task_id.split("-")[-2]
    folder = f"~/{pair.tmp_path.name}/{old}/tasks/{digest}/1"
    left = pair.machines[old].run(f"cd {folder}; ls; cat moved").split()
    assert {"moved", "cleared", "spec.json"} <= set(left) and "job.json" not in left
    note = json.loads(pair.machines[old].run(f"cat ~/{pair.tmp_path.name}/{old}/notes/{digest}/1"))
    assert note["hosts"][0]["name"] == task.host and note["moves"] == 1
    assert task.logs() == "hush\n"
