"""Live functions captured here and run by `call.py` in another process that has none of these modules."""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import logging
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pytest

from flow_core import capture, origin, payload
from flow_core.errors import RemoteExecutionError, ResultError, SerializationError, TaskExecutionError
from tests.core import conftest

if TYPE_CHECKING:
    from tests.core.conftest import Machine, Outcome

LOCK = threading.Lock()
FACTOR = 3


@dataclasses.dataclass
class Point:
    x: int

    def moved(self) -> Point:
        return Point(self.x + FACTOR)


class Colour(enum.Enum):
    RED = 1


class Custom(Exception):
    pass


def send(machine: Machine, function: Callable[..., Any], *args: Any, **options: Any) -> Outcome:
    kwargs = options.pop("kwargs", None)
    for name, data in capture.capture(function, args, kwargs, **options).items():
        (machine.task / name).write_bytes(data)
    return machine.start()


def helper(n: int) -> int:
    return n * FACTOR


def using_helper(n: int) -> int:
    return helper(n) + 1


def factorial(n: int) -> int:
    return n if n < 2 else n * factorial(n - 1)


@functools.lru_cache(maxsize=7)
def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


def mean(values: np.ndarray[Any, Any], *, weight: np.float64 | None = None) -> float:
    return float(values.mean()) if weight is None else float(values.mean() * weight)


def raising() -> None:
    raise Custom("from afar")  # this line


# ------------------------------------------------------------ what travels


def test_a_function_brings_its_helpers_globals_and_arguments(machine: Machine) -> None:
    assert send(machine, using_helper, 5).value == 16
    assert send(machine, using_helper, kwargs={"n": 6}).value == 19


def test_recursion_caches_closures_lambdas_and_partials(machine: Machine) -> None:
    def outer() -> Callable[[int], int]:
        base = 10
        return lambda n: base + n

    assert send(machine, factorial, 10).value == 3628800
    assert send(machine, fibonacci, 80).value == 23416728348467685
    assert fibonacci.cache_info().currsize == 0
    assert send(machine, outer(), 4).value == 14
    assert send(machine, functools.partial(using_helper, n=1)).value == 4
    assert send(machine, functools.partial(functools.partial(max, 3), 9), 4).value == 9
    assert send(machine, Point(1).moved).value == Point(4)


def test_a_cached_function_that_another_one_uses_keeps_its_cache(machine: Machine) -> None:
    def use() -> Any:
        return [fibonacci(30), fibonacci.cache_info().maxsize, fibonacci.__name__]

    assert send(machine, use).value == [832040, 7, "fibonacci"]


def test_async_functions_travel(machine: Machine) -> None:
    async def f() -> int:
        return helper(2)

    assert send(machine, f).value == 6


def test_annotations_of_installed_packages_travel(machine: Machine) -> None:
    assert send(machine, mean, np.ones(3)).value == 1.0
    value = send(machine, lambda a: a * 2, np.arange(3)).value
    assert value.tolist() == [0, 2, 4]


def test_values_of_captured_classes_come_back_as_their_own_class(machine: Machine) -> None:
    moved = Point.moved
    done = send(machine, lambda: [Point(1).moved(), Colour.RED, {Point: Colour}])
    for _ in range(2):  # as in a process that did not send it as well
        point, colour, classes = done.value
        assert type(point) is Point
        assert point == Point(4)
        assert colour is Colour.RED
        assert classes == {Point: Colour}
        assert Point.moved is moved
        forget_cloudpickles_classes()


def forget_cloudpickles_classes() -> None:
    module = sys.modules["cloudpickle.cloudpickle"]
    module._DYNAMIC_CLASS_TRACKER_BY_CLASS.clear()
    module._DYNAMIC_CLASS_TRACKER_BY_ID.clear()


