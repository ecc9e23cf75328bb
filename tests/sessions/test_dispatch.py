"""Which call runs where and when, and that each runs once: real workers, real deaths."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from flow_core import chunks
from flow_core.definitions import PLAIN, CallOptions, Definition, Retries
from flow_core.dispatch import Pool
from flow_core.errors import (
    CallCancelledError,
    CallTimeoutError,
    RemoteExecutionError,
    SerializationError,
    SessionClosedError,
    WorkerDiedError,
)
from flow_core.pickler import dumps
from flow_core.several import as_completed, gather, get, wait
from flow_core.streamed import Stream
from tests.sessions.conftest import Opener, eventually, sent


def add(x: int, y: int = 0) -> int:
    return x + y


def nap(seconds: float, value: Any = None) -> Any:
    time.sleep(seconds)
    return value


def note(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text + "\n")


def note_and_die(path: str, text: str) -> None:
    note(path, text)
    os.kill(os.getpid(), signal.SIGSEGV)


def until_there(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.005)
    return path


def worker_number() -> int:
    return int(os.environ["FLOW_WORKER"])


def pid() -> int:
    return os.getpid()


@pytest.fixture
def pool(opened: Opener) -> Pool:
    return opened()


# ------------------------------------------------------------------ who runs what


def test_calls_are_answered_each_with_its_own_value(pool: Pool) -> None:
    adding = sent(add)
    futures = [pool.submit(adding, (number,), {"y": 1}) for number in range(5000)]
    assert get(futures) == list(range(1, 5001))


def test_a_call_starts_without_anybody_waiting_for_it(pool: Pool, tmp_path: Path) -> None:
    pool.submit(sent(note), (str(tmp_path / "ran"), "x"))
    eventually((tmp_path / "ran").exists)


def test_queued_calls_go_on_without_anybody_waiting_for_them(pool: Pool, tmp_path: Path) -> None:
    noting, path = sent(note), tmp_path / "ran"
    for number in range(300):
        pool.submit(noting, (str(path), str(number)))
    eventually(lambda: path.exists() and len(path.read_text().split()) == 300)


def test_short_calls_do_not_wait_behind_a_long_one(pool: Pool, tmp_path: Path) -> None:
    adding = sent(add)
    get([pool.submit(adding, (number,)) for number in range(500)])  # now they are known to be short
    waiting = pool.submit(sent(until_there), (str(tmp_path / "go"),))
    assert get([pool.submit(adding, (number,)) for number in range(500)], timeout=20) == list(range(500))
    (tmp_path / "go").touch()
    waiting.result(20)


def test_a_call_that_turns_out_long_gives_back_what_was_sent_behind_it(pool: Pool, tmp_path: Path) -> None:
    def sometimes(path: str, go: str) -> None:
        with open(path, "a") as file:
            file.write(f"{go}\n")
        while go and not os.path.exists(go):
            time.sleep(0.005)

    path, go = tmp_path / "ran", tmp_path / "go"
    definition = sent(sometimes)
    get([pool.submit(definition, (str(path), "")) for _ in range(300)])
    futures = [pool.submit(definition, (str(path), str(go) if number == 7 else "")) for number in range(200)]
    others = [one for number, one in enumerate(futures) if number != 7]
    get(others, timeout=20)
    assert not futures[7].done()
    go.touch()
    futures[7].result(20)
    assert len(path.read_text().splitlines()) == 500


def test_both_workers_work(pool: Pool) -> None:
    naps = [pool.submit(sent(nap), (0.05,)) for _ in range(4)]
    numbers = {pool.submit(sent(worker_number)).result(20) for _ in range(50)}
    get(naps)
    assert numbers <= {0, 1}
    both = [pool.submit(sent(pid)) for _ in range(2)]
    slow = [pool.submit(sent(nap), (0.2, 1)), pool.submit(sent(nap), (0.2, 1))]
    assert get(slow) == [1, 1] and len({one.result() for one in both}) <= 2


def test_calls_of_an_ordered_pool_run_in_the_order_submitted(opened: Opener, tmp_path: Path) -> None:
    pool, noting, path = opened(1, ordered=True), sent(note), tmp_path / "ran"
    late = pool.submit(sent(nap), (0.05, "late"))
    for number in range(200):
        pool.submit(noting, (str(path), str(number) if number != 100 else late))
    pool.submit(noting, (str(path), "end")).result(20)
    order = [str(number) if number != 100 else "late" for number in range(200)]
    assert path.read_text().split() == [*order, "end"]


class Counter:
    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.lock = threading.Lock()  # cannot be pickled, and is not

    def add(self, by: int) -> int:
        with self.lock:
            self.count += by
        return self.count


def test_an_object_lives_on_its_worker(opened: Opener) -> None:
    pool = opened(1, ordered=True)
    make = Definition(dumps(Counter, {})[0], "Counter", kind="make")
    adding = Definition(b"", "add", kind="method", of=make)
    pool.submit(make, (10,))
    first = pool.submit(adding, (4,))
    pool.submit(adding, (first,))
    assert pool.submit(adding, (0,)).result(20) == 28


# ------------------------------------------------------------------ calls that wait for others


@pytest.mark.parametrize("codec", ["json", "pickle"])
def test_a_call_waits_for_its_inputs_wherever_they_stand(pool: Pool, codec: str, tmp_path: Path) -> None:
    def flat(one: Any, *, many: Any) -> Any:
        return [one, many]

    paths = [str(tmp_path / str(number)) for number in range(3)]
    producers = [pool.submit(sent(until_there, codec), (path,)) for path in paths]
    made = pool.submit(
        sent(flat, codec), (producers[0],), {"many": [{"a": producers[1]}, (producers[2], "x")]}
    )
    assert not any(one.done() for one in [*producers, made])  # to submit it has waited for nothing
    for path in paths:
        Path(path).touch()
    inner: Any = [paths[2], "x"] if codec == "json" else (paths[2], "x")
    assert made.result(20) == [paths[0], [{"a": paths[1]}, inner]]


def test_a_failed_input_fails_its_dependents_with_its_error(pool: Pool) -> None:
    def fail() -> None:
        raise KeyError("lost")

    bad = pool.submit(sent(fail))
    dependent = pool.submit(sent(add), (bad, 1))
    further = pool.submit(sent(add), (dependent, 1))
    with pytest.raises(KeyError, match="its input 'fail' failed") as caught:
        dependent.result(20)
    assert caught.value.__cause__ is bad.exception()
    assert isinstance(further.exception(20), KeyError)


def test_inputs_may_come_from_another_session(opened: Opener) -> None:
    one, other = opened(1), opened(1)
    assert other.submit(sent(add), (one.submit(sent(nap), (0.05, 5)), 2)).result(20) == 7


# ------------------------------------------------------------------ deaths


def test_a_death_is_its_own_calls_alone(pool: Pool, tmp_path: Path) -> None:
    adding, path = sent(add), tmp_path / "ran"
    get([pool.submit(adding, (number,)) for number in range(500)])
    noting = sent(note)
    get([pool.submit(noting, (str(path), "before")) for _ in range(200)])
    dying = pool.submit(sent(note_and_die), (str(path), "died"))
    futures = [pool.submit(noting, (str(path), f"after{number}")) for number in range(400)]
    with pytest.raises(WorkerDiedError, match="SIGSEGV") as caught:
        dying.result(20)
    assert caught.value.signal == signal.SIGSEGV and "Segmentation fault" in caught.value.log_tail
    get(futures, timeout=20)
    lines = path.read_text().split()
    assert lines.count("died") == 1 and sorted(set(lines)) == sorted(
        [*{f"after{n}" for n in range(400)}, "before", "died"]
    )
    assert len([line for line in lines if line.startswith("after")]) == 400


def test_a_worker_that_is_killed_while_idle_is_replaced_unnoticed(pool: Pool) -> None:
    numbers = {pool.submit(sent(pid)).result(20) for _ in range(20)}
    for number in numbers:
        os.kill(number, signal.SIGKILL)
    assert pool.submit(sent(add), (1, 2)).result(20) == 3


def test_many_deaths_in_a_row_are_survived(pool: Pool, tmp_path: Path) -> None:
    dying = sent(note_and_die)
    for number in range(12):
        assert isinstance(
            pool.submit(dying, (str(tmp_path / "ran"), str(number))).exception(20), WorkerDiedError
        )
    assert pool.submit(sent(add), (1, 2)).result(20) == 3
    assert (tmp_path / "ran").read_text().split() == [str(number) for number in range(12)]


def test_a_lost_call_is_made_again_only_where_asked(pool: Pool, tmp_path: Path) -> None:
    def die_twice(path: str) -> int:
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) < 3:
            os._exit(3)
        return os.path.getsize(path)

    once = Retries(lost=1, delay_s=0.01)
    enough = Retries(lost=5, delay_s=0.01)
    dying = sent(die_twice)
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(WorkerDiedError, match="exit code 3"):
        pool.submit(dying, (str(first),), None, CallOptions(retries=once)).result(20)
    assert first.read_text() == "xx"
    assert pool.submit(dying, (str(second),), None, CallOptions(retries=enough)).result(20) == 3


def test_an_exception_is_tried_again_only_where_asked_and_of_its_kind(pool: Pool, tmp_path: Path) -> None:
    def third_time(path: str) -> int:
        with open(path, "a") as file:
            file.write("x")
        if os.path.getsize(path) < 3:
            raise OSError("not yet")
        return os.path.getsize(path)

    def tried(name: str, retries: Retries) -> Any:
        path = tmp_path / name
        future = pool.submit(sent(third_time), (str(path),), None, CallOptions(retries=retries))
        future.exception(20)
        return future, path.read_text()

    future, text = tried("a", Retries(exceptions=5, delay_s=0.01))
    assert future.result() == 3 and text == "xxx"
    future, text = tried("b", Retries(exceptions=5, on=(KeyError,), delay_s=0.01))
    assert isinstance(future.exception(), OSError) and text == "x"
    future, text = tried("c", Retries(exceptions=1, delay_s=0.01))
    assert isinstance(future.exception(), OSError) and text == "xx"
    future, text = tried("d", Retries(lost=5, delay_s=0.01))
    assert isinstance(future.exception(), OSError) and text == "x"


def test_the_death_of_the_session_ends_every_call_with_its_reason(pool: Pool) -> None:
    futures = [pool.submit(sent(nap), (60,)) for _ in range(5)]
    eventually(lambda: futures[0].status == "running")
    pool.flow.cancel([pool.task_id])
    for future in futures:
        assert "was cancelled" in str(future.exception(20))
    with pytest.raises(SessionClosedError, match="was cancelled"):
        pool.submit(sent(add), (1,))


def test_a_worker_whose_supervisor_is_killed_goes_too(pool: Pool, home: Path) -> None:
    worker = pool.submit(sent(pid)).result(20)
    supervisor = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    running = pool.submit(sent(nap), (60,))
    eventually(lambda: running.status == "running")
    os.kill(supervisor, signal.SIGKILL)
    assert running.exception(20) is not None
    eventually(lambda: not Path(f"/proc/{worker}").exists())


# ------------------------------------------------------------------ cancel and time


def test_a_queued_call_is_cancelled_and_never_runs(opened: Opener, tmp_path: Path) -> None:
    pool = opened(1)
    blocking = pool.submit(sent(until_there), (str(tmp_path / "go"),))
    queued = pool.submit(sent(note), (str(tmp_path / "ran"), "x"))
    eventually(lambda: blocking.status == "running")
    assert queued.cancel() and queued.status == "cancelled" and queued.done()
    with pytest.raises(CallCancelledError, match="before it started"):
        queued.result()
    (tmp_path / "go").touch()
    blocking.result(20)
    pool.submit(sent(add), (1,)).result(20)
    assert not (tmp_path / "ran").exists() and not queued.cancel()


def test_a_running_call_is_interrupted_and_its_worker_stays(opened: Opener) -> None:
    pool = opened(1)
    before = pool.submit(sent(pid)).result(20)
    running = pool.submit(sent(nap), (60,))
    eventually(lambda: running.status == "running")
    time.sleep(0.1)
    assert running.cancel()
    with pytest.raises(CallCancelledError, match="while it ran"):
        running.result(20)
    assert pool.submit(sent(pid)).result(20) == before


def test_a_call_that_does_not_listen_is_killed_with_its_worker(opened: Opener) -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(60)
            except BaseException:
                continue

    pool = opened(1, grace_s=0.2)
    before = pool.submit(sent(pid)).result(20)
    running = pool.submit(sent(stubborn))
    eventually(lambda: running.status == "running")
    time.sleep(0.1)
    running.cancel()
    with pytest.raises(CallCancelledError, match="had to be killed"):
        running.result(20)
    assert pool.submit(sent(pid)).result(20) != before


def test_a_cancelled_call_never_stops_its_neighbour(opened: Opener) -> None:
    pool = opened(1)
    adding = sent(add)
    get([pool.submit(adding, (number,)) for number in range(300)])
    futures = [pool.submit(adding, (number,)) for number in range(2000)]
    for future in futures[::3]:
        future.cancel()
    for number, future in enumerate(futures):
        if number % 3:
            assert future.result(20) == number
        else:
            assert future.exception(20) is None or isinstance(future.exception(), CallCancelledError)


def test_the_time_of_a_call_begins_when_it_does(opened: Opener) -> None:
    pool = opened(1)
    naps = [pool.submit(sent(nap), (0.4, number), None, CallOptions(timeout_s=2.0)) for number in range(6)]
    assert get(naps, timeout=30) == list(range(6))
    with pytest.raises(CallTimeoutError, match=r"'nap' was stopped at its limit of 0\.2 s"):
        pool.submit(sent(nap), (60,), None, CallOptions(timeout_s=0.2)).result(20)
    assert pool.submit(sent(add), (1,)).result(20) == 1


# ------------------------------------------------------------------ other kinds of functions


def test_async_functions_are_run_to_their_end(pool: Pool) -> None:
    async def later(x: int) -> int:
        await asyncio.sleep(0.01)
        return x + 1

    assert pool.submit(sent(later), (1,)).result(20) == 2


def count_to(limit: int, path: str = "") -> Iterator[int]:
    for number in range(limit):
        if path:
            Path(path).write_text(str(number))
        yield number


def test_a_generator_is_streamed_and_held_back(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "produced"
    stream = pool.submit(sent(count_to), (100_000, str(path)))
    assert isinstance(stream, Stream)
    values = iter(stream)
    assert [next(values) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.1)
    assert int(eventually(path.read_text)) < 60
    assert stream.cancel()
    eventually(stream.done)
    assert pool.submit(sent(add), (1,)).result(20) == 1


def test_who_leaves_the_loop_early_ends_the_generator(opened: Opener) -> None:
    pool = opened(1)
    stream = pool.submit(sent(count_to), (100_000,))
    assert isinstance(stream, Stream)
    for value in stream:
        if value == 3:
            break
    assert pool.submit(sent(add), (1,)).result(20) == 1
    assert isinstance(stream.exception(20), CallCancelledError)


def test_functions_that_nobody_can_call_any_more_are_forgotten(opened: Opener) -> None:
    def known() -> int:
        import gc

        gc.collect()
        return sum(type(one).__name__ == "Definition" for one in gc.get_objects())

    pool = opened(1, lease_s=0.4)
    for number in range(50):
        assert pool.submit(sent(lambda number=number: number)).result(20) == number
    counting = sent(known)
    eventually(lambda: pool.submit(counting).result(20) < 10)


def test_a_call_that_comes_back_cancelled_does_not_run(opened: Opener, tmp_path: Path) -> None:
    pool, path, go = opened(2), tmp_path / "ran", tmp_path / "go"
    noting = sent(note)
    get([pool.submit(noting, (str(path), "warm")) for _ in range(300)])

    def maybe(path: str, go: str) -> None:
        while go and not os.path.exists(go):
            time.sleep(0.005)
        if not go:
            with open(path, "a") as file:
                file.write("ran\n")

    definition = sent(maybe)
    get([pool.submit(definition, (str(tmp_path / "other"), "")) for _ in range(300)])
    blocked = [pool.submit(definition, (str(path), str(go))) for _ in range(2)]
    behind = [pool.submit(definition, (str(path), "")) for _ in range(50)]
    for future in behind:
        assert future.cancel()
    eventually(lambda: all(future.done() for future in behind))
    go.touch()
    get(blocked, timeout=20)
    assert all(isinstance(future.exception(), CallCancelledError) for future in behind)
    assert "ran" not in path.read_text().split()


def test_a_generator_is_a_list_to_who_wants_all_of_it(pool: Pool) -> None:
    assert pool.submit(sent(count_to, "json"), (200,)).result(20) == list(range(200))
    assert pool.submit(sent(count_to), (0,)).result(20) == []


def test_a_generators_values_come_before_its_error(pool: Pool) -> None:
    async def two() -> AsyncIterator[int]:
        yield 1
        yield 2
        raise LookupError("no more")

    stream = pool.submit(sent(two))
    assert isinstance(stream, Stream)
    values = iter(stream)
    assert [next(values), next(values)] == [1, 2]
    with pytest.raises(LookupError, match="no more"):
        next(values)


# ------------------------------------------------------------------ maps


def test_a_map_keeps_the_order_and_takes_little_ahead(pool: Pool) -> None:
    taken = [0]

    def items() -> Iterator[int]:
        for number in range(1_000_000):
            taken[0] = number
            yield number

    values = chunks.run(lambda: (pool, sent(add)), items())
    assert [next(values) for _ in range(1000)] == list(range(1000))
    assert taken[0] < 60_000
    del values


def test_the_messages_of_a_map_go_to_all_workers_alike(pool: Pool) -> None:
    adding = sent(add)
    eventually(lambda: len(pool.lines) == 2)
    several = [chunks.Chunk(pool, adding, PLAIN, list(range(1000)), star=False) for _ in range(6)]
    with pool.lock:  # so that no answer is worked in meanwhile
        adding.estimate = 0.1
        for chunk in several:
            chunk.write(pool.arena)
            pool.enter(chunk)
        assert [len(line.inflight) for line in pool.lines.values()] == [3, 3]
    assert get(several) == [[list(range(1000)), {}]] * 6


def test_a_slow_item_holds_up_nobody(pool: Pool, tmp_path: Path) -> None:
    go = str(tmp_path / "go")

    def maybe(number: int) -> int:
        while number == 700 and not os.path.exists(go):
            time.sleep(0.005)
        return number

    seen: list[int] = []
    for value in chunks.run(lambda: (pool, sent(maybe)), range(1000), ordered=False):
        seen.append(value)
        if len(seen) > 600:
            Path(go).touch()
    assert sorted(seen) == list(range(1000))


def test_an_items_error_stands_in_its_place(pool: Pool) -> None:
    def odd(number: int) -> int:
        if number % 2:
            raise ValueError(number)
        return number

    answers = list(chunks.run(lambda: (pool, sent(odd, "json")), range(1000), return_exceptions=True))
    assert answers[::2] == list(range(0, 1000, 2))
    assert all(isinstance(one, ValueError) for one in answers[1::2])
    with pytest.raises(ValueError, match="1"):
        list(chunks.run(lambda: (pool, sent(odd)), range(1000)))


def test_an_items_index_error_is_its_own(pool: Pool) -> None:
    def index(number: int) -> int:
        return [1, 2, 3][number]

    answers = list(chunks.run(lambda: (pool, sent(index)), range(6), return_exceptions=True))
    assert answers[:3] == [1, 2, 3] and all(isinstance(one, IndexError) for one in answers[3:])


def test_a_map_over_a_death_loses_only_that_chunk(pool: Pool) -> None:
    def die_at_500(number: int) -> int:
        if number == 500:
            os._exit(9)
        return number

    answers = list(chunks.run(lambda: (pool, sent(die_at_500)), range(2000), return_exceptions=True))
    lost = [one for one in answers if isinstance(one, WorkerDiedError)]
    assert 1 <= len(lost) < 2000 and len(answers) == 2000
    assert answers[-1] == 1999


# ------------------------------------------------------------------ waiting


def test_several_threads_may_wait_for_one_and_for_many(pool: Pool) -> None:
    adding, shared = sent(add), pool.submit(sent(nap), (0.2, "shared"))
    found: list[Any] = []

    def work(base: int) -> None:
        for number in range(300):
            assert pool.submit(adding, (base, number)).result(20) == base + number
        found.append(shared.result(20))

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["shared"] * 8


def test_wait_keeps_the_order_and_counts(pool: Pool) -> None:
    slow, fast = pool.submit(sent(nap), (0.5, 1)), pool.submit(sent(nap), (0.01, 2))
    assert wait([slow, fast], num_returns=1) == ([fast], [slow])
    assert wait([slow, fast], timeout=0.01) == ([fast], [slow])
    assert wait([slow, fast]) == ([slow, fast], [])
    assert wait([]) == ([], [])
    with pytest.raises(ValueError, match="num_returns=0"):
        wait([slow], num_returns=0)


def test_as_completed_yields_them_as_they_end(pool: Pool) -> None:
    naps = [pool.submit(sent(nap), (seconds, seconds)) for seconds in (0.4, 0.05)]
    assert [one.result() for one in as_completed(naps)] == [0.05, 0.4]
    assert gather(*naps) == [0.4, 0.05]


def test_ones_own_patience_ends_and_the_call_goes_on(pool: Pool) -> None:
    napping = pool.submit(sent(nap), (0.4, "done"))
    with pytest.raises(TimeoutError, match="waited 0.05 s and the call 'nap' is"):
        napping.result(0.05)
    assert napping.result(20) == "done"


def test_callbacks_are_called_and_may_call_again(pool: Pool) -> None:
    adding, seen = sent(add), []

    def again(future: Any) -> None:
        seen.append(pool.submit(adding, (future.result(), 1)).result(20))

    first = pool.submit(adding, (1,))
    first.add_done_callback(again)
    eventually(lambda: seen)
    assert seen == [2]


def test_futures_can_be_awaited(pool: Pool) -> None:
    async def all_of_them() -> list[int]:
        return list(await asyncio.gather(*[pool.submit(sent(add), (number,)) for number in range(20)]))

    assert asyncio.run(all_of_them()) == list(range(20))


def test_what_cannot_travel_is_named_before_anything_starts(pool: Pool) -> None:
    with pytest.raises(SerializationError, match=r"args\[0\]\['lock'\] is a _thread.lock"):
        pool.submit(sent(add), ({"lock": threading.Lock()},))
    with pytest.raises(SerializationError, match=r"kwargs\['y'\]"):
        pool.submit(sent(add, "json"), (1,), {"y": object()})


def test_a_value_that_cannot_travel_back_is_named(pool: Pool) -> None:
    def lock() -> Any:
        return {"inner": threading.Lock()}

    with pytest.raises(Exception, match=r"result\['inner'\] is a _thread.lock"):
        pool.submit(sent(lock)).result(20)
    with pytest.raises(Exception, match="Save it to disk"):
        pool.submit(sent(lock, "json")).result(20)
    assert pool.submit(sent(add), (1,)).result(20) == 1


# ------------------------------------------------------------------ logs


def test_what_a_call_prints_is_that_calls(pool: Pool) -> None:
    def talk(word: str) -> str:
        print("I say", word)
        os.system(f"echo and the shell says {word}")
        return word

    one, other = pool.submit(sent(talk), ("one",)), pool.submit(sent(talk), ("other",))
    assert get([one, other]) == ["one", "other"]
    assert sorted(one.logs().splitlines()) == ["I say one", "and the shell says one"]
    assert sorted(other.logs().splitlines()) == ["I say other", "and the shell says other"]
    assert pool.submit(sent(add), (1,)).logs() == ""


def test_the_error_shows_the_end_of_the_calls_own_log(pool: Pool) -> None:
    def talk_and_fail() -> None:
        print("nearly there")
        raise ValueError("no")

    pool.submit(sent(nap), (0.0,)).result(20)
    with pytest.raises(RemoteExecutionError) as caught:
        pool.submit(sent(talk_and_fail)).result(20)
    assert "nearly there" in caught.value.log_tail and "nearly there" in str(caught.value)
