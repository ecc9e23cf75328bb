"""Services: functions, classes and objects on warm workers, as those who use them see it."""

from __future__ import annotations

import asyncio
import collections
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core import (
    CallCancelledError,
    Flow,
    Future,
    ObjectFuture,
    RemoteExecutionError,
    Runner,
    RunnerService,
    SerializationError,
    SessionClosedError,
    SessionContext,
    Stream,
    TimeoutError,
    ValidationError,
    WorkerDiedError,
)
from tests.conftest import processes_under
from tests.core.conftest import without_our_modules


@pytest.fixture(scope="module")
def shared_runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A Runner in a folder and a home of its own, for all tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "settings.txt").write_text("from the folder")
    (folder / "imported_there.py").write_text("VALUE = 'a module of the folder'")
    home = tmp_path_factory.mktemp("a home")
    env = without_our_modules(tmp_path_factory.mktemp("site"))
    with Runner(
        "tests", code_root=folder, flow=Flow("local", local={"home": home}), workers=3, env=env
    ) as runner:
        yield runner
    until(lambda: processes_under(home) == [])


@pytest.fixture
def rr(shared_runner: Runner) -> Runner:
    return shared_runner


class Counter:
    def __init__(self, initial: int = 0) -> None:
        self._count = initial

    def add(self, a: int) -> int:
        self._count = self._count + a
        return self._count

    def add_slowly(self, a: int) -> int:
        time.sleep(0.05)
        return self.add(a)

    def get_counter(self) -> int:
        return self._count

    def fail(self, a: int) -> None:
        self._count += a
        raise LookupError("no such thing")

    def die(self) -> None:
        os._exit(3)

    def pid(self) -> int:
        return os.getpid()


def double(x: Any) -> Any:
    return x * 2


def total(values: Any) -> Any:
    return sum(values)


def where() -> int:
    return os.getpid()


def fails(*_: Any) -> None:
    raise LookupError("no such thing")


def later(seconds: float, value: Any = None) -> Any:
    time.sleep(seconds)
    return value


# ------------------------------------------------------------ one live object


def test_a_class_is_made_on_the_worker_and_keeps_its_state(rr: Runner) -> None:
    counter = rr.service(Counter)
    assert [counter.add(1).get(), counter.add(3).get(), counter.get_counter().get()] == [1, 4, 4]
    assert counter.pid().get() != os.getpid()


def test_an_object_travels_as_it_is_and_the_one_here_never_changes(rr: Runner) -> None:
    ours = Counter(10)
    service = rr.service(ours)
    ours.add(100)
    assert (service.add(4).get(), ours.get_counter()) == (14, 110)


def test_calls_run_in_the_order_submitted_without_waiting_in_between(rr: Runner) -> None:
    counter = rr.service(Counter)
    calls = [counter.add_slowly(1), counter.add(10), *(counter.add(0) for _ in range(500)), counter.add(5)]
    assert [call.get() for call in calls] == [1, *[11] * 501, 16]


def test_calls_keep_their_order_while_one_of_them_waits_for_its_argument(rr: Runner) -> None:
    counter, slow = rr.service(Counter), rr.service(later)
    calls = [counter.add(slow(0.1, 5)), counter.add(1), counter.add(slow(0.05, 2)), counter.get_counter()]
    assert rr.get(calls) == [5, 6, 8, 8]


def test_a_class_is_made_with_arguments_which_may_be_futures(rr: Runner) -> None:
    start = rr.service(double)(21)
    assert rr.service(Counter, args=(10,)).get_counter().get() == 10
    assert rr.service(Counter, kwargs={"initial": start}).add(1).get() == 43


def test_two_services_of_one_class_share_nothing(rr: Runner) -> None:
    first, second = rr.service(Counter), rr.service(Counter)
    first.add(1)
    assert (second.get_counter().get(), first.get_counter().get()) == (0, 1)
    assert first.pid().get() != second.pid().get()


