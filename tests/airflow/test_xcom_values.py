"""What is let through arrives as it was: checked against Airflow's own serializers, and the steps after them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections import namedtuple
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_airflow.compat import deserialize, serialize
from flow_airflow.xcom_values import flaw, without_nan
from flow_core import ObjectRef

REF = ObjectRef(
    uri="flow+task://local/train-0123456789abcdef-1/result.data", size_bytes=3, sha256="ab" * 32, codec="json"
)

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(dt.timezone.utc))
    | st.timedeltas()
    | st.uuids()
    | st.complex_numbers()
)
KEYS = (
    st.text()
    | st.integers()
    | st.none()
    | st.sampled_from(["__classname__", "__type", "__var", "__id__", "__version__"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner) | st.tuples(inner, inner) | st.sets(LEAVES),
    max_leaves=8,
)


def stored_and_read(value: Any) -> Any:
    """Do what Airflow does between two tasks: its serializers, msgpack to the supervisor, JSON to the API, and back."""
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(serialize(value)))
    return deserialize(json.loads(json.dumps(sent, allow_nan=False)))


@given(VALUES)
def test_what_has_no_flaw_arrives_equal_and_with_its_types(value: Any) -> None:
    if flaw(value) is None:
        back = stored_and_read(value)
        assert back == value
        assert type(back) is type(value)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abc"), inner),
    )
)
def test_plain_values_have_no_flaw(value: Any) -> None:
    assert flaw(value) is None


@dataclasses.dataclass
class Point:
    x: int = 1


class Loud(str):
    __slots__ = ()


Pair = namedtuple("Pair", "a b")  # noqa: PYI024  # what users write


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            {"a": [1, {2: 3}]},
            "result['a'][1] has a key that is no text: 2 (builtins.int); return {str(key): one",
        ),
        ([b"x"], "result[0] is a bytes, which Airflow does not store (TypeError"),
        ({"loss": float("-inf")}, "result['loss'] is -inf, for which JSON has no form"),
        (2**64, "result is an int of 65 bits, and 64 can be sent; return hex(value)"),
        (["\ud800"], "result[0] holds half of a character ('\\ud800')"),
        (
            Pair(1, 2),
            "result is a tests.airflow.test_xcom_values.Pair, Pair(a=1, b=2), and Airflow makes builtins.tuple",
        ),
        (Loud("x"), "return str(value)"),
        (Point(), "return dataclasses.asdict(value)"),
        (1j, "return [value.real, value.imag]"),
        (
            dt.datetime(2030, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=2))),
            "result is a datetime.datetime, which Airflow",
        ),
        ({"__classname__": "x", "__version__": 1}, "has a key that Airflow keeps for itself: __classname__"),
        ({"__type": "x", "__var": 1}, "has a key that Airflow keeps for itself: __type, __var"),
    ],
)
def test_a_flaw_names_the_path_the_value_and_the_way_out(value: Any, said: str) -> None:
    assert said in str(flaw(value))


def test_what_contains_itself_or_is_very_deep_is_refused_and_not_followed_for_ever() -> None:
    endless: list[Any] = []
    endless.append({"again": endless})
    assert "nested more than 100 deep" in str(flaw(endless))


def test_numpys_scalars_arrive_as_such_and_arrays_are_refused_with_the_way_out() -> None:
    for value in (np.float64(0.5), np.float32(0.1), np.int64(3), np.bool_(True)):
        assert flaw([value]) is None
        back = stored_and_read(value)
        assert (type(back), back) == (type(value), value)
    assert "result['x'] is a numpy.ndarray, which Airflow does not store" in str(flaw({"x": np.zeros(2)}))
    assert "return value.tolist()" in str(flaw(np.zeros(2)))
    assert "result[0] is np.float64(nan), for which JSON has no form" in str(flaw([np.float64("nan")]))


def test_a_reference_is_let_through_and_is_the_same_afterwards() -> None:
    assert flaw({"model": [REF]}) is None
    assert stored_and_read({"model": [REF]}) == {"model": [REF]}


def test_none_takes_the_place_of_what_is_no_number_and_all_else_stays() -> None:
    value, where = without_nan({"loss": [1.0, float("nan")], "best": (float("inf"), "x")})
    assert value == {"loss": [1.0, None], "best": (None, "x")}
    assert where == ["result['loss'][1]", "result['best'][0]"]
