"""call_async: a live function travels by value to a Python that knows nothing of ours or of the caller's modules."""

from __future__ import annotations

import functools
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow, InvokeTask, RemoteExecutionError
from flow_core.errors import ResultError, SerializationError

FACTOR = 3


def helper(x: int) -> int:
    return x * FACTOR


def uses_helper(x: int) -> int:
    return helper(x) + 1


def fails() -> None:
    raise LookupError("not here")


class Pair:
    def __init__(self, a: int) -> None:
        self.a = a

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pair) and other.a == self.a

    def __hash__(self) -> int:
        return self.a


def make(a: int) -> Pair:
    return Pair(a)


def log_and_return(x: int) -> int:
    logging.getLogger("body").warning("said %s", x)
    return x


@pytest.fixture
def flow(home: Path) -> Flow:
    return Flow("local")


def test_a_function_with_its_helpers_and_globals_travels(flow: Flow) -> None:
    assert flow.call_async(uses_helper, [5]).get_result(30) == 16


def test_closures_lambdas_partials_and_methods_travel(flow: Flow) -> None:
    base = 10
    calls = [
        flow.call_async(lambda x: x + base, [1]),
        flow.call_async(functools.partial(helper, 4)),
        flow.call_async(Pair(7).__eq__, [Pair(7)]),
    ]
    assert [call.get_result(30) for call in calls] == [11, 12, True]


def test_any_value_comes_back_by_pickle_and_only_for_those_who_ask(flow: Flow) -> None:
    call = flow.call_async(make, [3])
    value: Any = call.get_result(30)
    assert value == Pair(3)
    with pytest.raises(ResultError, match="pickle"):
        InvokeTask.from_id(call.task_id).get_result(30)
    assert InvokeTask.from_id(call.task_id, serialization="pickle").get_result(30) == Pair(3)


def test_a_json_result_needs_no_trust(flow: Flow) -> None:
    call = flow.call_async(helper, [2], serialization="json")
    assert InvokeTask.from_id(call.task_id).get_result(30) == 6


def test_its_own_exception_comes_back(flow: Flow) -> None:
    with pytest.raises(LookupError, match="not here") as caught:
        flow.call_async(fails).get_result(30)
    assert isinstance(caught.value, RemoteExecutionError)


def test_what_cannot_travel_is_named_before_anything_starts(flow: Flow) -> None:
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="lock"):
        flow.call_async(lambda: lock)
    assert flow.list_tasks() == []


def test_the_same_key_adopts_the_call(flow: Flow) -> None:
    first = flow.call_async(helper, [2], idempotency_key="k")
    assert flow.call_async(helper, [2], idempotency_key="k").task_id == first.task_id


def test_what_it_logs_is_in_the_log(flow: Flow) -> None:
    call = flow.call_async(log_and_return, [5])
    assert call.get_result(30) == 5
    assert "said 5" in call.logs()