class Unpicklable:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.file = open("/proc/self/stat")  # noqa: SIM115 - the point of it
        self.steps = (x for x in range(100))

    def step(self) -> int:
        with self.lock:
            return next(self.steps)

    def __getstate__(self) -> Any:
        raise AssertionError("somebody pickles the state")


def test_state_may_be_what_cannot_be_pickled_and_never_is(rr: Runner) -> None:
    service = rr.service(Unpicklable)
    assert [service.step().get() for _ in range(3)] == [0, 1, 2]


def test_an_exception_leaves_the_object_as_it_was_left(rr: Runner) -> None:
    counter = rr.service(Counter)
    failed = counter.fail(7)
    with pytest.raises(LookupError, match="no such thing") as caught:
        failed.get()
    assert isinstance(caught.value, RemoteExecutionError)
    assert counter.get_counter().get() == 7


def test_calls_from_several_threads_all_count(rr: Runner) -> None:
    counter = rr.service(Counter)
    threads = [threading.Thread(target=lambda: [counter.add(1) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.get_counter().get() == 800


# ------------------------------------------------------------ what can be called


class Many:
    """All kinds of methods and attributes."""

    plain = 3
    noted: int

    def __init__(self) -> None:
        self.made = len
        self.data = [1]

    def keywords(self, a: int, *, b: int = 2, **rest: int) -> tuple[int, int, dict[str, int]]:
        return a, b, rest

    @staticmethod
    def static(x: int) -> int:
        return x + 1

    @classmethod
    def named(cls, x: int) -> str:
        return f"{cls.__name__}{x}"

    @property
    def size(self) -> int:
        raise AssertionError("somebody reads the property")

    @functools.cached_property
    def cached(self) -> int:
        raise AssertionError("somebody reads the property")

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def wait(self, x: int) -> int:
        await asyncio.sleep(0)
        return x

    bound = functools.partialmethod(keywords, b=7)

    def __call__(self, x: int) -> int:
        return -x

    def close(self) -> str:
        return "the object's own"

    def method(self) -> str:
        return "also"

    def _private(self) -> None: ...


@pytest.fixture(scope="module")
def many(shared_runner: Runner) -> RunnerService:
    return shared_runner.service(Many)


def test_methods_of_every_kind_are_called_by_name(many: RunnerService) -> None:
    assert many.keywords(1).get() == (1, 2, {})
    assert many.keywords(a=1, b=3, c=4).get() == (1, 3, {"c": 4})
    assert many.static(1).get() == 2
    assert many.named(5).get() == "Many5"
    assert many.bound(1).get() == (1, 7, {})
    assert many.wait(9).get() == 9


def test_a_generator_is_streamed(many: RunnerService) -> None:
    stream = many.count(5)
    assert isinstance(stream, Stream) and list(stream) == [0, 1, 2, 3, 4]


def test_an_object_that_can_be_called_is_called_as_the_service_itself(
    many: RunnerService, rr: Runner
) -> None:
    assert (many(4).get(), rr.service(Many())(5).get()) == (-4, -5)
    with pytest.raises(TypeError, match="Counter cannot be called itself. Its methods: add, add_slowly, die"):
        rr.service(Counter)(1)


def test_names_that_the_service_has_itself_are_reached_by_method(
    many: RunnerService, rr: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    assert (many.method("close")().get(), many.method("method")().get()) == ("the object's own", "also")
    rr.service(Many).close()
    assert "Many has a method 'close', a name of the service's own" in caplog.text


def test_a_method_that_is_made_on_the_worker_is_reached_by_method(many: RunnerService, rr: Runner) -> None:
    assert many.method("made")([1, 2]).get() == 2
    assert rr.service(Many()).made([1, 2, 3]).get() == 3  # an object's own attributes are known here


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "size",
            "'size' is a property of Many, which lives on a worker: only methods can be called from here",
        ),
        ("cached", "'cached' is a property of Many"),
        ("plain", "'plain' is an attribute of Many"),
        ("noted", "'noted' is an attribute of Many"),
        ("keyword", "Many has no method 'keyword'; did you mean 'keywords'?"),
        ("nothing_like_it", "Its methods: bound, close, count"),
        ("_private", "has no attribute '_private'"),
    ],
)
def test_what_is_no_method_is_an_attribute_error_that_says_why(
    name: str, text: str, many: RunnerService
) -> None:
    with pytest.raises(AttributeError, match=text):
        getattr(many, name)
    assert not hasattr(many, name)


def test_an_attribute_of_an_object_is_no_method_either(rr: Runner) -> None:
    with pytest.raises(AttributeError, match="'data' is an attribute of Many"):
        _ = rr.service(Many()).data


def test_a_service_lists_its_methods(many: RunnerService, rr: Runner) -> None:
    assert dir(many) == sorted(["bound", "close", "count", "keywords", "method", "named", "static", "wait"])
    assert dir(rr.service(double)) == ["close", "method"]


def test_every_kind_of_function_is_a_service(rr: Runner) -> None:
    factor = 5

    def local(x: int) -> int:
        return x * factor

    functions: list[Callable[..., Any]] = [
        *(double, local, lambda x: x + 1, functools.partial(local), max, Counter(3).add),
        rr.service,  # replaced below: what holds a Runner cannot travel
    ]
    assert rr.get([rr.service(one)(2) for one in functions[:4]]) == [4, 10, 3, 10]
    assert rr.service(max)(2, 7).get() == 7
    assert rr.service(functions[5])(2).get() == 5
    with pytest.raises(SerializationError, match="belongs to the process that opened it"):
        rr.service(functions[6])


def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(
    many: RunnerService, rr: Runner
) -> None:
    with pytest.raises(TypeError, match=r"do not fit Many.keywords\(a: .*missing a required argument: 'a'"):
        many.keywords(b=1)
    with pytest.raises(TypeError, match="too many positional arguments"):
        many.static(1, 2)
    with pytest.raises(TypeError, match=r"do not fit double\(x"):
        rr.service(double)()
    with pytest.raises(TypeError, match="unexpected keyword argument 'start'"):
        rr.service(Counter, kwargs={"start": 1})
    with pytest.raises(TypeError, match="args and kwargs are for a class, and Counter is none"):
        rr.service(Counter(), args=(1,))


def test_what_cannot_travel_is_named_here(rr: Runner) -> None:
    with pytest.raises(SerializationError, match=r"args\[0\]\['lock'\] is a _thread.lock"):
        rr.service(double)({"lock": threading.Lock()})
    with pytest.raises(SerializationError, match="Cannot send .*'Many'.*data"):
        rr.service(holding(threading.Lock()))


def holding(value: Any) -> Many:
    made = Many()
    made.data = value
    return made


def test_a_service_and_a_runner_do_not_travel(rr: Runner, many: RunnerService) -> None:
    with pytest.raises(TypeError, match="a service cannot travel: pass the futures"):
        pickle.dumps(many)
    with pytest.raises(SerializationError):
        rr.service(double)(rr)


# ------------------------------------------------------------ futures


def test_a_future_is_an_object_future(rr: Runner) -> None:
    call = rr.service(double)(4)
    assert isinstance(call, ObjectFuture) and isinstance(call, Future)
    same = ObjectFuture(call)
    assert same is call
    same.wait()
    assert (same.get(), same.ref()) == (8, call)
    assert not isinstance(3, ObjectFuture)


def test_a_future_stands_for_its_value_also_inside_of_lists_and_dicts(rr: Runner) -> None:
    twice = rr.service(double)
    add = rr.service(total)
    ones = [twice(x) for x in (1, 2, 3)]
    assert add(ones).get() == 12
    assert add([ones[0], *(one for one in ones), 1]).get() == 15
    nested = rr.service(lambda **kw: kw["a"][0]["x"] + kw["b"])(a=[{"x": ones[0]}], b=ones[2])
    assert nested.get() == 8
    assert twice(twice(twice(1))).get() == 8


def test_passing_a_future_never_blocks_the_caller(rr: Runner) -> None:
    slow, twice = rr.service(later), rr.service(double)
    gate = Path(rr.flow.settings.local.home) / "gate"
    producer = rr.service(wait_for)(str(gate), 21)
    dependent = twice([producer])
    assert not producer.done() and not dependent.done()
    gate.touch()
    assert dependent.get(30) == [21, 21]
    assert slow(0, 1).get() == 1


def wait_for(path: str, value: Any) -> Any:
    while not os.path.exists(path):
        time.sleep(0.01)
    return value


def test_a_failed_producer_fails_its_dependents_with_its_error_as_the_cause(rr: Runner) -> None:
    counter = rr.service(Counter)
    failed = rr.service(fails)()
    dependent = counter.add(failed)
    further = rr.service(total)([1, {"x": dependent}])
    for call in (dependent, further):
        with pytest.raises(LookupError, match="no such thing") as caught:
            call.get()
        assert isinstance(caught.value.__cause__, LookupError)
    assert counter.add(1).get() == 1  # the call was not made, and the next one was


def test_a_large_value_goes_from_worker_to_worker_without_passing_through_here(rr: Runner) -> None:
    class Maker:
        def make(self, n: int) -> Any:
            return np.arange(n, dtype=np.float64)

    class User:
        def add_up(self, values: Any) -> float:
            return float(values[0].sum())

    n = 2_000_000
    made = rr.service(Maker).make(n)
    assert rr.service(User).add_up([made]).get() == n * (n - 1) / 2
    assert made.outcome is None  # nobody has read it here
    assert made.parcel is not None and len(made.parcel.body) < 10_000  # and its bytes lie elsewhere
    assert made.get()[-1] == n - 1


def test_a_value_is_brought_to_the_workers_once_for_many_calls(rr: Runner) -> None:
    weights = rr.put_object(np.ones(500_000))
    adders = [rr.service(total), rr.service(lambda values: values.sum())]
    assert [float(one(weights).get()) for one in adders for _ in range(2)] == [500_000.0] * 4
    assert isinstance(weights, ObjectFuture) and weights.parcel is not None and weights.outcome is None


def test_get_wait_ref_and_select(rr: Runner) -> None:
    slow = rr.service(later)
    calls = [slow(0.2, "a"), slow(0.0, "b"), slow(0.1, "c")]
    rr.wait(calls)
    assert rr.get(calls) == ["a", "b", "c"] and rr.get(calls[0]) == "a"
    assert rr.ref(calls) == calls
    assert {call.get() for call in rr.select([*calls, calls[0]])} == {"a", "b", "c"}
    gate = Path(rr.flow.settings.local.home) / "gate of select"
    held = rr.service(wait_for)(str(gate), "last")
    first = slow(0.0, "first")
    ended = rr.select([held, first])
    assert next(ended) is first
    with pytest.raises(TimeoutError):
        rr.wait([first, held], timeout=0.05)
    gate.touch()
    assert next(ended) is held
    failed = [slow(0.0), rr.service(fails)(1)]
    with pytest.raises(LookupError):
        rr.wait(failed)
    assert sorted(call.status for call in rr.select(failed)) == ["done", "failed"]


# ------------------------------------------------------------ pools


class Heavy:
    """Says how often it was made, by process."""

    def __init__(self, folder: str) -> None:
        self.calls = 0
        Path(folder, f"{os.getpid()}-{time.monotonic_ns()}").touch()

    def pid(self, _: int = 0) -> tuple[int, int]:
        time.sleep(0.02)
        self.calls += 1
        return os.getpid(), self.calls


def made_by(folder: Path) -> dict[str, int]:
    return collections.Counter(path.name.partition("-")[0] for path in folder.iterdir())


@pytest.mark.parametrize("options", [{"autoscale": True}, {"warmup": 2}, {"autoscale": False, "warmup": 3}])
def test_a_pool_of_a_class_has_an_object_on_each_worker_made_once(
    options: dict[str, Any], rr: Runner, tmp_path: Path
) -> None:
    service = rr.service(Heavy, args=(str(tmp_path),), **options)
    calls = rr.get([service.pid(x) for x in range(40)])
    made = made_by(tmp_path)
    assert {str(pid) for pid, _ in calls} <= set(made) and set(made.values()) == {1}
    assert 2 <= len(made) <= 3
    service.close()


def test_warm_workers_make_their_objects_before_the_first_call(rr: Runner, tmp_path: Path) -> None:
    service = rr.service(Heavy, warmup=2, args=(str(tmp_path),))
    until(lambda: len(list(tmp_path.iterdir())) >= 1)
    service.close()


def test_a_pool_of_an_object_gives_every_worker_a_copy(rr: Runner) -> None:
    service = rr.service(Counter(10), autoscale=True, warmup=2)
    assert {call.get() for call in [service.get_counter() for _ in range(10)]} == {10}


def test_a_pool_of_a_function_may_be_fixed(rr: Runner) -> None:
    pool = rr.service(later, autoscale=False, warmup=1)
    began = [pool(0.01, x) for x in range(5)]
    assert rr.get(began) == [0, 1, 2, 3, 4]
    fixed = rr.service(where, autoscale=False, warmup=1)
    assert len({fixed().get() for _ in range(20)}) == 1


def test_functions_run_at_the_same_time(rr: Runner) -> None:
    meeting = Path(rr.flow.settings.local.home) / "meeting"
    meeting.mkdir()
    both = [rr.service(meet)(str(meeting), 2) for _ in range(2)]
    assert len(set(rr.get(both, timeout=30))) == 2


def meet(folder: str, number: int) -> int:
    """Come back when so many have come."""
    Path(folder, str(os.getpid())).touch()
    while len(os.listdir(folder)) < number:
        time.sleep(0.01)
    return os.getpid()


def test_a_worker_of_a_pool_that_dies_is_replaced(rr: Runner) -> None:
    pool = rr.service(Counter, autoscale=False, warmup=2)
    with pytest.raises(WorkerDiedError, match="exit code 3"):
        pool.die().get()
    assert rr.get([pool.add(0) for _ in range(10)], timeout=30) == [0] * 10


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"warmup": -1}, "warmup=-1 must be at least 0"),
        ({"max_restarts": -1}, "max_restarts=-1 must be at least 0"),
        ({"max_restarts": 1, "autoscale": True}, "max_restarts=1 is for one live object"),
        ({"warmup": 5000}, "at most 1024 workers"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], text: str, rr: Runner) -> None:
    with pytest.raises(ValidationError, match=text):
        rr.service(Counter, **options)