def test_classes_made_inside_functions_come_back_as_copies(machine: Machine) -> None:
    def f() -> Any:
        class Local:
            x = 5

        return Local()

    assert send(machine, f).value.x == 5


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package of the user's that is importable here and not installed."""
    folder = tmp_path / "project" / "myproject"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from . import tools\n")
    (folder / "tools.py").write_text("SCALE = 5\n\ndef scaled(n):\n    return n * SCALE\n")
    (folder / "dag.py").write_text(
        "from myproject.tools import scaled\nfrom . import tools\n\ndef f(n):\n    return [scaled(n), tools.SCALE]\n"
    )
    monkeypatch.syspath_prepend(str(folder.parent))
    import importlib

    yield importlib.import_module("myproject.dag")
    for name in [name for name in sys.modules if name.partition(".")[0] == "myproject"]:
        del sys.modules[name]


def test_modules_that_are_not_installed_travel_with_the_function(
    machine: Machine, project: ModuleType
) -> None:
    assert send(machine, project.f, 2).value == [10, 5]
    assert send(machine, lambda: project.tools.scaled(3)).value == 15


def test_the_function_of_an_installed_package_travels_by_name(machine: Machine) -> None:
    files = capture.capture(np.linalg.norm, [np.ones(4)])
    assert len(files["call.pkl"]) < 1000
    assert send(machine, np.linalg.norm, np.ones(4)).value == 2.0


def test_the_result_can_be_asked_for_as_json(machine: Machine) -> None:
    assert send(machine, lambda: (1, 2), result_codec="json").value == [1, 2]
    done = send(machine, lambda: {"p": Point(1)}, result_codec="json")
    with pytest.raises(ResultError, match=r"result\['p'\] is a tests.core.test_capture.Point"):
        payload.decode_result(done.result or b"")
    assert done.value == {"p": Point(1)}, "it is kept"


# ------------------------------------------------------------ what is put in its place


def original_logger() -> logging.Logger:
    raise RuntimeError("only works on the host")


def log() -> str:
    return original_logger().name


def test_what_works_here_only_can_be_replaced(machine: Machine) -> None:
    replace = {original_logger: logging.getLogger}
    assert send(machine, log, replace=replace).value == "root"
    assert send(machine, lambda f: f.__name__, original_logger, replace=replace).value == "getLogger"
    with pytest.raises(RemoteExecutionError, match="only works on the host"):
        _ = send(machine, log).value
    with pytest.raises(RuntimeError, match="only works on the host"):
        log()


def test_what_cannot_travel_can_be_replaced_by_what_can(machine: Machine) -> None:
    assert send(machine, lambda: str(LOCK), replace={LOCK: "no lock"}).value == "no lock"
    assert send(machine, lambda: LOCK, replace={LOCK: [1, None]}).value == [1, None]


# ------------------------------------------------------------ what cannot travel


def locking() -> None:
    with LOCK:
        pass


def calls_locking() -> None:
    locking()


def test_a_global_that_cannot_travel_is_named(machine: Machine) -> None:
    with pytest.raises(SerializationError) as caught:
        capture.capture(locking)
    assert str(caught.value).startswith(
        "Cannot send the function 'locking'. locking (global 'LOCK') is a _thread.lock (TypeError: cannot pickle"
    )
    with pytest.raises(
        SerializationError, match=r"calls_locking \(global 'locking'\) \(global 'LOCK'\) is a _thread"
    ):
        capture.capture(calls_locking)


def test_a_closure_a_default_and_an_attribute_that_cannot_travel_are_named(tmp_path: Path) -> None:
    class Holder:
        def __init__(self) -> None:
            self.parts = {"lock": [1, threading.Lock()]}

        def method(self) -> None: ...

    def default(x: Any = LOCK) -> None: ...

    with (tmp_path / "x").open("w") as file:
        with pytest.raises(SerializationError, match=r"\(closure variable 'file'\) is a _io.TextIOWrapper"):
            capture.capture(lambda: file)
        with pytest.raises(
            TypeError, match=r"Save to disk and pass path. kwargs\['f'\]\[0\] is a _io.TextIOWrapper"
        ):
            capture.capture(helper, kwargs={"f": [file]})
    with pytest.raises(SerializationError, match=r"default \(a default\) is a _thread.lock"):
        capture.capture(default)
    with pytest.raises(SerializationError, match=r"method.__self__.parts\['lock'\]\[1\] is a _thread.lock"):
        capture.capture(Holder().method)


