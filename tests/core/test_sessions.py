"""Functions of a session, as their users call them: real workers in processes of their own."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import os
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core import Flow
from flow_core.definitions import Retries
from flow_core.errors import (
    CallCancelledError,
    CallTimeoutError,
    RemoteExecutionError,
    SerializationError,
    SessionClosedError,
    SpecRejected,
    ValidationError,
    WorkerDiedError,
)
from flow_core.function_options import Serialization
from flow_core.functions import RemoteFunction
from flow_core.futures import Future
from flow_core.sessions import SandboxDefaults, Session
from flow_core.several import as_completed, gather, get, wait

FACTOR = 3


@pytest.fixture
def session(shared_session: Session) -> Session:
    return shared_session


def add(x: Any, y: Any = 10, *, z: int = 0) -> int:
    """Add."""
    value: int = x + y + z
    return value


def where() -> int:
    return os.getpid()


# ------------------------------------------------------------ how functions are made


def test_a_function_is_decorated_with_and_without_parentheses(session: Session) -> None:
    @session.function
    def plain(x: int) -> int:
        return x * FACTOR

    @session.function()
    def called(x: int) -> int:
        return x * FACTOR

    assert (plain.remote(2).result(), called.remote(3).result()) == (6, 9)


def test_a_direct_call_runs_here_and_local_does_too(session: Session) -> None:
    here = session.function(where)
    assert here() == here.local() == os.getpid()
    assert here.remote().result() != os.getpid()


def test_a_handle_looks_like_its_function(session: Session) -> None:
    handle = session.function(add)
    assert (vars(handle)["__name__"], handle.__doc__, handle.__wrapped__) == ("add", "Add.", add)
    assert inspect.signature(handle) == inspect.signature(add)
    assert repr(handle) == "<RemoteFunction add>"


def test_an_unknown_option_is_refused_with_the_close_ones(session: Session) -> None:
    with pytest.raises(ValidationError, match=r"no field 'serialisation'(.|\n)*Did you mean serialization"):
        session.function(serialisation="json")  # type: ignore[call-overload]
    with pytest.raises(ValidationError, match="timeout_s must be greater than 0"):
        session.function(timeout=0)
    with pytest.raises(ValidationError, match="retries must be a number of further attempts"):
        session.function(retries="3")  # type: ignore[call-overload]
    with pytest.raises(ValidationError, match="retries must not be negative"):
        session.function(retries=-1)
    with pytest.raises(ValidationError, match="SessionDefaults has no field 'worker'"):
        Session(worker=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="it may ask for a GPU and nothing else"):
        session.function(resources={"cpu": 2})


def test_a_handle_travels_as_its_plain_function(session: Session) -> None:
    handle = session.function(add)
    assert pickle.loads(pickle.dumps(handle)) is add

    @session.function
    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    @session.function
    def uses(x: int) -> list[int]:
        return [handle(x), handle.__wrapped__(x) if hasattr(handle, "__wrapped__") else 0, factorial(x)]

    assert factorial.remote(5).result() == 120
    assert uses.remote(3).result() == [13, 0, 6]


def test_options_make_another_handle_and_leave_the_first_as_it_was(session: Session) -> None:
    first = session.function(serialization="json")(add)
    second = first.options(serialization=Serialization.PICKLE, name="sum")
    assert second.remote(1, np.int64(2)).result() == 3
    with pytest.raises(SerializationError, match=r"args\[1\] is a numpy.int64"):
        first.remote(1, np.int64(2))
    assert repr(second) == "<RemoteFunction sum>"
    with pytest.raises(ValidationError, match="has no field 'gpus'"):
        first.options(gpus=1)


# ------------------------------------------------------------ one call


def test_arguments_of_all_kinds_arrive(session: Session) -> None:
    @session.function
    def show(a: Any, /, b: Any = None, *rest: Any, c: Any, **more: Any) -> Any:
        return [a, b, list(rest), c, more]

    value: Any
    for value in (None, False, "", 0, [], {}, "é\ud800\0", 2**70, -0.0, {"a": [None, {"b": "c"}]}):
        assert show.remote(value, value, value, c=value, d=value).result() == [
            *(value, value, [value], value),
            {"d": value},
        ]
    assert show.remote(1, c=2).result() == [1, None, [], 2, {}]


@pytest.mark.parametrize("value", [None, False, "", 0, [], {}, True, 0.0])
def test_values_that_look_like_nothing_come_back(session: Session, value: Any) -> None:
    @session.function
    def same(x: Any) -> Any:
        return x

    back = same.remote(value).result()
    assert back == value
    assert type(back) is type(value)


def test_arguments_that_do_not_fit_are_refused_in_the_caller(session: Session) -> None:
    handle = session.function(add)
    with pytest.raises(TypeError, match=r"do not fit add\(x: .*\) -> .*: missing a required argument: 'x'"):
        handle.remote()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'w'"):
        handle.remote(1, w=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="too many positional arguments"):
        handle.remote(1, 2, 3)  # type: ignore[call-arg]


def test_a_decorator_that_changes_the_arguments_is_asked_not_the_function_inside(session: Session) -> None:
    def with_one(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def wrapper(*args: int) -> int:
            return function(1, *args)

        return wrapper

    @session.function
    @with_one
    def two(a: int, b: int) -> int:
        return a + b

    assert two.remote(5).result() == 6


def test_json_refuses_in_the_caller_what_it_would_change(session: Session) -> None:
    @session.function
    def same(x: Any) -> Any:
        return x

    for value, message in (
        ({1: 2}, r"args\[0\] has a key that is no string: 1"),
        (float("nan"), r"args\[0\] is nan"),
        ({1}, r"args\[0\] is a set; use sorted"),
        ([b"x"], r"args\[0\]\[0\] is a bytes"),
    ):
        with pytest.raises(
            SerializationError, match=f"Cannot serialize arguments. Save to disk and pass path. {message}"
        ):
            same.remote(value)
    with pytest.raises(SerializationError, match=r"kwargs\['x'\] is a complex"):
        same.remote(x=1j)


def test_json_refuses_a_result_that_it_would_change(session: Session) -> None:
    from flow_core.errors import ResultError

    @session.function
    def keys() -> Any:
        return {"a": {1: 2}}

    with pytest.raises(
        ResultError, match=r"Cannot serialize the result.*result\['a'\] has a key that is no string: 1"
    ):
        keys.remote().result()


def test_tuples_arrive_as_lists_by_json_and_as_tuples_by_pickle(session: Session) -> None:
    def kind(x: Any) -> Any:
        return [type(x).__name__, x]

    assert session.function(kind).remote((1, 2)).result() == ["list", [1, 2]]
    assert session.function(serialization="pickle")(kind).remote((1, 2)).result() == ["tuple", (1, 2)]


def test_pickle_takes_arrays_classes_and_functions(session: Session) -> None:
    class Pair:
        def __init__(self, a: Any) -> None:
            self.a = a

    @session.function(serialization=Serialization.PICKLE)
    def double(arr: np.ndarray[Any, Any], pair: Pair, function: Callable[[int], int]) -> Any:
        return arr * 2, Pair(function(pair.a))

    array, pair = double.remote(np.arange(3), Pair(4), lambda n: n * FACTOR).result()
    assert array.tolist() == [0, 2, 4]
    assert (type(pair), pair.a) == (Pair, 12)


def test_arguments_may_be_changed_once_the_call_is_made(session: Session) -> None:
    @session.function(serialization="pickle")
    def total(values: Any, array: Any) -> Any:
        return sum(values), array.sum()

    values, array = [1, 2], np.ones(200_000)
    future = total.remote(values, array)
    values.append(100)
    array[:] = 0
    assert future.result() == (3, 200_000.0)


def test_late_values_travel_with_the_next_call(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"rate": 1}

    @session.function
    def scaled(x: int) -> int:
        return x * settings["rate"] * FACTOR

    assert scaled.remote(1).result() == 3
    settings["rate"] = 2
    assert scaled.remote(1).result() == 6
    monkeypatch.setitem(globals(), "FACTOR", 10)
    assert scaled.remote(1).result() == 20


def test_state_of_the_worker_does_not_come_back_and_new_definitions_start_afresh(session: Session) -> None:
    counter = [0]

    @session.function(workers=1)
    def count() -> int:
        counter[0] += 1
        return counter[0]

    assert [count.remote().result() for _ in range(3)] == [1, 2, 3]  # on the worker's copy
    assert counter == [0]
    counter[0] = 10
    assert count.remote().result() == 11


def test_async_functions_run_and_can_be_awaited_here(session: Session) -> None:
    @session.function
    async def triple(n: int) -> int:
        await asyncio.sleep(0)
        return n * FACTOR

    async def here() -> Any:
        async with Session(flow=session.flow, workers=1) as own:
            later = own.function(add).remote(1)
            return await asyncio.gather(triple.remote(1), triple.remote(2)), await later, await triple(5)

    assert triple.remote(4).result() == 12
    assert asyncio.run(here()) == ([3, 6], 11, 15)


def test_a_generator_is_streamed(session: Session) -> None:
    @session.function
    def numbers(n: int) -> Iterator[int]:
        for i in range(n):
            print("at", i)
            yield i

    @session.function
    async def later(n: int) -> AsyncIterator[int]:
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    stream = numbers.remote(1000)
    values = iter(stream)
    assert next(values) == 0
    assert not stream.done()  # it is held back
    assert list(values) == list(range(1, 1000))
    everything: Any = later.remote(5).result()
    assert everything == [0, 1, 2, 3, 4]

    async def here() -> list[int]:
        return [value async for value in numbers.remote(4)]

    assert asyncio.run(here()) == [0, 1, 2, 3]


def test_what_a_call_prints_is_readable_and_does_not_disturb_its_value(session: Session) -> None:
    @session.function
    def talk(what: str) -> str:
        print(what, flush=True)
        os.write(2, b"straight to the descriptor\n")
        return "value"

    future = talk.remote("hello")
    assert future.result() == "value"
    assert future.logs() == "hello\nstraight to the descriptor\n"
    assert talk.remote("again").result() == "value"


# ------------------------------------------------------------ many calls


def test_map_unpacks_tuples_and_nothing_else(session: Session) -> None:
    handle = session.function(add)
    length = session.function(lambda x: len(x))  # noqa: PLW0108 - a builtin has no signature to test
    assert get(handle.map([(1, 2), (3, 4), 5])) == [3, 7, 15]
    assert get(handle.map((x,) for x in range(3))) == [10, 11, 12]
    assert get(length.map(["ab", [1, 2, 3], {"k": 1}, ([1],)])) == [2, 3, 1, 1]
    assert handle.map([]) == []
    assert get(handle.starmap([[1, 2], (3, 4), (5,)])) == [3, 7, 15]


def test_imap_yields_values_lazily_in_order_or_as_they_come(session: Session) -> None:
    @session.function
    def slow_first(n: int) -> int:
        if n == 0:
            time.sleep(0.1)
        return n

    assert list(slow_first.imap(range(20))) == list(range(20))
    unordered = list(slow_first.imap(range(20), order_outputs=False))
    assert sorted(unordered) == list(range(20))
    assert unordered != list(range(20))


def test_imap_asks_for_no_more_items_than_it_may_have_under_way(session: Session) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for n in itertools.count():  # no end
            taken += 1
            yield n

    handle = session.function(add)
    for ordered in (True, False):
        taken = 0
        values = handle.imap(items(), max_concurrent=7, order_outputs=ordered)
        assert taken == 0  # nothing has started
        first = list(itertools.islice(values, 100))
        assert sorted(first)[:3] == [10, 11, 12]
        assert taken <= 107
        values.close()  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="max_concurrent=0 must be"):
        handle.imap([], max_concurrent=0)


@pytest.mark.parametrize(("timeout", "most"), [(None, 30_000), (30, 1100)], ids=["in chunks", "one by one"])
def test_imap_over_very_many_items_holds_a_bounded_number(
    session: Session, timeout: float | None, most: int
) -> None:
    class Item:
        alive = 0
        most = 0

        def __init__(self) -> None:
            Item.alive += 1
            Item.most = max(Item.most, Item.alive)

        def __del__(self) -> None:
            Item.alive -= 1

        def __reduce__(self) -> Any:
            return int, (1,)

    same = session.function(serialization="pickle", timeout=timeout)(lambda n: n)
    many = 3 * most
    assert sum(same.imap(Item() for _ in range(many))) == many
    assert Item.most <= most


def test_a_map_over_very_many_items_has_a_bounded_number_under_way(session: Session) -> None:
    same: Any = session.function(lambda n: n)
    same.remote(0).result(30)
    pool, most = same._pool, 0

    def items() -> Iterator[int]:
        nonlocal most
        for number in range(40_000):
            most = max(most, pool.open_calls)
            yield number

    futures = same.map(items())
    assert most <= 10_000 + 2 * 512 + 1, "10,000 in the queue, and what the two workers have"
    assert get(futures) == list(range(40_000))


def test_imap_raises_the_first_failure_or_yields_it(session: Session) -> None:
    @session.function
    def invert(n: int) -> float:
        return 1 / n

    with pytest.raises(ZeroDivisionError):
        list(invert.imap([1, 0, 2]))
    for ordered in (True, False):
        values: list[Any] = list(invert.imap([1, 0, 2], return_exceptions=True, order_outputs=ordered))
        assert len([value for value in values if isinstance(value, ZeroDivisionError)]) == 1
        assert sorted(value for value in values if isinstance(value, float)) == [0.5, 1.0]


@pytest.mark.parametrize("timeout", [None, 30], ids=["in chunks", "one by one"])
def test_leaving_an_imap_early_cancels_what_is_under_way(
    session: Session, tmp_path: Path, timeout: float | None
) -> None:
    noted = tmp_path / "noted"

    @session.function(timeout=timeout)
    def note(n: int) -> None:
        with noted.open("a") as file:
            file.write(f"{n}\n")
        time.sleep(0.05)

    for _ in note.imap(range(100), max_concurrent=50):
        break
    assert get([session.function(add).remote(1) for _ in range(2)], timeout=30) == [11, 11]
    assert len(noted.read_text().split()) < 30


def test_wait_as_completed_gather_and_get(session: Session) -> None:
    @session.function
    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    slow, quick = sleep.remote(0.1), sleep.remote(0)
    done, pending = wait([slow, quick], num_returns=1)
    assert (done, pending) == ([quick], [slow])
    assert list(as_completed([slow, quick])) == [quick, slow]
    assert gather(slow, quick) == get([slow, quick]) == [0.1, 0]
    assert get(quick) == 0
    assert wait([slow, quick]) == ([slow, quick], [])
    assert wait([]) == ([], [])


def test_a_future_as_an_argument_stands_for_its_value(session: Session) -> None:
    handle = session.function(add)
    total = session.function(lambda values: sum(values["a"]))
    first = handle.remote(1)
    assert total.remote({"a": [first, handle.remote(first), 3]}).result() == 11 + 21 + 3
    failed = session.function(lambda: 1 / 0).remote()
    with pytest.raises(ZeroDivisionError) as caught:
        handle.remote(failed).result()
    assert "was not called: its input" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_many_threads_may_call_at_once(session: Session) -> None:
    handle = session.function(add)
    values: list[int] = []

    def call(n: int) -> None:
        values.extend(get([handle.remote(n, i) for i in range(50)]))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(values) == sorted(n + i for n in range(8) for i in range(50))


# ------------------------------------------------------------ limits and retries


def test_a_call_that_runs_past_its_timeout_is_stopped_and_others_go_on(session: Session) -> None:
    slow = session.function(timeout=0.2)(lambda: time.sleep(60))
    handle = session.function(add)
    future = slow.remote()
    with pytest.raises(CallTimeoutError, match=r"'<lambda>' was stopped at its limit of 0.2 s"):
        future.result(30)
    assert handle.remote(1).result(30) == 11


def test_the_timeout_is_counted_from_the_start_of_the_users_code(session: Session) -> None:
    @session.function(timeout=2.0)
    def quick() -> str:
        return "in time"

    block = session.function(lambda: time.sleep(0.1))
    blocking = block.map(() for _ in range(8))
    assert get(quick.map(() for _ in range(4))) == ["in time"] * 4
    get(blocking)


def test_a_call_is_retried_after_exceptions_only_where_that_is_asked(
    session: Session, tmp_path: Path
) -> None:
    def fails_twice(path: str) -> int:
        attempts = int(Path(path).read_text() or 0) + 1 if Path(path).exists() else 1
        Path(path).write_text(str(attempts))
        if attempts < 3:
            raise OSError("not yet")
        return attempts

    quick = Retries(exceptions=2, delay_s=0.01)
    assert session.function(retries=quick)(fails_twice).remote(str(tmp_path / "a")).result(30) == 3
    with pytest.raises(OSError, match="not yet"):
        session.function(fails_twice).remote(str(tmp_path / "b")).result(30)
    other = Retries(exceptions=2, on=(KeyError,), delay_s=0.01)
    with pytest.raises(OSError, match="not yet"):
        session.function(retries=other)(fails_twice).remote(str(tmp_path / "c")).result(30)
    assert (tmp_path / "c").read_text() == "1"


def test_a_lost_worker_is_retried_only_where_that_is_asked(session: Session, tmp_path: Path) -> None:
    def dies_once(path: str) -> str:
        if not Path(path).exists():
            Path(path).write_text("")
            os._exit(3)
        return "second"

    with pytest.raises(WorkerDiedError, match="exit code 3"):
        session.function(dies_once).remote(str(tmp_path / "a")).result(30)
    again = Retries(lost=1, delay_s=0.01)
    assert session.function(retries=again)(dies_once).remote(str(tmp_path / "b")).result(30) == "second"
    exceptions = Retries(exceptions=3)
    with pytest.raises(WorkerDiedError):
        session.function(retries=exceptions)(dies_once).remote(str(tmp_path / "c")).result(30)


def test_a_queued_and_a_running_call_can_be_cancelled(session: Session, tmp_path: Path) -> None:
    started = tmp_path / "started"

    @session.function(workers=1)
    def sleep(path: str) -> None:
        Path(path).touch()
        time.sleep(60)

    running, queued = sleep.remote(str(started)), sleep.remote(str(tmp_path / "never"))
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert queued.cancel()
    assert running.cancel()
    for future in (queued, running):
        with pytest.raises(CallCancelledError):
            future.result(30)
        assert future.status == "cancelled"
        assert not future.cancel()
    assert not (tmp_path / "never").exists()
    assert sleep.options(timeout=0.1).remote(str(started)).exception(30) is not None  # it takes calls again


# ------------------------------------------------------------ workers


def test_defaults_are_merged_and_what_a_function_asks_for_wins() -> None:
    defaults = SandboxDefaults(env={"A": "1", "B": "1"}, timeout_s=5, tags=("x",), workers=3)
    session = Session(defaults, env={"B": "2"}, retries=2, provider="local")
    made: Any = session.function(env={"C": "3"}, container_image="python:3.11")(add)
    assert session.defaults.env == {"A": "1", "B": "2"}
    assert made._options.env == {"A": "1", "B": "2", "C": "3"}
    assert (made._options.image, made._options.timeout_s, made._options.workers) == ("python:3.11", 5, 3)
    assert made._of_call.retries == Retries(lost=2, exceptions=2)
    other: Any = made.options(env={"C": "4"}, timeout=1)
    assert (other._options.env["C"], other._options.timeout_s, other._options.image) == (
        "4",
        1,
        "python:3.11",
    )
    spec = session.defaults.spec(made._options, "cpu")
    assert spec.task["labels"] == {"x": ""}
    assert (
        session.function(resources={"gpu": {"count": 2, "type": "A100"}})(add)._options.instance_type
        == "2xa100"
    )
    assert "'A': '***'" in repr(defaults)


def test_functions_that_ask_for_the_same_share_workers_and_others_have_their_own(home: Path) -> None:
    def variable() -> Any:
        return [os.environ.get("WHO"), os.environ.get("BASE")]

    with Session(workers=1, env={"BASE": "b"}) as session:
        first, second = session.function(where), session.function(where)
        assert len({first.remote().result(), second.remote().result(), first.remote().result()}) == 1
        own = session.function(env={"WHO": "me"})
        assert own(where).remote().result() not in {first.remote().result()}
        assert own(variable).remote().result() == ["me", "b"]
        assert len(session._pools) == 2
        assert len(Flow().list_tasks()) == 2
    assert all(task.is_terminal for task in Flow().list_tasks())


def test_the_gpus_of_a_session_are_shared_out_to_its_workers(home: Path) -> None:
    with Session(gpu="a100", workers=2) as session:
        barrier = str(home / "met")

        @session.function
        def gpu(path: str) -> str:
            Path(path + os.environ["CUDA_VISIBLE_DEVICES"]).touch()
            deadline = time.monotonic() + 20
            while len(list(Path(path).parent.glob("met*"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            return os.environ["CUDA_VISIBLE_DEVICES"]

        assert sorted(get([gpu.remote(barrier), gpu.remote(barrier)])) == ["0", "1"]
        with pytest.raises(SpecRejected, match="3 GPUs"):
            session.function(gpu="3xa100", workers=1)(where).remote()


def test_no_task_is_started_before_the_first_call(home: Path) -> None:
    with Session() as session:
        session.function(where)
        assert Flow().list_tasks() == []
        assert session.task_id == Flow().list_tasks()[0].task_id


def test_a_closed_session_takes_no_calls_and_leaves_nothing(home: Path) -> None:
    session = Session(workers=1)
    handle, unused = session.function(where), session.function(env={"A": "1"})(where)
    pid = handle.remote().result()
    slow = session.function(lambda: time.sleep(60)).remote()
    session.close()
    session.close()
    with pytest.raises(CallCancelledError, match="is closed"):
        slow.result(10)
    for closed in (handle, unused):
        with pytest.raises(SessionClosedError, match="is closed"):
            closed.remote()
    with pytest.raises(SessionClosedError):
        _ = session.task_id
    assert not Path(f"/proc/{pid}").exists()
    assert all(task.is_terminal for task in Flow().list_tasks())


def test_a_session_whose_workers_were_idle_starts_them_anew(home: Path) -> None:
    with Session(workers=1, idle_limit=0.3) as session:
        handle = session.function(where)
        first = handle.remote().result()
        task = Flow().get_task(session.task_id)
        task.wait(30)
        deadline = time.monotonic() + 10
        while handle._pool.over is None and time.monotonic() < deadline:  # type: ignore[union-attr]
            time.sleep(0.01)
        assert handle.remote().result() != first
        assert len(Flow().list_tasks()) == 2


def test_another_client_can_join_a_session_and_leave_it(session: Session) -> None:
    with Session.from_id(session.task_id, flow=session.flow, workers=1) as other:
        assert other.task_id == session.task_id
        assert other.function(add).remote(1).result() == 11
    with pytest.raises(SessionClosedError):
        other.function(add).remote(1)
    assert session.function(add).remote(2).result() == 12


def test_a_session_does_not_travel(session: Session) -> None:
    @session.function
    def drags() -> Any:
        return session

    with pytest.raises(
        SerializationError,
        match=r"drags \(closure variable 'session'\) is a flow_core.*a session cannot travel",
    ):
        drags.remote()


def test_a_call_can_be_collected_by_its_id(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    future = session.function(add).remote(4)
    monkeypatch.setenv("FLOW_LOCAL_HOME", str(session.flow.settings.local.home))
    again = Future.from_id(future.id, provider="local")
    assert again.result(30) == 14
    assert isinstance(session.function(add), RemoteFunction)
    with pytest.raises(RemoteExecutionError):
        Future.from_id(session.function(lambda: 1 / 0).remote().id, provider="local").result(30)
