"""A task folder of which the task may be taken away: it starts, ends or goes, and of these one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flow_core.runner import machine, moves, notes, proc, slots, sweeping, task
from flow_core.runner.machine import Refused

ID = "task-0123456789abcdef-1"
THERE = {"id": "b", "name": "b", "nodes": 1}


SHOWN = {"name": "task", "num_instances": 1, "instance_type": "a100", "ports": [], "labels": {}}


def job(home: Path, **more: Any) -> dict[str, Any]:
    gpu = {"count": 1, "devices": ["0"], "queue": str(home / "queue"), "slots": str(home / "gpus")}
    runner = machine.install(str(home), sources())
    orders = {
        "v": 1,
        "task_id": ID,
        "entry": "shell",
        "argv": [f"echo start >> {home}/starts"],
        "python": sys.executable,
        "call": f"{runner}/flow_runner/call.py",
        "env": {"PATH": os.defpath},
        "working_dir": None,
        "num_instances": 1,
        "max_run_time_s": None,
        "kill_grace_s": 1.0,
        "after": None,
        "gpu": gpu,
        "container": None,
        "mounts": [],
        "links": [],
    }
    return {**orders, **more}


def sources() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(machine.__file__).parent.glob("*.py")}


def record(**more: Any) -> dict[str, Any]:
    files = [{"name": "payload", "size": 3}]
    about = {"v": 1, "task_id": ID, "submitted_at": time.time(), "spec": SHOWN, "moves": 0, "among": {}}
    return {**about, "files": files, **more}


def files() -> list[dict[str, Any]]:
    return [{"name": "payload", "data": b"abc"}, {"name": "here", "data": b" " * task.MOVE_BYTES}]


def made(home: Path, **more: Any) -> str:
    assert machine.create(str(home), ID, job=job(home), spec=record(**more), files=files())
    return machine.place(str(home), ID)


def until(seen: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exit_of(folder: str) -> dict[str, Any] | None:
    return task.read_json(folder, "exit.json")


def runners(home: Path) -> list[int]:
    return proc.members(machine.place(str(home), ID))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for token in list(moves._prepared):
        moves.abandon(str(tmp_path), token)
    machine.cancel(str(tmp_path), [ID])
    until(lambda: runners(tmp_path) == [])


@pytest.fixture
def busy(home: Path) -> Iterator[list[int]]:
    """The one GPU is held; closing the descriptor frees it."""
    pool = slots.Slots(str(home / "gpus"), ["0"])
    pool.acquire(1)
    held = [*pool.held.values()]
    yield held
    free(held)


def free(busy: list[int]) -> None:
    for fd in busy:
        proc.unlock(fd)
    busy.clear()


def waiting(home: Path) -> str:
    """A task whose runner waits for its turn."""
    folder = made(home)
    machine.launch(str(home), ID)
    until(lambda: task.owner_of(folder))
    return folder


def test_of_everything_that_may_decide_one_wins(home: Path) -> None:
    for number in range(100):
        folder = made(home / str(number))
        gate = threading.Barrier(3)
        found: dict[str, Any] = {}

        def stay(folder: str = folder, gate: threading.Barrier = gate, found: dict[str, Any] = found) -> None:
            gate.wait()
            found["stays"] = task.stay(folder)

        def end(folder: str = folder, gate: threading.Barrier = gate, found: dict[str, Any] = found) -> None:
            gate.wait()
            found["ends"] = task.finish(folder, task.exit_record("cancelled"))

        def go(folder: str = folder, gate: threading.Barrier = gate, found: dict[str, Any] = found) -> None:
            gate.wait()
            found["goes"] = task.move_away(folder, {"to": THERE, "moves": 1, "at": 0.0})

        threads = [threading.Thread(target=one) for one in (stay, end, go)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        moved = found["goes"] is not None
        assert found == {"stays": not moved, "ends": not moved, "goes": task.moved(folder)}
        assert (exit_of(folder) is None) is moved


def test_the_first_who_withdraws_a_task_decides_for_all(home: Path, busy: list[int]) -> None:
    waiting(home)
    first = moves.withdraw(str(home), ID, THERE, 1)
    second = moves.withdraw(str(home), ID, {**THERE, "id": "c"}, 1)
    assert first is not None and first == second and first["to"] == THERE
    free(busy)
    until(lambda: runners(home) == [])
    assert not (home / "starts").exists()


def test_a_runner_that_is_not_told_sees_that_its_task_is_gone(home: Path, busy: list[int]) -> None:
    folder = waiting(home)
    assert task.move_away(folder, {"to": THERE, "moves": 1, "at": time.time()})
    until(lambda: not slots.waiting(str(home / "queue")))
    assert exit_of(folder) is None and busy


def test_a_runner_whose_turn_comes_after_the_decision_starts_nothing(home: Path, busy: list[int]) -> None:
    folder = waiting(home)
    owner = task.owner_of(folder)
    assert owner is not None
    os.kill(owner["pid"], signal.SIGSTOP)  # it cannot look
    assert task.move_away(folder, {"to": THERE, "moves": 1, "at": time.time()})
    free(busy)
    os.kill(owner["pid"], signal.SIGCONT)
    until(lambda: proc.state(owner) == "gone")
    assert not (home / "starts").exists() and exit_of(folder) is None
    assert slots.busy(str(home / "gpus"), ["0"]) == []


def test_a_task_that_is_gone_is_not_buried_where_it_was(home: Path, busy: list[int]) -> None:
    folder = waiting(home)
    owner = task.owner_of(folder)
    assert owner is not None and busy
    assert task.move_away(folder, {"to": THERE, "moves": 1, "at": time.time()})
    os.kill(owner["pid"], signal.SIGKILL)
    until(lambda: proc.state(owner) == "gone")
    facts = task.probe(folder)
    assert facts is not None and facts["exit"] is None and facts["moved"]["to"] == THERE
    assert machine.cancel(str(home), [ID]) == [ID] and machine.release(str(home), [ID]) == [ID]
    assert exit_of(folder) is None


def test_a_wish_to_stop_is_heard_here_or_passed_on(home: Path, busy: list[int]) -> None:
    """Whoever withdraws the task has looked for a wish just before there was one."""
    folder = waiting(home)
    owner_of = task.owner_of

    def late(folder: str) -> dict[str, Any] | None:
        task.move_away(folder, {"to": THERE, "moves": 1, "at": time.time()})
        return owner_of(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "owner_of", late)
        assert busy and machine.cancel(str(home), [ID]) == []
    assert task.moved(folder) is None
    until(lambda: exit_of(folder))


@pytest.mark.parametrize("why", ["cancelled", "started", "dead", "unclaimed", "follows another"])
def test_what_cannot_be_withdrawn_stays(home: Path, busy: list[int], why: str) -> None:
    if why == "unclaimed":
        folder = made(home)
    elif why == "follows another":
        before = home / "before"
        before.mkdir()
        (before / "spec.json").write_text("{}")
        orders = job(home, after=str(before))
        machine.create(str(home), ID, job=orders, spec=record(), files=files())
        machine.launch(str(home), ID)
        folder = machine.place(str(home), ID)
        until(lambda: task.owner_of(folder))
    else:
        folder = waiting(home)
    if why == "cancelled":
        machine.cancel(str(home), [ID])
    if why == "started":
        free(busy)
        until(lambda: exit_of(folder))
    if why == "dead":
        owner = task.owner_of(folder)
        assert owner is not None
        os.kill(owner["pid"], signal.SIGKILL)
        until(lambda: proc.state(owner) == "gone")
    assert moves.withdraw(str(home), ID, THERE, 1) is None
    assert task.moved(folder) is None
    machine.cancel(str(home), [ID])


def test_a_folder_of_a_runner_that_knows_no_moves_stays(home: Path, busy: list[int]) -> None:
    machine.create(str(home), ID, job=job(home), spec=record(), files=[])
    machine.launch(str(home), ID)
    folder = machine.place(str(home), ID)
    until(lambda: task.owner_of(folder))
    assert busy and moves.withdraw(str(home), ID, THERE, 1) is None
    machine.cancel(str(home), [ID])
    until(lambda: exit_of(folder))


# -- arriving


def prepared(home: Path) -> str | None:
    return moves.prepare(str(home), ID, job=job(home), spec=record(moves=1), files=files())


def test_who_has_prepared_is_next_and_starts_once(home: Path) -> None:
    token = prepared(home)
    assert token and prepared(home) is None, "one at a time"
    assert moves.queue(str(home), ["0"])["free"] == 1
    assert machine.attempts(str(home), "0123456789abcdef") == []
    moves.settle(str(home), ID, token)
    folder = machine.place(str(home), ID)
    until(lambda: exit_of(folder))
    with pytest.raises(Refused):
        moves.settle(str(home), ID, token)
    moves.adopt(str(home), ID, job=job(home), spec=record(moves=1), files=files())
    until(lambda: runners(home) == [])
    assert (home / "starts").read_text() == "start\n"


def test_nobody_prepares_where_no_gpu_is_free(home: Path, busy: list[int]) -> None:
    assert busy and prepared(home) is None
    assert slots.waiting(str(home / "queue")) == [] and not list((home / "tasks").rglob(".new-*"))


def test_what_is_abandoned_leaves_nothing(home: Path) -> None:
    token = prepared(home)
    assert token
    moves.abandon(str(home), token)
    until(lambda: slots.waiting(str(home / "queue")) == [])
    assert not list((home / "tasks").rglob("*.json")) and prepared(home) is not None


def test_what_was_prepared_by_a_process_that_dies_is_nobodys(home: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from tests.providers import test_moved_folders as t\n"
        "from pathlib import Path; assert t.prepared(Path(sys.argv[2])); os.kill(os.getpid(), 9)"
    )
    root = str(Path(__file__).resolve().parents[2])
    assert subprocess.run([sys.executable, "-c", code, root, str(home)], check=False).returncode == -9
    until(lambda: slots.waiting(str(home / "queue")) == [])
    assert machine.attempts(str(home), "0123456789abcdef") == []
    moves.adopt(str(home), ID, job=job(home), spec=record(moves=1), files=files())
    until(lambda: exit_of(machine.place(str(home), ID)))
    assert (home / "starts").read_text() == "start\n"


def test_a_task_that_arrives_late_is_as_fresh_as_any(home: Path) -> None:
    old = time.time() - 10 * task.UNCLAIMED_S
    spec = moves._arriving(record(moves=1, submitted_at=old))
    machine.create(str(home), ID, job=job(home), spec=spec, files=files())
    facts = task.probe(machine.place(str(home), ID))
    assert facts is not None and facts["exit"] is None


def test_a_task_is_adopted_a_second_time_neither_when_it_went_on_nor_when_it_was_swept(home: Path) -> None:
    orders: dict[str, Any] = {"job": job(home), "spec": record(moves=1), "files": files()}
    moves.adopt(str(home), ID, **orders)
    folder = machine.place(str(home), ID)
    until(lambda: exit_of(folder) and runners(home) == [])
    sweeping.sweep(str(home), 0.0)
    facts = task.probe(folder)
    assert facts is not None and facts["released"]
    moves.adopt(str(home), ID, **orders)
    until(lambda: runners(home) == [])
    assert (home / "starts").read_text() == "start\n"


# -- what is left behind


def test_a_mark_is_kept_until_the_task_has_arrived(home: Path, busy: list[int]) -> None:
    folder = waiting(home)
    told, data = moves.pack(str(home), ID)
    assert (told["files"], data) == ([{"name": "payload", "size": 3}], b"abc")
    assert busy and moves.withdraw(str(home), ID, THERE, 1)
    assert moves.pack(str(home), ID)[1] == b"abc"
    sweeping.sweep(str(home), 0.0)
    assert task.moved(folder)
    moves.clear(str(home), ID, {"v": 1, "hosts": [THERE], "moves": 1})
    assert not os.path.exists(os.path.join(folder, "job.json"))
    with pytest.raises(Refused):
        moves.pack(str(home), ID)
    seen = notes.watch(str(home), [ID], {})[ID]
    assert (seen["moved"]["to"], seen["cleared"]) == (THERE, True)
    os.unlink(home / ".swept")
    time.sleep(0.05)
    sweeping.sweep(str(home), 0.0)
    assert not os.path.exists(folder)
    started = notes.start(str(home), ID, job=job(home), spec=record(), files=files(), retention_s=1e6)
    assert started is False and not os.path.exists(folder), "a submitter that comes very late"


def test_news_of_an_earlier_move_changes_nothing(home: Path) -> None:
    for moves_, name in ((0, "a"), (2, "c"), (1, "b")):
        notes.put(str(home), ID, {"v": 1, "hosts": [{"id": name}], "moves": moves_}, replace=True)
    note = notes.of_task(str(home), ID)
    assert note is not None and note["hosts"] == [{"id": "c"}]
