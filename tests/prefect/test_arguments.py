"""Arguments travel without types that the machine does not have."""

from __future__ import annotations

from typing import Any

from prefect.futures import PrefectFutureList

from flow_core import TaskTimeLimitError
from flow_core.errors import remote_error
from flow_prefect.arguments import plain


def test_what_is_plain_already_is_not_copied() -> None:
    value = {"a": [1, (2, {"b": object()})]}
    assert plain(value) is value


def test_lists_of_prefect_become_lists_wherever_they_stand() -> None:
    futures: Any = PrefectFutureList
    value: Any = {"a": (1, futures([2, futures([3])]))}
    assert plain(value) == {"a": (1, [2, [3]])}
    assert type(plain(value)["a"][1]) is list
    assert type(value["a"][1]) is PrefectFutureList


def test_errors_become_exceptions_that_every_python_knows() -> None:
    found = plain(
        [
            remote_error({"type": "ValueError", "module": "builtins", "message": "bad"}),
            remote_error({"type": "MyError", "module": "train", "message": "bad"}),
            remote_error({"type": "UnicodeDecodeError", "module": "builtins", "message": "bad"}),
            TaskTimeLimitError("too slow"),
        ]
    )
    assert [(type(one), str(one)) for one in found] == [
        (ValueError, "bad"),
        (RuntimeError, "MyError: bad"),
        (RuntimeError, "UnicodeDecodeError: bad"),
        (RuntimeError, "TaskTimeLimitError: too slow"),
    ]


def test_a_list_that_contains_itself_is_left_to_pickle() -> None:
    value: list[Any] = [1]
    value.append(value)
    assert plain(value) is value