def test_a_value_that_refuses_in_its_own_words_is_named() -> None:
    class Stubborn:
        def __reduce__(self) -> Any:
            raise ConnectionError("ask\nsomebody else")

    with pytest.raises(SerializationError, match=r"args\[0\]\['k'\] is a .*Stubborn \(ConnectionError: ask"):
        capture.capture(helper, [{"k": Stubborn()}])


def test_generator_functions_and_what_cannot_be_called_are_refused_at_once() -> None:
    def generate() -> Iterator[int]:
        yield 1

    with pytest.raises(SerializationError, match="generate is a generator function"):
        capture.capture(generate)
    with pytest.raises(SerializationError, match="generate is a generator function"):
        capture.capture(functools.partial(generate))
    with pytest.raises(SerializationError, match="3 is not a function"):
        capture.capture(3)  # type: ignore[arg-type]


def test_too_large_a_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "PICKLE_LIMIT_BYTES", 10_000)
    with pytest.raises(
        SerializationError, match=r"helper and its arguments take 20,\d+ bytes; at most 10,000"
    ):
        capture.capture(helper, ["x" * 20_000])


def test_a_result_that_cannot_travel_is_named(machine: Machine) -> None:
    done = send(machine, lambda: {"a": [threading.Lock()]})
    with pytest.raises(
        ResultError, match=r"Cannot serialize the result.*result\['a'\]\[0\] is a _thread.lock"
    ):
        _ = done.value
    assert done.code == 1


def test_a_value_that_cannot_be_loaded_here_says_so(machine: Machine) -> None:
    class OnlyThere:
        def __reduce__(self) -> Any:
            return __import__, ("module_of_the_gpu_machine",)

    with pytest.raises(
        ResultError, match="cannot be read here: ModuleNotFoundError: No module named 'module_of_the"
    ):
        _ = send(machine, OnlyThere).value


# ------------------------------------------------------------ the other side


def test_another_python_refuses_before_it_loads_anything(tmp_path: Path, each: Machine) -> None:
    done = send(each, helper, 1)
    if each.python == sys.executable:
        assert done.value == 3
        return
    with pytest.raises(TaskExecutionError) as caught:
        _ = done.value
    assert not isinstance(caught.value, RemoteExecutionError)
    here = "{}.{}".format(*sys.version_info)
    assert f"captured by Python {here}, and this machine runs Python" in str(caught.value)
    assert each.python.rpartition("/versions/")[2].partition("/")[0] in str(caught.value)
    assert done.code == 1


def test_a_missing_package_is_explained(
    machine: Machine, project: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "is_project_file", lambda file: "myproject" not in file)
    with pytest.raises(
        ModuleNotFoundError, match="needs what this machine does not have: No module named 'myproject'"
    ):
        _ = send(machine, project.f, 1).value


def test_exceptions_show_the_users_lines_from_this_side(machine: Machine) -> None:
    with pytest.raises(Custom) as caught:
        _ = send(machine, raising).value
    trace = str(caught.value)
    assert 'raise Custom("from afar")  # this line' in trace
    assert "test_capture.py" in trace
    assert "flow_runner" not in trace


def test_source_text_can_be_read_there(machine: Machine) -> None:
    import inspect

    assert send(machine, lambda: inspect.getsource(factorial)).value.startswith("def factorial(n: int)")


def test_arguments_that_do_not_fit_are_called_so(machine: Machine) -> None:
    assert "the arguments of the call do not fit helper(n: int)" in send(machine, helper).record[
        "message"
    ].replace("'", "")


# ------------------------------------------------------------ traces


def test_nothing_stays_registered_whatever_happens(project: ModuleType) -> None:
    cloudpickle.register_pickle_by_value(conftest)
    try:
        before = cloudpickle.list_registry_pickle_by_value()
        capture.capture(project.f, [1])
        with pytest.raises(SerializationError):
            capture.capture(locking)
        assert cloudpickle.list_registry_pickle_by_value() == before == {conftest.__name__}
    finally:
        cloudpickle.unregister_pickle_by_value(conftest)


