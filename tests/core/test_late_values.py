"""A function travels as it is when it is called, and is captured anew only if what it refers to has changed."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import logging
import pickle
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from flow_core import capture
from flow_core.capture import Captured
from flow_core.errors import SerializationError
from flow_core.references import SentAsFunction

NUMBER = 1
CONFIG = {"threshold": 0.5, "deep": {"list": [1, [2]]}}
SEEN = {1, 2}
TABLE = np.arange(5)
LOGGER = logging.getLogger("of a test")
PATTERN = re.compile("a+")


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    names: list[str] = dataclasses.field(default_factory=list)

    def scaled(self, x: float) -> float:
        return x * self.rate * NUMBER


class Odd:
    def __init__(self) -> None:
        self.state = 1

    def __reduce__(self) -> Any:
        return Odd, (), {"state": self.state}


SETTINGS = Settings()
ODD = Odd()


def helper() -> int:
    return NUMBER


def plain(x: int) -> int:
    return x


def uses_number(x: int) -> int:
    return x + NUMBER


def uses_helper() -> int:
    return helper()


def uses_config() -> Any:
    return CONFIG


def uses_everything(x: int = 3, *, y: Any = (1, "a", frozenset({2}))) -> Any:
    return (
        CONFIG,
        SEEN,
        Settings,
        SETTINGS,
        Colour.RED,
        LOGGER,
        PATTERN,
        Path("x"),
        helper,
        np.linalg.norm,
        len,
    )


def uses_table() -> Any:
    return TABLE


def uses_odd() -> Any:
    return ODD.state


def refuses_later() -> Any:
    return LATER  # type: ignore[name-defined]  # noqa: F821


class Counted:
    """Counts the real captures."""

    def __init__(self, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        dumped = capture._dumped

        def counting(*args: Any) -> Any:
            self.times += 1
            return dumped(*args)

        monkeypatch.setattr(capture, "_dumped", counting)
        self.captured = Captured(function)

    def call(self, *args: Any) -> Any:
        """What the function would return on the other side at this moment."""
        return loaded(self.captured)(*args)


def loaded(captured: Captured) -> Any:
    """The function with copies of all that it brings along, as on another machine."""
    data = captured.fresh().data
    module = sys.modules["cloudpickle.cloudpickle"]
    known = module._DYNAMIC_CLASS_TRACKER_BY_CLASS, module._DYNAMIC_CLASS_TRACKER_BY_ID
    before = [dict(one) for one in known]
    for one in known:
        one.clear()
    try:
        return pickle.loads(data)
    finally:
        for one, content in zip(known, before, strict=True):
            one.clear()
            one.update(content)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], Counted]:
    return lambda function: Counted(function, monkeypatch)


Maker = Callable[[Callable[..., Any]], Counted]


# ------------------------------------------------------------ captured once


@pytest.mark.parametrize(
    "function", [plain, uses_number, uses_helper, uses_config, uses_everything, SETTINGS.scaled]
)
def test_a_function_whose_surroundings_stay_the_same_is_captured_once(
    counted: Maker, function: Callable[..., Any]
) -> None:
    one = counted(function)
    first = one.captured.fresh()
    assert all(one.captured.fresh() is first for _ in range(5))
    assert one.times == 1


def test_an_array_is_looked_at_each_time_and_sent_again_only_when_it_has_changed(counted: Maker) -> None:
    one = counted(uses_table)
    first = one.captured.fresh()
    assert one.captured.fresh() is first
    assert one.times == 2
    TABLE[0] = 7
    try:
        assert one.captured.fresh().digest != first.digest
        assert one.call().tolist() == [7, 1, 2, 3, 4]
    finally:
        TABLE[0] = 0


def test_so_is_an_object_that_pickles_itself(counted: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    one = counted(uses_odd)
    first = one.captured.fresh()
    assert one.captured.fresh() is first
    monkeypatch.setattr(ODD, "state", 5)
    assert one.call() == 5


def test_too_many_values_to_look_at_are_captured_each_time(
    counted: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIG, "long", list(range(5000)))
    one = counted(uses_config)
    first = one.captured.fresh()
    assert one.captured.fresh() is first
    assert one.times == 2


# ------------------------------------------------------------ late values


def test_a_global_that_is_rebound_travels_with_the_next_call(
    counted: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = counted(uses_number), Captured(uses_helper)
    assert one.call(1) == 2
    loaded(other)
    monkeypatch.setitem(globals(), "NUMBER", 10)
    assert one.call(1) == 11
    assert loaded(other)() == 10


def test_equal_is_not_the_same(counted: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    one = counted(uses_number)
    assert repr(one.call(1)) == "2"
    monkeypatch.setitem(globals(), "NUMBER", 1.0)
    assert repr(one.call(1)) == "2.0"


def test_a_global_that_is_missing_at_first_travels_once_it_is_there(
    counted: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = counted(refuses_later)
    with pytest.raises(NameError):
        one.call()
    monkeypatch.setitem(globals(), "LATER", "now")
    assert one.call() == "now"


def test_a_value_inside_a_container_may_change(counted: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    one = counted(uses_config)
    assert one.call()["threshold"] == 0.5
    monkeypatch.setitem(CONFIG, "threshold", 0.7)
    assert one.call()["threshold"] == 0.7
    inner: list[int] = CONFIG["deep"]["list"][1]  # type: ignore[index]
    inner[0] = 3
    assert one.call()["deep"] == {"list": [1, [3]]}
    inner[0] = 2
    assert one.call()["deep"] == {"list": [1, [2]]}
    before = one.times
    one.captured.fresh()
    assert one.times == before


def test_a_set_a_deque_and_an_ordered_dict_may_change(counted: Maker) -> None:
    seen, queue, order = {1}, collections.deque([1]), collections.OrderedDict(a=1, b=2)
    one = counted(lambda: (seen, list(queue), list(order)))
    assert one.call() == ({1}, [1], ["a", "b"])
    seen.add(2)
    assert one.call()[0] == {1, 2}
    queue.rotate()
    queue.append(5)
    assert one.call()[1] == [1, 5]
    order.move_to_end("a")
    assert one.call()[2] == ["b", "a"]


def test_an_attribute_and_a_method_may_change(counted: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    one = counted(lambda x: SETTINGS.scaled(x))  # noqa: PLW0108 - it is a global of the lambda
    assert one.call(10) == 1.0
    monkeypatch.setattr(SETTINGS, "rate", 0.5)
    assert one.call(10) == 5.0
    SETTINGS.names.append("a")
    monkeypatch.setattr(Settings, "scaled", lambda self, x: self.names)
    assert one.call(10) == ["a"]
    SETTINGS.names.clear()
    assert one.call(10) == []
    monkeypatch.setattr(SETTINGS, "__dict__", {"names": ["other"]})
    assert one.call(10) == ["other"]


def test_a_closure_may_be_filled_later_and_change(counted: Maker) -> None:
    def make() -> Any:
        def function() -> Any:
            return value

        def assign(new: Any) -> None:
            nonlocal value  # type: ignore[misc]  # it is bound below
            value = new

        one = counted(function)
        with pytest.raises(NameError):
            one.call()
        value: Any = 1
        return one, assign

    one, assign = make()
    assert one.call() == 1
    assign([2])
    assert one.call() == [2]


def test_defaults_code_and_attributes_of_the_function_may_change(counted: Maker) -> None:
    def function(x: Any = 1, *, y: Any = 2) -> Any:
        return x, y, getattr(function, "tag", None)

    one = counted(function)
    assert one.call() == (1, 2, None)
    function.__defaults__ = (3,)
    assert one.call() == (3, 2, None)
    function.__kwdefaults__["y"] = 4  # type: ignore[index]
    assert one.call() == (3, 4, None)
    function.tag = "t"  # type: ignore[attr-defined]
    assert one.call() == (3, 4, "t")
    function.__code__ = (lambda x, *, y: "other").__code__.replace(co_freevars=function.__code__.co_freevars)
    assert one.call() == "other"


def test_what_a_handle_stands_for_may_change(counted: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handle(SentAsFunction):
        def __init__(self, function: Callable[..., Any]) -> None:
            self.__wrapped__ = function
            self.lock = threading.Lock()

    handle = Handle(uses_number)
    one = counted(lambda: handle(1))  # type: ignore[operator]
    assert one.call() == 2
    monkeypatch.setitem(globals(), "NUMBER", 5)
    assert one.call() == 6


def test_a_module_of_the_users_may_change(counted: Maker, project: ModuleType) -> None:
    one = counted(lambda: project.SCALE)
    assert one.call() == 5
    assert one.captured.fresh() is one.captured.fresh()
    project.SCALE = 6  # type: ignore[attr-defined]
    assert one.call() == 6


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "late_project.py").write_text("SCALE = 5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("late_project")
    monkeypatch.delitem(sys.modules, "late_project")
    monkeypatch.setitem(sys.modules, "late_project", module)
    return module


def test_partials_methods_properties_and_caches_are_seen_through(counted: Maker) -> None:
    factor = [2]

    class Thing:
        @property
        def size(self) -> int:
            return factor[0]

        @classmethod
        def made(cls) -> int:
            return factor[0]

        @functools.cached_property
        def kept(self) -> int:
            return factor[0]

        @staticmethod
        def alone() -> int:
            return factor[0]

    @functools.lru_cache
    def cached(x: int) -> int:
        return x * factor[0]

    one = counted(
        functools.partial(
            lambda *parts: (*(part() for part in parts), Thing().size, Thing().kept, cached(1)),
            Thing.made,
            Thing.alone,
        )
    )
    assert one.call() == (2, 2, 2, 2, 2)
    factor[0] = 3
    assert one.call() == (3, 3, 3, 3, 3)
    before = one.times
    one.captured.fresh()
    assert one.times == before


def test_what_cannot_travel_any_more_is_named_when_it_is_called(
    counted: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = counted(uses_config)
    one.captured.fresh()
    monkeypatch.setitem(CONFIG, "lock", threading.Lock())
    with pytest.raises(SerializationError, match=r"\(global 'CONFIG'\)\['lock'\] is a _thread.lock"):
        one.captured.fresh()
    monkeypatch.delitem(CONFIG, "lock")
    assert one.call() == CONFIG


def test_a_container_that_another_thread_changes_is_captured_anew(counted: Maker) -> None:
    numbers = list(range(1000))
    one = counted(lambda: sum(numbers))
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            numbers.append(numbers.pop(0))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(50):
            one.captured.fresh()
    finally:
        stop.set()
        thread.join()
    assert one.call() == sum(range(1000))


# ------------------------------------------------------------ kinds of functions


def test_generators_are_told_apart_from_functions_that_return() -> None:
    def generate() -> Iterator[int]:
        yield 1

    async def generate_later() -> Any:
        yield 1

    @functools.wraps(generate)
    def collected() -> Any:
        return list(generate())

    assert capture.yields(generate)
    assert capture.yields(generate_later)
    assert capture.yields(functools.partial(generate))
    assert capture.yields(types.MethodType(lambda self: (yield), 1))
    assert not capture.yields(collected)
    assert not capture.yields(plain)
    assert not capture.yields(len)


def test_a_generator_function_travels_to_a_session() -> None:
    def generate() -> Iterator[int]:
        yield NUMBER

    assert list(loaded(Captured(generate))()) == [1]


def test_too_large_surroundings_are_refused(counted: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "PICKLE_LIMIT_BYTES", 10_000)
    monkeypatch.setitem(CONFIG, "text", "x" * 20_000)
    with pytest.raises(SerializationError, match=r"uses_config and what it refers to take 20,\d+ bytes"):
        counted(uses_config).captured.fresh()


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(SerializationError, match="3 is not a function"):
        Captured(3)  # type: ignore[arg-type]
