"""The wire format: what goes in comes out, and what cannot is refused with its place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_core import payload
from flow_core.errors import (
    PythonVersionMismatchError,
    RemoteExecutionError,
    ResultError,
    SerializationError,
    TaskExecutionError,
    ValidationError,
)
from flow_core.runner.strict_json import JSON_LIMIT_BYTES, NotSerializable, from_json, to_json

texts = st.text(st.characters(exclude_categories=()))  # lone surrogates and NUL included
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


def result_file(value: Any = None, **changes: Any) -> bytes:
    body = pickle.dumps(value) if changes.get("codec") == "pickle" else json.dumps(value).encode()
    header = {
        "v": 1,
        "ok": True,
        "codec": "json",
        "size": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    return json.dumps({**header, **changes}).encode() + b"\n" + body


def failure(**record: Any) -> bytes:
    return json.dumps({"v": 1, "ok": False, "error": record}).encode() + b"\n"


# ------------------------------------------------------------ calls


@given(args=st.lists(values), kwargs=st.dictionaries(texts, values))
def test_every_json_value_arrives_as_it_was(args: list[Any], kwargs: dict[str, Any]) -> None:
    data = payload.encode_call("train.py", "f", args, kwargs)
    call = from_json(data)
    assert call == json.loads(data)
    assert (call["args"], call["kwargs"]) == (args, kwargs)
    assert repr(call["args"]) == repr(args)  # 1, 1.0 and True are told apart
    assert (call["v"], call["kind"], call["module"], call["function"]) == (1, "file", "train.py", "f")


def test_without_arguments_both_are_empty() -> None:
    call = from_json(payload.encode_call("pkg.mod", "f"))
    assert (call["args"], call["kwargs"], call["codec"]) == ([], {}, "json")


def test_what_is_a_kind_of_a_plain_value_travels_as_one() -> None:
    args = (np.float64(0.5), OrderedDict(a=(1, (2,))))
    assert from_json(payload.encode_call("m", "f", args))["args"] == [0.5, {"a": [1, [2]]}]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ([{"x": np.zeros(3)}], {}, "args[0]['x'] is a numpy.ndarray; use .tolist(), or numpy.save() it"),
        ([1, np.float32(1)], {}, "args[1] is a numpy.float32; use .item()"),
        ([], {"c": {"lr": np.int64(1)}}, "kwargs['c']['lr'] is a numpy.int64; use .item()"),
        ([np.bool_(True)], {}, "args[0] is a numpy.bool; use .item()"),
        ([{1: 2}], {}, "args[0] has a key that is no string: 1 (int); use str(key)"),
        ([], {3: 4}, "kwargs has a key that is no string: 3 (int)"),
        ([[float("nan")]], {}, "args[0][0] is nan"),
        ([np.float64("inf")], {}, "args[0] is inf"),
        ([threading.Lock()], {}, "args[0] is a _thread.lock"),
        ([{"a'\n": b"x"}], {}, 'args[0]["a\'\\n"] is a bytes'),
        (["x" * JSON_LIMIT_BYTES], {}, "args takes 10,485,764 bytes as JSON; at most 10,485,760 can travel"),
        (["x" * 6_000_000], {"y": "y" * 6_000_000}, "args and kwargs take 12,000,012 bytes as JSON"),
    ],
)
def test_an_argument_that_cannot_travel_is_named(args: list[Any], kwargs: dict[Any, Any], text: str) -> None:
    with pytest.raises(TypeError) as caught:
        payload.encode_call("train.py", "f", args, kwargs)
    assert isinstance(caught.value, SerializationError)
    assert str(caught.value).startswith("Cannot serialize arguments. Save to disk and pass path. " + text)


@pytest.mark.parametrize(("args", "kwargs"), [("abc", {}), ({"a": 1}, {}), (7, {}), ([], [("a", 1)])])
def test_args_that_are_no_list_and_kwargs_that_are_no_dict_are_refused(args: Any, kwargs: Any) -> None:
    with pytest.raises(ValidationError, match="is no (list|dict)"):
        payload.encode_call("train.py", "f", args, kwargs)


def test_the_limit_is_the_last_size_that_travels() -> None:
    assert len(to_json("x" * (JSON_LIMIT_BYTES - 2), "x")) == JSON_LIMIT_BYTES
    with pytest.raises(NotSerializable):
        to_json("x" * (JSON_LIMIT_BYTES - 1), "x")


# ------------------------------------------------------------ results


@given(values)
def test_every_json_result_is_read_as_it_was(value: Any) -> None:
    assert payload.decode_result(result_file(value)) == value


def test_a_pickle_is_read_only_where_the_caller_asked_for_it() -> None:
    data = result_file(np.arange(3), codec="pickle")
    assert list(payload.decode_result(data, allow_pickle=True)) == [0, 1, 2]
    with pytest.raises(ResultError, match="the result is a pickle") as caught:
        payload.decode_result(data, task_id="t-1")
    assert caught.value.task_id == "t-1"
    assert 'serialization="pickle"' in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("import os; os.environ['FLOW_TEST_UNPICKLED'] = '1'",)


def test_a_damaged_pickle_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOW_TEST_UNPICKLED", raising=False)
    with pytest.raises(ResultError, match="damaged: its bytes are not those"):
        payload.decode_result(result_file(Evil(), codec="pickle", sha256="0" * 64), allow_pickle=True)
    assert "FLOW_TEST_UNPICKLED" not in os.environ


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the result file is damaged"),
        (b"\n", "the result file is damaged"),
        (b"[]\n", "the result file is damaged"),
        (b"\xff\xfe\n", "the result file is damaged"),
        (b'{"v":1}\n', "the result file is damaged: 'ok'"),
        (b'{"v":1,"ok":false}\n', "holds neither a value nor an error"),
        (result_file([1, 2])[:-1], r"damaged: 5 of 6 bytes are there"),
        (result_file([1, 2]) + b" ", r"damaged: 7 of 6 bytes are there"),
        (result_file([1, 2]).replace(b"[1", b"[2"), "damaged: its bytes are not those that were written"),
        (result_file(1, codec="yaml"), "encoded as 'yaml', which is not known here"),
        (result_file(1, v=2), "version 2 of the wire format; this side reads version 1"),
    ],
)
def test_what_cannot_be_read_says_so(data: bytes, text: str) -> None:
    with pytest.raises(ResultError, match=text):
        payload.decode_result(data, allow_pickle=True)


@given(st.binary(), st.integers(0, 200))
def test_no_bytes_raise_anything_but_our_errors(noise: bytes, cut: int) -> None:
    for data in (noise, result_file("value")[:cut], result_file("value")[:cut] + noise):
        with contextlib.suppress(TaskExecutionError):
            assert payload.decode_result(data) == "value"


# ------------------------------------------------------------ errors


def test_the_functions_exception_is_raised_with_all_its_fields() -> None:
    data = failure(type="KeyError", module="builtins", qualname="KeyError", message="'k'", traceback="trace")
    with pytest.raises(KeyError) as caught:
        payload.decode_result(data, task_id="t-1", exit_code=1, log_tail="tail")
    error = caught.value
    assert isinstance(error, RemoteExecutionError)
    assert (error.task_id, error.exit_code, error.log_tail) == ("t-1", 1, "tail")
    assert str(error).startswith("Remote execution failed: KeyError: 'k'")


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("ResultTooLarge", "flow_runner.execute", ResultError),
        ("ResultNotSerializable", "flow_runner.execute", ResultError),
        ("PythonVersionMismatch", "flow_runner.pickles", PythonVersionMismatchError),
        ("WireVersionMismatch", "flow_runner.execute", TaskExecutionError),
        ("ResultTooLarge", "users.module", RemoteExecutionError),
    ],
)
def test_what_the_runner_refuses_is_not_blamed_on_the_function(
    name: str, module: str, expected: type
) -> None:
    error = payload.decode_error(failure(type=name, module=module, message="text"), task_id="t-1")
    assert type(error) is expected
    assert error is not None
    assert error.task_id == "t-1"


def test_a_value_is_no_error_and_a_damaged_file_is_one() -> None:
    assert payload.decode_error(result_file(1)) is None
    assert isinstance(payload.decode_error(b"noise", task_id="t-1"), ResultError)
