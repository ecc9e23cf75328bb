"""What a review of the sessions' core has found, each reduced to the one moment that matters."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core import Flow
from flow_core.definitions import CallOptions, Retries, SessionSpec
from flow_core.dispatch import Pool
from flow_core.errors import (
    CallCancelledError,
    FlowError,
    SerializationError,
    SessionClosedError,
    WorkerDiedError,
)
from flow_core.futures import DONE, Future
from flow_core.links import Door
from flow_core.runner import wire
from flow_core.runner.ahead import Chunk
from flow_core.several import as_completed, get, wait
from flow_core.streamed import Stream
from tests.sessions.conftest import Opener, eventually, sent


def add(x: int, y: int = 1) -> int:
    return x + y


def wait_for(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.005)
    return path


def read_line(connection: socket.socket) -> dict[str, Any]:
    said = b""
    while not said.endswith(b"\n"):
        piece = connection.recv(1)
        assert piece, said
        said += piece
    message: dict[str, Any] = json.loads(said)
    return message


# -- one client never harms another


@pytest.mark.parametrize(
    "said",
    [b'{"flow": 1, "nonce": "\\ud800", "proof": "x"}\n', b'{"flow": 1, "nonce": "x", "proof": "\\ud800"}\n'],
)
def test_a_stranger_whose_words_are_no_text_is_sent_away(opened: Opener, said: bytes) -> None:
    pool = opened(1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    sessions = pool.flow.provider.sessions
    assert sessions is not None
    with sessions.connect(pool.task_id) as stranger:
        stranger.settimeout(20)
        read_line(stranger)
        stranger.sendall(said)
        assert read_line(stranger)["ok"] is False
    assert pool.submit(sent(add), (2,)).result(20) == 3


@pytest.mark.parametrize(
    "said",
    [
        b"[" * 100_000,
        b'{"do": "cancel", "worker": 1e999, "stream": 1, "number": 1}',
        b'{"do": "log", "worker": 0, "range": [1e999, 2]}',
        b'{"do": "log", "worker": 0, "range": [99999999999999999999999999, null]}',
        b'{"do": ["ping"]}',
    ],
)
def test_a_client_whose_wishes_make_no_sense_is_dropped_and_no_other(opened: Opener, said: bytes) -> None:
    pool = opened(1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    door = Door(pool.flow.engine, pool.task_id, os.urandom(8).hex())
    door.check()
    connection, _ = door.open("control")
    with connection:
        connection.setblocking(True)
        connection.settimeout(20)
        connection.sendall(wire.frame(wire.SAY, 1, said))
        assert connection.recv(1) == b""
    door.open("control")[0].close()


def test_a_worker_that_is_no_number_is_refused(opened: Opener) -> None:
    pool = opened(1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    door = Door(pool.flow.engine, pool.task_id, os.urandom(8).hex())
    door.check()
    connection, _ = door.open("control")
    with connection, pytest.raises(FlowError):
        door.open("worker", worker=float("inf"))
    door.open("control")[0].close()


def test_a_client_that_talks_garbage_to_a_worker_harms_no_other(opened: Opener) -> None:
    pool = opened(1)
    pid = pool.submit(sent(os.getpid)).result(20)
    door = Door(pool.flow.engine, pool.task_id, os.urandom(8).hex())
    door.check()
    for garbage in (
        wire.frame(wire.DEFINE, 1, b"no json"),
        wire.frame(wire.SEGMENT, 1),
        wire.frame(99, 1),
        wire.frame(wire.CALL, 1, b"", 2, 12345),
        wire.frame(wire.CALL_WITH, 1, b"no json", 2, 12345),
    ):
        control, _ = door.open("control")
        line, _ = door.open("worker", worker=0, dedicated=False)
        with control, line:
            line.setblocking(True)
            line.settimeout(20)
            line.sendall(garbage)
            assert line.recv(1) == b""
    assert pool.submit(sent(os.getpid)).result(20) == pid


# -- every call once


def test_the_items_that_a_worker_gives_back_are_told_of_before_the_others_outcome() -> None:
    told: list[str] = []
    sending, go = threading.Event(), threading.Event()

    class Slow:
        def send(self, _: bytes) -> None:
            sending.set()
            go.wait(20)
            told.append("returned")

    chunk = Chunk(Slow(), 1, list(range(5)))  # type: ignore[arg-type]
    next(chunk.items)
    cutting = threading.Thread(target=chunk.cut)
    cutting.start()
    assert sending.wait(20)

    def end() -> None:
        chunk.end()
        told.append("result")

    ending = threading.Thread(target=end)
    ending.start()
    ending.join(0.1)
    go.set()
    cutting.join(20)
    ending.join(20)
    assert told == ["returned", "result"] and chunk.size == 1


def test_a_chunk_that_is_about_to_begin_is_not_given_back_as_a_whole() -> None:
    class Mute:
        def send(self, _: bytes) -> None:
            pass

    chunk = Chunk(Mute(), 1, list(range(5)))  # type: ignore[arg-type]
    chunk.cut()
    assert list(chunk.items) == list(range(5)) and chunk.size == 5


def test_a_chunk_that_has_ended_gives_nothing_back() -> None:
    class Loud:
        def send(self, _: bytes) -> None:
            raise AssertionError

    chunk = Chunk(Loud(), 1, list(range(5)))  # type: ignore[arg-type]
    next(chunk.items)
    chunk.end()
    chunk.cut()


def test_a_cancelled_call_that_comes_back_runs_nowhere_else(opened: Opener, tmp_path: Path) -> None:
    pool, go = opened(2), tmp_path / "go"

    def maybe(go: str, ran: str) -> None:
        if ran:
            open(ran, "w").close()
        while go and not os.path.exists(go):
            time.sleep(0.005)

    definition = sent(maybe)
    for _ in range(3):
        get([pool.submit(definition, ("", "")) for _ in range(200)], 20)
    eventually(lambda: len(pool.lines) == 2)
    with pool.lock:  # nothing is read meanwhile
        blocked = pool.submit(definition, (str(go), ""))
        worker = blocked.worker
        behind = []
        for number in range(30):
            one = pool.submit(definition, ("", str(tmp_path / f"{number}")))
            if one.worker is worker:
                behind.append((number, one))
        assert all(one.cancel() for _, one in behind)
    for _, one in behind:
        one.exception(20)
    pool.submit(sent(add), (1,)).result(20)
    go.touch()
    blocked.result(20)
    for number, one in behind:
        if isinstance(one.exception(), CallCancelledError):
            assert not (tmp_path / f"{number}").exists()
    eventually(lambda: pool.open_calls == 0)


# -- attempts


def test_another_attempt_gets_the_arguments_as_they_were_submitted(opened: Opener, tmp_path: Path) -> None:
    def spoil(array: Any, mark: str) -> float:
        total = float(array.sum())
        array[:] = 0
        if not os.path.exists(mark):
            open(mark, "w").close()
            raise ValueError("once")
        return total

    pool = opened(1)
    options = CallOptions(retries=Retries(exceptions=1, delay_s=0.05))
    first = pool.submit(sent(spoil), (np.ones(300_000), str(tmp_path / "mark")), options=options)
    eventually(lambda: first.attempts or first.done())
    for _ in range(3):
        pool.submit(sent(lambda array: None), (np.full(300_000, 7.0),)).result(20)
    assert first.result(20) == 300_000.0


def test_the_time_of_an_attempt_is_its_own(opened: Opener, tmp_path: Path) -> None:
    def second_takes_long(mark: str) -> str:
        if not os.path.exists(mark):
            open(mark, "w").close()
            raise ValueError("once")
        for _ in range(10):
            time.sleep(0.06)
        return "in time"

    pool = opened(1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    options = CallOptions(timeout_s=1.0, retries=Retries(exceptions=1, delay_s=0.7))
    assert (
        pool.submit(sent(second_takes_long), (str(tmp_path / "mark"),), options=options).result(20)
        == "in time"
    )


def test_a_generator_that_has_yielded_is_not_begun_again(opened: Opener) -> None:
    def two_and_fail() -> Any:
        yield 1
        yield 2
        raise ValueError("enough")

    pool = opened(1)
    stream = pool.submit(sent(two_and_fail), options=CallOptions(retries=Retries(exceptions=1, delay_s=0)))
    assert isinstance(stream, Stream)
    values = iter(stream)
    assert [next(values), next(values)] == [1, 2]
    with pytest.raises(ValueError, match="enough"):
        next(values)


def test_the_failure_of_an_attempt_is_no_outcome_to_others(
    opened: Opener, home: Path, tmp_path: Path
) -> None:
    def once(mark: str, go: str) -> str:
        if not os.path.exists(mark):
            open(mark, "w").close()
            raise ValueError("once")
        while not os.path.exists(go):
            time.sleep(0.005)
        return "second"

    pool, go = opened(1), tmp_path / "go"
    assert pool.submit(sent(add), (1,)).result(20) == 2
    options = CallOptions(retries=Retries(exceptions=1, delay_s=0))
    with pool.lock:
        future = pool.submit(sent(once, "json"), (str(tmp_path / "mark"), str(go)), options=options)
        call_id = future.id
    eventually(lambda: future.attempts == 1 and future.status == "running")
    elsewhere = Future.from_id(call_id, local={"home": home})
    assert not elsewhere.done()
    go.touch()
    assert future.result(20) == elsewhere.result(20) == "second"


# -- values


def test_what_a_call_does_to_its_input_stays_with_that_call(opened: Opener) -> None:
    def spoil(array: Any) -> float:
        total = float(array.sum())
        array[:] = 0
        return total

    pool = opened(1)
    big = pool.submit(sent(lambda: np.ones(300_000)))
    big.wait(20)
    spoiling = sent(spoil)
    assert get([pool.submit(spoiling, (big,)) for _ in range(3)], 20) == [300_000.0] * 3
    assert float(big.result(20).sum()) == 300_000.0


def test_a_value_that_was_made_unfit_to_travel_fails_the_call_that_wants_it_and_no_other(
    opened: Opener,
) -> None:
    pool = opened(1)
    making, taking = sent(list), sent(len)
    spoilt = pool.submit(making)
    spoilt.result(20).append(threading.Lock())
    waiting = pool.submit(taking, (spoilt,))
    assert isinstance(waiting.exception(20), SerializationError)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    eventually(lambda: pool.open_calls == 0)


def test_a_value_that_was_made_unfit_to_be_kept_ends_no_session(opened: Opener) -> None:
    pool = opened(1)
    spoilt = pool.submit(sent(list))
    spoilt.result(20).append(threading.Lock())
    assert spoilt.id
    eventually(lambda: not pool.keeper._unstored)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    assert pool.over is None


def test_threads_that_ask_at_once_get_the_same_object() -> None:
    class Runs:
        task_id = "none"
        lock = threading.RLock()
        both = threading.Barrier(2, timeout=20)

        def decode(self, _future: Future, _parcel: Any) -> Any:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.both.wait()
            return object()

    future = Future(Runs())  # type: ignore[arg-type]
    future.state, future.parcel = DONE, object()  # type: ignore[assignment]
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(future.result())) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(20)
    assert len(got) == 2 and got[0] is got[1]


# -- ends


def test_a_call_whose_input_comes_from_elsewhere_ends_with_its_session(
    flow: Flow, opened: Opener, tmp_path: Path
) -> None:
    there, here = opened(1), opened(1)
    producer = there.submit(sent(wait_for), (str(tmp_path / "go"),))
    waiting = here.submit(sent(len), (producer,))
    here.close()
    assert isinstance(waiting.exception(5), CallCancelledError)
    (tmp_path / "go").touch()
    producer.result(20)


def test_a_failed_input_of_a_class_that_cannot_be_copied_fails_its_dependents(opened: Opener) -> None:
    class Odd(Exception):
        def __init__(self, *, code: int) -> None:
            super().__init__("odd")
            self.code = code

    def fail(path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.005)
        raise Odd(code=3)

    pool = opened(2)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        producer = pool.submit(sent(fail), (f"{folder}/go",))
        waiting = pool.submit(sent(len), (producer,))
        open(f"{folder}/go", "w").close()
        assert waiting.exception(20) is not None


def test_a_child_that_was_forked_does_not_read_its_parents_answers(opened: Opener, tmp_path: Path) -> None:
    pool, go = opened(1), tmp_path / "go"
    pending = pool.submit(sent(wait_for), (str(go),))
    eventually(lambda: pending.status == "running")
    child = os.fork()
    if child == 0:
        try:
            pending.result(0.1)
        except SessionClosedError as error:
            os._exit(0 if "forked" in str(error) else 2)
        except BaseException:
            os._exit(3)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go.touch()
    assert pending.result(20) == str(go)


def test_a_child_that_was_forked_cannot_take_leave_for_its_parent(opened: Opener) -> None:
    pool = opened(1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            pool.leave()
        os._exit(0)
    os.waitpid(child, 0)
    assert pool.submit(sent(add), (2,)).result(20) == 3
    assert pool.over is None


def test_a_callback_that_takes_its_time_does_not_cost_the_lease(opened: Opener) -> None:
    pool = opened(1, lease_s=0.5)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    done, deadline = threading.Event(), time.monotonic() + 2.5

    def slow(_: Future) -> None:
        while time.monotonic() < deadline:
            time.sleep(0.05)
        done.set()

    pool.submit(sent(time.sleep), (0.05,)).add_done_callback(slow)
    assert done.wait(20)
    assert pool.submit(sent(add), (2,)).result(20) == 3
    assert pool.over is None


def test_a_process_that_a_dead_worker_left_behind_hides_its_death_from_nobody(
    opened: Opener, tmp_path: Path
) -> None:
    def leave_one_and_die(path: str) -> None:
        if os.fork() == 0:
            os.setsid()
            with open(path + ".new", "w") as file:
                file.write(str(os.getpid()))
            os.rename(path + ".new", path)
            time.sleep(60)
            os._exit(0)
        while not os.path.exists(path):
            time.sleep(0.005)
        os._exit(7)

    pool, path = opened(1), tmp_path / "left"
    future = pool.submit(sent(leave_one_and_die), (str(path),))
    try:
        assert getattr(future.exception(20), "exit_code", None) == 7
        assert pool.submit(sent(add), (2,)).result(20) == 3
    finally:
        os.kill(int(path.read_text()), 9)


def test_a_call_that_is_cancelled_while_its_value_is_sent_tears_nothing(opened: Opener) -> None:
    def many() -> Any:
        while True:
            yield b"x" * 100_000

    pool = opened(1)
    pid = pool.submit(sent(os.getpid)).result(20)
    with pool.lock:  # nobody reads, so the worker waits in the middle of a value
        stream = pool.submit(sent(many))

        def stuck() -> bool:
            wchan = Path(f"/proc/{pid}/wchan").read_text()
            return "sock" in wchan or "unix" in wchan

        eventually(stuck)
        assert stream.cancel()
        time.sleep(0.1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    assert isinstance(stream.exception(20), CallCancelledError)


def test_an_interrupt_in_the_middle_of_reading_leaves_no_call_without_an_end(opened: Opener) -> None:
    pool = opened(1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    line, hear = pool.lines[0], pool.lines[0].frames.cut
    done: list[int] = []

    def interrupted(data: bytes) -> Any:
        if not done and threading.current_thread() is threading.main_thread():
            done.append(1)
            raise KeyboardInterrupt
        return hear(data)

    line.frames.cut = interrupted  # type: ignore[method-assign]
    adding = sent(add)
    asked: list[Future] = []
    while not done:
        asked.append(pool.submit(adding, (1,)))
        with contextlib.suppress(KeyboardInterrupt):
            asked[-1].result(20)
    assert isinstance(asked[-1].exception(20), WorkerDiedError)
    assert pool.submit(adding, (2,)).result(20) == 3
    assert pool.open_calls == 0


# -- many


def test_a_generator_of_many_values_can_be_awaited_and_asked_for_its_error(opened: Opener) -> None:
    import asyncio

    def count(n: int) -> Any:
        yield from range(n)

    pool = opened(1)

    async def whole() -> Any:
        return await asyncio.wait_for(pool.submit(sent(count), (40,)), 10)

    assert asyncio.run(whole()) == list(range(40))
    stream = pool.submit(sent(count), (40,))
    assert stream.exception(10) is None
    assert stream.result(10) == list(range(40))


def test_a_generator_as_an_input_is_refused(opened: Opener) -> None:
    def count(n: int) -> Any:
        yield from range(n)

    pool = opened(1)
    stream = pool.submit(sent(count), (3,))
    for codec in ("json", "pickle"):
        with pytest.raises(SerializationError, match="count"):
            pool.submit(sent(len, codec) if codec == "pickle" else sent(lambda x: 1, "json"), (stream,))
    assert stream.result(20) == [0, 1, 2]


def test_what_another_process_has_called_can_be_waited_for_in_every_way(
    opened: Opener, home: Path, tmp_path: Path
) -> None:
    import asyncio

    pool, go = opened(2), tmp_path / "go"
    made = pool.submit(sent(wait_for, "json"), (str(go),))
    again = [Future.from_id(made.id, local={"home": home}) for _ in range(5)]
    called: list[Future] = []
    again[0].add_done_callback(called.append)
    dependent = pool.submit(sent(len, "json"), (again[1],))
    go.touch()
    made.result(20)
    assert wait(again[2:3], timeout=20) == (again[2:3], [])
    assert list(as_completed(again[3:4], timeout=20)) == again[3:4]

    async def awaited() -> Any:
        return await asyncio.wait_for(again[4], 20)

    assert asyncio.run(awaited()) == str(go)
    eventually(lambda: called == again[:1])
    assert dependent.result(20) == len(str(go))


def test_a_call_runs_on_a_free_worker_though_another_client_keeps_one_busy(
    opened: Opener, flow: Flow, tmp_path: Path
) -> None:
    pool, go = opened(2), tmp_path / "go"
    assert pool.submit(sent(add), (1,)).result(20) == 2
    blocked = pool.submit(sent(wait_for), (str(go),))
    eventually(lambda: blocked.status == "running")
    joined = Pool.attach(flow, pool.task_id, SessionSpec(workers=2))
    try:
        assert get([joined.submit(sent(add), (n,)) for n in range(4)], 10) == [1, 2, 3, 4]
    finally:
        go.touch()
        joined.leave()
    blocked.result(20)


def test_more_large_values_than_descriptors_are_no_problem(opened: Opener) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    pool = opened(2)
    making, adding = sent(lambda n: np.full(17_000, float(n))), sent(lambda array: float(array[0]))
    assert pool.submit(making, (1,)).result(20)[0] == 1.0
    used = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 400, hard))
    try:
        held = [pool.submit(making, (n,)).result(20) for n in range(500)]
        assert [one[0] for one in held] == list(range(500))
        arrays = [pool.submit(adding, (np.full(17_000, float(n)),)) for n in range(500)]
        assert get(arrays, 20) == list(range(500))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_who_lists_many_calls_does_not_wait_for_long(opened: Opener) -> None:
    pool = opened(1)
    many = [pool.submit(sent(add), (n,)) for n in range(300)]
    assert pool.submit(sent(sum), (many,)).result(20) == sum(range(1, 301))