def test_a_pool_takes_no_future_to_make_its_objects_with(rr: Runner) -> None:
    with pytest.raises(SerializationError, match="an argument of Counter is a future"):
        rr.service(Counter, autoscale=True, args=(rr.service(double)(1),))


# ------------------------------------------------------------ what goes wrong


class Broken:
    def __init__(self, reason: str = "not today") -> None:
        raise ConnectionError(reason)

    def use(self) -> None: ...


@pytest.mark.parametrize("options", [{}, {"autoscale": True}])
def test_an_object_that_cannot_be_made_fails_every_call_with_its_own_error(
    options: dict[str, Any], rr: Runner
) -> None:
    service = rr.service(Broken, **options)
    for call in [service.use() for _ in range(3)]:
        with pytest.raises(ConnectionError, match="not today"):
            call.get()
    for _ in range(3):
        with pytest.raises(ConnectionError, match="not today"):
            service.use().get()


def test_an_object_whose_argument_fails_fails_with_that(rr: Runner) -> None:
    service = rr.service(Counter, args=(rr.service(fails)(),))
    with pytest.raises(LookupError, match="no such thing"):
        service.add(1).get()


def test_when_its_worker_dies_the_calls_there_fail_and_the_state_is_lost(rr: Runner) -> None:
    counter = rr.service(Counter)
    calls = [counter.add(1), counter.die(), counter.add(1)]
    assert calls[0].get() == 1
    for call in calls[1:]:
        with pytest.raises(WorkerDiedError, match="exit code 3"):
            call.get()
    for _ in range(2):
        with pytest.raises(
            WorkerDiedError, match="the state of the service 'Counter' is lost: .*exit code 3"
        ):
            counter.add(1)
    assert rr.service(Counter).add(1).get() == 1


