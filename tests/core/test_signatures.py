"""What arguments fit a function, a class and a method, found out without calling them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_core.signatures import Fit


def plain(a: Any, b: Any = 1, *, c: Any = 2) -> None: ...
def positional(a: Any, /, *rest: Any) -> None: ...
def must(*, key: Any) -> None: ...
def anything(*args: Any, **kwargs: Any) -> None: ...


@functools.wraps(must)
def wrapper(a: Any) -> None: ...


class Class:
    def __init__(self, a: Any, b: Any = 1) -> None: ...
    def method(self, a: Any, *, b: Any = 1) -> None: ...
    @staticmethod
    def static(a: Any) -> None: ...
    @classmethod
    def named(cls, a: Any) -> None: ...
    def __call__(self, a: Any) -> None: ...

    partly = functools.partialmethod(method, 1)


FUNCTIONS: list[Callable[..., Any]] = [
    *(
        plain,
        positional,
        must,
        anything,
        wrapper,
        Class,
        Class(1),
        Class(1).method,
        Class.static,
        Class.named,
    ),
    *(functools.partial(plain, 1), functools.partial(plain, a=1)),
]
keys = st.sampled_from(["a", "b", "c", "key", "zzz"])


@given(
    function=st.sampled_from(FUNCTIONS),
    args=st.lists(st.integers(), max_size=4),
    kwargs=st.dictionaries(keys, st.integers(), max_size=3),
)
def test_it_says_what_a_call_would_say(
    function: Callable[..., Any], args: list[int], kwargs: dict[str, int]
) -> None:
    def refused(call: Callable[[], Any]) -> bool:
        try:
            call()
        except TypeError:
            return True
        return False

    fit = Fit.of(function, "f")
    assert refused(lambda: fit.check(args, kwargs)) == refused(lambda: function(*args, **kwargs))


@pytest.mark.parametrize("name", ["method", "static", "named", "__call__"])
def test_a_method_is_known_by_its_class(name: str) -> None:
    fit = Fit.of_method(Class, name)
    fit.check([1], {})
    with pytest.raises(
        TypeError, match=rf"do not fit Class.{name}\(a.*\).*: missing a required argument: 'a'"
    ):
        fit.check([], {})


def test_what_has_no_signature_takes_everything() -> None:
    for fit in (Fit.of(max, "max"), Fit.of_method(Class, "partly"), Fit.of_method(str, "join")):
        fit.check([1, 2, 3], {"x": 1})
