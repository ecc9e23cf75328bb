"""Maps whose items travel many at a time: as if each had travelled alone."""

from __future__ import annotations

import functools
import math
import operator
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from flow_core import Flow, Session, encoding
from flow_core.errors import ResultError, SerializationError
from flow_core.runner import parcels
from tests.sessions.conftest import eventually

QUICK = 100_000
"""So many calls, and the session knows that they are short."""


@pytest.fixture
def session(flow: Flow) -> Iterator[Session]:
    with Session(flow=flow, workers=2) as session:
        yield session


def known_as_quick(handle: Any, item: Any) -> Any:
    """Call it so often that its calls travel many at a time."""

    def called() -> bool:  # a call may be interrupted by other processes, and seem to have taken that long
        for _ in handle.imap([item] * QUICK):
            pass
        return bool(handle._sent[1].estimate < 5)  # microseconds

    eventually(called, within_s=60)
    return handle


@pytest.mark.parametrize("position", [0, 1, 700, 1999])
def test_a_function_written_in_c_may_fail_anywhere(session: Session, position: int) -> None:
    handle = known_as_quick(session.function(functools.partial(operator.getitem, (10, 11))), 0)
    items = [0] * 2000
    items[position] = 7
    values = list(handle.imap(items, return_exceptions=True))
    assert len(values) == 2000
    assert [index for index, value in enumerate(values) if value != 10] == [position]
    assert isinstance(values[position], IndexError)


def test_no_exception_of_an_item_ends_the_map(session: Session) -> None:
    def odd(number: int) -> int:
        if number % 2:
            raise StopIteration(number)
        return number

    values: list[Any] = list(session.function(odd).imap(range(100), return_exceptions=True))
    assert values[::2] == list(range(0, 100, 2))
    assert [value.exception_type for value in values[1::2]] == ["StopIteration"] * 50


def test_a_map_that_is_closed_yields_nothing_more(session: Session) -> None:
    handle = known_as_quick(session.function(lambda x: x), 1)
    values: Any = handle.imap(range(10_000))
    assert next(values) == 0
    values.close()
    assert list(values) == []


def test_large_items_and_large_values_travel_in_as_many_parts_as_it_takes(session: Session) -> None:
    longer: Any = known_as_quick(session.function(lambda x: [x] * len(x)), "")
    items = ["y" * 60] * 20_000
    values = 0
    for value in longer.imap(items):
        assert value == ["y" * 60] * 60
        values += 1
    assert values == 20_000
    measured = known_as_quick(session.function(lambda x: len(x or ())), [])
    assert sum(measured.imap([["z" * 5000]] * 10_000)) == 10_000
    with pytest.raises(SerializationError, match="at most 10,485,760 can travel"):
        list(measured.imap([[], ["z" * 11_000_000]]))


VALUES: list[list[Any]] = [
    [1, -1, 0, 2**63, -(2**100)],
    [1.5, -0.0, 1e308, 5e-324],
    [True, False, None, "", "text", "\ud800", "\x8b\x93", "é"],
    [1, True, 2, False],
    [1, 2.5, "mixed", None],
    [[1], [2]],
    [(1, 2), 3],
    ['{"flow/ref": 1}', "x"],
]


@pytest.mark.parametrize("values", VALUES, ids=range(len(VALUES)))
def test_values_and_their_types_are_those_that_json_gives(session: Session, values: list[Any]) -> None:
    same = known_as_quick(session.function(lambda *x: x[0] if len(x) == 1 else list(x)), None)
    wanted = [list(value) if isinstance(value, tuple) else value for value in values]
    for got in (list(same.imap(values)), list(same.imap(values * 50))[: len(values)]):
        assert got == wanted and list(map(type, got)) == list(map(type, wanted))
        assert [str(one) for one in got] == [str(one) for one in wanted], "also the sign of a zero"


REFUSED = {"nan": math.nan, "infinite": math.inf, "huge": 1 << 20_000, "set": {1}, "bytes": b"x"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_json_refuses_is_refused_both_ways(session: Session, name: str) -> None:
    refused = REFUSED[name]
    same = known_as_quick(session.function(lambda x: x), 1)
    with pytest.raises(SerializationError, match="Cannot serialize arguments"):
        list(same.imap([refused, refused]))
    made = known_as_quick(session.function(lambda x: refused if x else 0), 0)
    with pytest.raises(ResultError, match="Cannot serialize the result"):
        list(made.imap([0, 1, 0]))


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_plain_values_runs_nothing(protocol: int) -> None:
    bad = pickle.dumps([[Evil()], {}], protocol)
    with pytest.raises(pickle.UnpicklingError, match="in a pickle of plain values"):
        parcels.plain(bad)
    with pytest.raises(ResultError, match="cannot be read here"):
        encoding.value(parcels.Parcel(parcels.PLAIN, bad), "json", "a-task")
    with pytest.raises(ResultError, match="a pickle where JSON was asked for"):
        encoding.value(parcels.Parcel(parcels.PICKLE, bad), "json", "a-task")
    fine = pickle.dumps([[1, "x", None, 2.5], {}], protocol)
    assert encoding.value(parcels.Parcel(parcels.PLAIN, fine), "json", "a-task") == [[1, "x", None, 2.5], {}]
