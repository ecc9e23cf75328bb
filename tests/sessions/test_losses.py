"""A session whose whole machine is lost: what becomes of its calls, and of the state of its services."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flow_core import Flow, Runner, Session
from flow_core.definitions import CallOptions, Retries
from flow_core.dispatch import Pool
from flow_core.errors import (
    CallCancelledError,
    SessionClosedError,
    TaskCancelledError,
    WorkerDiedError,
)
from flow_core.futures import Future
from flow_core.several import get
from flow_core.streamed import Stream
from tests.sessions.conftest import Link, Opener, eventually, processes_of, sent
from tests.sessions.test_dispatch import add, nap, note, until_there

AGAIN = CallOptions(retries=Retries(lost=1, delay_s=0.05))


def lose_machine(home: Path) -> None:
    """Kill all that runs there at once, as when the power goes."""
    for pid in processes_of(home):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def note_and_wait(path: str, go: str) -> str:
    with open(path, "a") as file:
        file.write("began\n")
    print("this is", os.environ["FLOW_TASK_DIR"])
    while not os.path.exists(go):
        time.sleep(0.005)
    return os.environ["FLOW_TASK_DIR"]


def squares(n: int) -> Iterator[int]:
    for x in range(n):
        yield x * x
        time.sleep(0.01)


@pytest.fixture
def pool(opened: Opener) -> Pool:
    return opened(workers=2)


def test_a_call_that_asks_for_it_is_made_again_when_its_whole_session_is_lost(
    pool: Pool, home: Path, tmp_path: Path
) -> None:
    noted, go = tmp_path / "noted", tmp_path / "go"
    begun = pool.submit(sent(note_and_wait), (str(noted), str(go)), options=AGAIN)
    once = pool.submit(sent(nap), (600,))
    queued = pool.submit(sent(add), (1, 2), options=AGAIN)
    queued_once = pool.submit(sent(add), (1, 2))
    waiting = pool.submit(sent(len), (begun,), options=AGAIN)
    eventually(lambda: noted.exists() and once.status == "running")
    first = pool.task_id

    lose_machine(home)

    for lost in (once, queued_once):
        with pytest.raises(WorkerDiedError, match="the session is gone"):
            lost.result(20)
    assert queued.result(20) == 3
    go.touch()
    assert begun.result(20) == str(home / "tasks" / pool.task_id.split("-")[-2] / "2")
    assert waiting.result(20) == len(begun.result())
    assert noted.read_text() == "began\nbegan\n"
    assert (first[-2:], pool.task_id[-2:]) == ("-1", "-2") and first[:-1] == pool.task_id[:-1]
    assert pool.submit(sent(add), (2, 2)).result(20) == 4


def test_without_being_asked_no_second_machine_is_started(pool: Pool, flow: Flow, home: Path) -> None:
    calls = [pool.submit(sent(nap), (600,)) for _ in range(3)]
    eventually(lambda: calls[0].status == "running")
    lose_machine(home)
    for call in calls:
        with pytest.raises(WorkerDiedError, match="the session is gone") as lost:
            call.result(20)
        assert lost.value.retryable and lost.value.reason == "runner-died"
    with pytest.raises(SessionClosedError, match="the session is gone"):
        pool.submit(sent(add), (1,))
    assert len(flow.list_tasks()) == 1


def test_a_session_is_begun_anew_as_often_as_its_calls_ask_and_no_more(
    pool: Pool, flow: Flow, home: Path, tmp_path: Path
) -> None:
    noted = tmp_path / "noted"
    call = pool.submit(sent(note_and_wait), (str(noted), str(tmp_path / "never")), options=AGAIN)
    for count in (1, 2):
        eventually(lambda count=count: noted.exists() and noted.read_text().count("began") == count)  # type: ignore[misc]
        lose_machine(home)
    assert isinstance(call.exception(20), WorkerDiedError)
    assert len(flow.list_tasks()) == 2


def test_a_generator_that_has_given_values_is_not_begun_again(pool: Pool, flow: Flow, home: Path) -> None:
    stream = pool.submit(sent(squares), (10_000,), options=AGAIN)
    assert isinstance(stream, Stream)
    values = iter(stream)
    assert next(values) == 0
    lose_machine(home)
    with pytest.raises(WorkerDiedError):
        list(values)
    assert len(flow.list_tasks()) == 1


def test_a_cancelled_session_is_not_begun_anew(pool: Pool, flow: Flow) -> None:
    call = pool.submit(sent(nap), (600,), options=AGAIN)
    eventually(lambda: call.status == "running")
    flow.cancel([pool.task_id])
    assert isinstance(call.exception(20), TaskCancelledError)
    assert len(flow.list_tasks()) == 1


def test_a_call_that_was_cancelled_is_not_made_again_by_a_loss(pool: Pool, home: Path, flow: Flow) -> None:
    call = pool.submit(sent(until_there), ("/never",), options=AGAIN)
    eventually(lambda: call.status == "running")
    for line in list(pool.lines.values()):
        os.kill(line.pid, signal.SIGSTOP)  # it does not hear that it is to stop
    assert call.cancel()
    lose_machine(home)
    assert isinstance(call.exception(20), CallCancelledError)
    assert len(flow.list_tasks()) == 1


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.3])
def test_closing_while_it_is_begun_anew_leaves_nothing(
    pool: Pool, flow: Flow, home: Path, after_s: float
) -> None:
    call = pool.submit(sent(nap), (600,), options=CallOptions(retries=Retries(lost=5, delay_s=0.0)))
    eventually(lambda: call.status == "running")
    lose_machine(home)
    time.sleep(after_s)
    pool.close()
    assert isinstance(call.exception(20), (CallCancelledError, WorkerDiedError))
    eventually(lambda: all(task.is_terminal for task in flow.list_tasks()) and not processes_of(home))


def test_what_other_processes_know_of_a_call_outlives_the_loss(
    pool: Pool, home: Path, tmp_path: Path
) -> None:
    noted, go = tmp_path / "noted", tmp_path / "go"
    call = pool.submit(sent(note_and_wait, "json"), (str(noted), str(go)), options=AGAIN)
    once = pool.submit(sent(until_there, "json"), (str(go),))
    call_id, once_id = call.id, once.id
    ended = pool.submit(sent(add, "json"), (1, 1))
    ended_id = ended.id
    eventually(noted.exists)
    lose_machine(home)
    assert isinstance(once.exception(20), WorkerDiedError)
    elsewhere = [Future.from_id(one, local={"home": home}) for one in (call_id, once_id)]
    assert not elsewhere[0].done()
    go.touch()
    value = call.result(20)
    assert elsewhere[0].result(20) == value
    assert isinstance(elsewhere[1].exception(20), WorkerDiedError)
    assert Future.from_id(call.id, local={"home": home}).result(20) == value
    assert isinstance(
        Future.from_id(ended_id, local={"home": home}).exception(20), (WorkerDiedError, type(None))
    )


def test_what_a_call_printed_before_the_loss_is_still_its_own(pool: Pool, home: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.touch()
    early = pool.submit(sent(note_and_wait), (str(tmp_path / "early"), str(go)))
    early.result(20)
    go.unlink()
    late = pool.submit(sent(note_and_wait), (str(tmp_path / "late"), str(go)), options=AGAIN)
    eventually((tmp_path / "late").exists)
    lose_machine(home)
    go.touch()
    late.result(20)
    assert early.logs() == f"this is {early.result()}\n"
    assert late.logs() == f"this is {late.result()}\n"
    assert early.logs() != late.logs()


def test_the_functions_of_a_session_go_on_after_its_loss(flow: Flow, home: Path, tmp_path: Path) -> None:
    noted, go = tmp_path / "noted", tmp_path / "go"
    with Session(flow=flow, workers=1) as session:
        waiting = session.function(note_and_wait)
        adding = session.function(add)
        again = waiting.options(retries=Retries(lost=1, delay_s=0.05)).remote(str(noted), str(go))
        eventually(noted.exists)
        lose_machine(home)
        go.touch()
        assert again.result(20).endswith("2")

        once = session.function(nap).remote(600)
        eventually(lambda: once.status == "running")
        lose_machine(home)
        with pytest.raises(WorkerDiedError):
            once.result(20)
        assert adding.remote(1, 2).result(20) == 3, "its workers are started anew by the next call"


# ------------------------------------------------------------------ the connection, and not the machine


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flow_core.keeper._ASK_S", 1.0)


def test_a_cut_link_ends_calls_in_time_and_leaves_nothing_running(
    link: Link, opened: Opener, home: Path
) -> None:
    pool = opened(workers=1, lease_s=1.0)
    call = pool.submit(sent(nap), (600,))
    eventually(lambda: call.status == "running")
    link.cut()
    with pytest.raises(WorkerDiedError, match="the connection to it was lost, though its task runs"):
        call.result(20)
    with pytest.raises(SessionClosedError, match="the connection to it was lost"):
        pool.submit(sent(add), (1,))
    eventually(lambda: not processes_of(home))


def test_another_connection_by_id_works_when_the_link_is_there_again(
    link: Link, opened: Opener, flow: Flow
) -> None:
    pool = opened(workers=1)
    call = pool.submit(sent(nap), (600,))
    eventually(lambda: call.status == "running")
    link.cut()
    assert isinstance(call.exception(20), WorkerDiedError)
    link.is_cut = False
    with Session.from_id(pool.task_id, flow=flow, workers=2) as again:
        assert again.function(add).remote(1, 2).result(20) == 3
    flow.cancel([pool.task_id])


def test_a_call_that_asks_for_it_is_made_again_over_a_new_link_and_never_runs_beside_itself(
    link: Link, opened: Opener, home: Path, tmp_path: Path
) -> None:
    def hold(path: str, go: str) -> int:
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
        while not os.path.exists(go):
            time.sleep(0.005)
        return os.getpid()

    pool, noted, go = opened(workers=1), tmp_path / "noted", tmp_path / "go"
    call = pool.submit(sent(hold), (str(noted), str(go)), options=AGAIN)
    eventually(noted.exists)
    link.cut()
    threading.Timer(1.5, lambda: setattr(link, "is_cut", False)).start()
    eventually(lambda: len(noted.read_text().split()) == 2)
    first, second = map(int, noted.read_text().split())
    assert first != second and not Path(f"/proc/{first}").exists()
    go.touch()
    assert call.result(20) == second and pool.task_id.endswith("-1")


def test_a_call_that_asks_for_it_does_not_wait_for_ever_for_a_link_that_stays_cut(
    link: Link, opened: Opener, flow: Flow
) -> None:
    pool = opened(workers=1, lease_s=30.0)
    call = pool.submit(sent(nap), (600,), options=AGAIN)
    eventually(lambda: call.status == "running")
    pool.keeper.patience_s = 0.5
    link.cut()
    with pytest.raises(WorkerDiedError, match="the connection to it was lost"):
        call.result(30)
    flow.cancel([pool.task_id])


# ------------------------------------------------------------------ services


class Counter:
    def __init__(self, count: int = 0) -> None:
        self.count = count

    def add(self, by: int) -> int:
        self.count += by
        return self.count


class Waiter:
    def until_there(self, path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.01)


def test_the_state_of_services_is_lost_with_the_machine_and_they_say_so(
    flow: Flow, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path / "code")
    with Runner("counting", flow=flow) as runner:
        counter = runner.service(Counter(10))
        lasting = runner.service(Counter, args=(20,), max_restarts=1)
        adding = runner.service(add)
        assert [counter.add(1).get(), lasting.add(1).get(), adding(1, 2).get()] == [11, 21, 3]
        waiting = runner.service(until_there)("/never")
        eventually(lambda: waiting.status == "running")
        stateful = runner.service(Waiter()).until_there("/never")
        lose_machine(home)
        with pytest.raises(WorkerDiedError, match="the state of 'Waiter' is gone, and the state with it"):
            stateful.get(20)
        with pytest.raises(WorkerDiedError, match="the session is gone"):
            waiting.get(20)
        for service in (counter, lasting):  # until they know; what is called before that is lost as well
            eventually(lambda service=service: service._workers._pool.over)  # type: ignore[misc]
        with pytest.raises(WorkerDiedError, match="the state of the service 'Counter' is lost") as lost:
            counter.add(1)
        assert "max_restarts" in str(lost.value)
        assert lasting.add(1).get(20) == 21, "a new object, since that was asked for"
        assert adding(3, 4).get(20) == 7, "a function has no state to lose"
        assert lasting.add(1).get(20) == 22


def test_a_lost_session_that_was_joined_is_not_begun_anew_by_the_guest(
    pool: Pool, flow: Flow, home: Path
) -> None:
    assert pool.submit(sent(add), (1,)).result(20) == 1
    with Session.from_id(pool.task_id, flow=flow, workers=2) as joined:
        call = joined.function(nap).options(retries=1).remote(600)
        eventually(lambda: call.status == "running")
        lose_machine(home)
        assert isinstance(call.exception(20), WorkerDiedError)
        with pytest.raises(SessionClosedError, match="the session is gone"):
            joined.function(add).remote(1).result(20)
    assert len(flow.list_tasks()) == 1


def test_many_calls_that_ask_for_it_all_get_their_values(pool: Pool, home: Path, tmp_path: Path) -> None:
    noting, path = sent(note), tmp_path / "noted"
    options = CallOptions(retries=Retries(lost=1, delay_s=0.0))
    slow = [pool.submit(sent(nap), (0.2, number), options=options) for number in range(10)]
    quick = [pool.submit(noting, (str(path), str(number)), options=options) for number in range(200)]
    slow[0].result(20)
    lose_machine(home)
    assert get(slow, timeout=60) == list(range(10))
    get(quick, timeout=60)
    assert set(path.read_text().split()) == {str(number) for number in range(200)}


# ------------------------------------------------------------------ the end of an idle session


def test_a_call_that_comes_when_its_session_has_just_idled_runs_in_the_next_one(
    opened: Opener, flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = opened(workers=2, idle_limit_s=0.5)
    assert pool.submit(sent(add), (1,)).result(20) == 1
    hear, held = pool.keeper._hear, threading.Event()
    monkeypatch.setattr(pool.keeper, "_hear", lambda control: held.wait(20) and hear(control))
    eventually(lambda: flow.list_tasks()[0].is_terminal)
    late = [pool.submit(sent(add), (number, 1)) for number in range(5)]
    held.set()
    assert get(late, timeout=30) == [1, 2, 3, 4, 5]
    assert len(flow.list_tasks()) == 2


def test_a_session_that_idles_without_calls_just_ends(opened: Opener, flow: Flow) -> None:
    pool = opened(workers=1, idle_limit_s=0.5)
    assert pool.submit(sent(add), (1,)).result(20) == 1
    eventually(lambda: pool.over is not None)
    assert len(flow.list_tasks()) == 1