def test_a_lost_object_is_made_anew_as_often_as_asked(rr: Runner, caplog: pytest.LogCaptureFixture) -> None:
    counter = rr.service(Counter, args=(10,), max_restarts=1)
    os.kill(counter.pid().get(), signal.SIGKILL)
    until(lambda: lost(counter))
    assert counter.add(1).get() == 11
    assert "the object of the service 'Counter' is made anew" in caplog.text
    with pytest.raises(WorkerDiedError):
        counter.die().get()
    with pytest.raises(WorkerDiedError, match="is lost"):
        counter.add(1)


def lost(service: RunnerService) -> bool:
    return service._workers._pool.over is not None


def test_a_dead_service_leaves_the_others_alone(rr: Runner) -> None:
    first, second, twice = rr.service(Counter), rr.service(Counter, args=(5,)), rr.service(double)
    with pytest.raises(WorkerDiedError):
        first.die().get()
    assert (second.add(1).get(), twice(1).get()) == (6, 2)


def test_services_come_and_go_and_the_session_lives_on(rr: Runner) -> None:
    lasting = rr.service(Counter)
    for number in range(1, 11):
        dying, closed = rr.service(Counter), rr.service(Counter)
        assert (dying.add(number).get(), closed.add(number).get()) == (number, number)
        dying.die()
        closed.close()
        assert lasting.add(1).get() == number