def test_many_threads_may_capture_at_once(machine: Machine, project: ModuleType) -> None:
    def one(n: int) -> dict[str, bytes]:
        return capture.capture(project.f, [n])

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(one, range(40)))
    assert cloudpickle.list_registry_pickle_by_value() == set()
    for n in (0, 39):
        for name, data in made[n].items():
            (machine.task / name).write_bytes(data)
        assert machine.start().value == [n * 5, 5]


def test_the_cloudpickle_that_travels_is_the_same_each_time() -> None:
    first = capture.cloudpickle_zip()
    capture.cloudpickle_zip.cache_clear()
    time.sleep(0.01)
    assert capture.cloudpickle_zip() == first
    names = zipfile.ZipFile(BytesIO(first)).namelist()
    assert {"cloudpickle/__init__.py", "cloudpickle/cloudpickle.pyc"} <= set(names)


def test_capturing_does_not_set_off_lazy_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was looked up")

    monkeypatch.setitem(sys.modules, "lazy_module_of_a_test", Lazy("lazy_module_of_a_test"))
    monkeypatch.setitem(sys.modules, "no_module_at_all", object())
    capture.capture(helper, [1])


# -- what the other side has to load


def loaded(*names: str) -> list[str]:
    return [name for name in names if name in sys.modules]


def test_a_plain_function_is_called_without_what_takes_long_to_import(machine: Machine) -> None:
    def closed_over(n: int) -> list[Any]:
        return [helper(n), loaded("cloudpickle", "pickle", "re", "enum", "linecache", "typing")]

    assert send(machine, closed_over, 2).value == [6, []]


def test_a_class_brings_cloudpickle_with_it(machine: Machine) -> None:
    def f() -> list[Any]:
        return [Point(1).moved().x, loaded("cloudpickle")]

    assert send(machine, f).value == [4, ["cloudpickle"]]


def test_the_function_of_an_installed_package_brings_nothing(machine: Machine) -> None:
    assert send(machine, functools.reduce, max, [1, 3, 2]).value == 3


def test_a_value_that_only_cloudpickle_can_send_comes_back_although_nothing_was_loaded_by_it(
    machine: Machine,
) -> None:
    def f(n: int) -> Callable[[int], int]:
        return lambda x: x + n + FACTOR

    assert send(machine, f, 1).value(1) == 5


def test_a_part_of_a_value_that_cannot_travel_is_named_all_the_same(machine: Machine) -> None:
    done = send(machine, lambda: {"a": [1, threading.Lock()]})
    with pytest.raises(ResultError, match=r"result\['a'\]\[1\] is a _thread\.lock"):
        _ = done.value


def test_a_cloudpickle_that_is_made_in_another_way_is_sent_and_loaded_as_a_whole(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_loaders", lambda: (b"", ()))
    assert send(machine, lambda: loaded("cloudpickle")).value == ["cloudpickle"]


def test_a_traceback_that_the_function_makes_shows_the_senders_lines(machine: Machine) -> None:
    def f() -> str:
        import traceback

        try:
            return str(FACTOR / 0)
        except ZeroDivisionError:
            return traceback.format_exc()

    assert "return str(FACTOR / 0)" in send(machine, f).value


def test_nothing_of_ours_stays_in_the_import_system_once_linecache_is_there(machine: Machine) -> None:
    def f() -> list[str]:
        import linecache

        return [str(one) for one in (*sys.meta_path, linecache.__loader__, linecache.__spec__.loader)]

    assert not [text for text in send(machine, f).value if "flow" in text]


def test_threads_capture_their_first_functions_at_once() -> None:
    """Python 3.11 cannot parse a class's file in two of them: it gives way to another thread in the middle of that."""
    failures: list[BaseException] = []

    def first() -> None:
        try:
            assert capture._loaders.__wrapped__()[0]
        except BaseException as error:
            failures.append(error)

    def give_way(*_: object) -> None:
        time.sleep(0.001)

    threads = [threading.Thread(target=first) for _ in range(4)]
    gc.callbacks.append(give_way)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.callbacks.remove(give_way)
    assert failures == []