def test_a_closed_service_takes_no_calls_and_its_worker_is_gone(rr: Runner) -> None:
    counter, twice, other = rr.service(Counter), rr.service(double), rr.service(Counter)
    pid = counter.pid().get()
    pending = counter.add_slowly(1)
    for service in (counter, twice, counter):
        service.close()
    for method in (counter.add, twice):
        with pytest.raises(SessionClosedError, match="is closed"):
            method(1)
    with pytest.raises(CallCancelledError):
        pending.get()
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert other.add(1).get() == 1


def until(happened: Callable[[], bool], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------ the workers' place


def test_workers_are_in_the_folder_and_import_its_modules(rr: Runner) -> None:
    def look() -> tuple[str, str, str]:
        import imported_there  # type: ignore[import-not-found]

        return Path("settings.txt").read_text(), imported_there.VALUE, os.path.basename(os.getcwd())

    assert rr.service(look)().get() == ("from the folder", "a module of the folder", "work")


def test_an_object_says_which_service_it_belongs_to(rr: Runner, caplog: pytest.LogCaptureFixture) -> None:
    class Shared(Counter):
        _session_context: Any = SessionContext(session_id="the one", application_name="tests")

    first, second = rr.service(Shared), rr.service(Shared)
    first.add(1)
    assert second is first and second.add(1).get() == 2
    first.close()
    assert rr.service(Shared).add(1).get() == 1
    Shared._session_context = SessionContext(application_name="another")
    with pytest.raises(ValidationError, match="is meant for the Runner 'another', and this is 'tests'"):
        rr.service(Shared)
    Shared._session_context = "the one"
    assert rr.service(Shared).add(1).get() == 1
    assert "is no SessionContext: it is ignored" in caplog.text
    with pytest.raises(ValidationError, match="must be text of 1 to 128 characters"):
        SessionContext(session_id="x" * 129)


def test_a_service_with_a_name_has_a_runner_of_its_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".flowignore").write_text("*\n")
    service = RunnerService("alone", Counter, args=(3,))
    assert service.add(1).get() == 4
    service.close()
    service.close()
    until(lambda: processes_under(home) == [])


def test_a_runner_that_nobody_closes_leaves_nothing_behind(home: Path, tmp_path: Path) -> None:
    program = (
        "from flow_core import Runner\n"
        "def f(x): return x + 1\n"
        "rr = Runner('open')\n"
        "print(rr.service(f)(1).get())\n"
    )
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "empty", capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 0)
    until(lambda: processes_under(home) == [])
