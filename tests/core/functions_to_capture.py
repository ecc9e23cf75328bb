"""Functions of every kind that a user may send, with what they return. Only the caller can import this module."""

from __future__ import annotations

import abc
import asyncio
import collections
import contextlib
import dataclasses
import enum
import functools
import logging
import math
import operator
import os.path
import re
import typing
from collections import OrderedDict as Ordered
from collections.abc import Callable, Iterator
from os.path import join
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.linalg import norm

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any]] = {}
"""Name: (function, arguments, what it returns)."""

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
FACTOR = 3
LIMITS = {"low": 1, "high": [2, 3]}
COUNTER = 0
LOGGER = logging.getLogger("of the user")
WORD = re.compile("[a-z]+")


def case(*args: Any, returns: Any, name: str = "") -> Callable[[F], F]:
    def add(function: F) -> F:
        CASES[name or getattr(function, "__name__", "").strip("_")] = (function, args, returns)
        return function

    return add


# ------------------------------------------------------------ imports at the top of the file


@case(9, returns=[3.0, "a/b", ".x", [1, 2]])
def imports(n: int) -> Any:
    return [math.sqrt(n), join("a", "b"), os.path.splitext("a.x")[1], list(Ordered([(1, 0), (2, 0)]))]


@case(returns=5.0)
def import_of_a_submodule() -> float:
    return float(norm(np.array([3, 4])) * np.linalg.det(np.eye(2)))


@case([1, 2], returns=[2, 4])
def with_annotations(
    values: list[int], scale: np.float64 | None = None, *rest: typing.Any
) -> np.ndarray[Any, Any]:
    return (np.asarray(values) * 2).tolist()  # type: ignore[no-any-return]


# ------------------------------------------------------------ helpers, recursion, classes


def helper(n: int) -> int:
    return other_helper(n) * FACTOR


def other_helper(n: int) -> int:
    return n + LIMITS["low"]  # type: ignore[operator]


@case(2, returns=9)
def helpers(n: int) -> int:
    return helper(n)


@case(5, returns=120)
def recursion(n: int) -> int:
    return 1 if n < 2 else n * recursion(n - 1)


@case(7, returns=[False, True])
def mutual_recursion(n: int) -> list[bool]:
    return [is_even(n), is_odd(n)]


def is_even(n: int) -> bool:
    return n == 0 or is_odd(n - 1)


def is_odd(n: int) -> bool:
    return n != 0 and is_even(n - 1)


class Shape(abc.ABC):
    registry: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Shape.registry.append(cls.__name__)

    @abc.abstractmethod
    def area(self) -> float: ...

    @property
    def doubled(self) -> float:
        return self.area() * 2

    @functools.cached_property
    def kept(self) -> float:
        return self.area() * FACTOR


class Square(Shape):
    __slots__ = ("side",)

    class Nested:
        value = "nested"

    def __init__(self, side: float) -> None:
        super().__init__()
        self.side = side

    def area(self) -> float:
        return self.side**2

    @classmethod
    def unit(cls) -> Square:
        return cls(1)

    @staticmethod
    def name() -> str:
        return f"square with {FACTOR}"


class Point(NamedTuple):
    x: int
    y: int = 2

    def total(self) -> int:
        return self.x + self.y


@dataclasses.dataclass(order=True)
class Track:
    title: str
    seconds: int = dataclasses.field(default=1, compare=True)
    tags: list[str] = dataclasses.field(default_factory=list)


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"

    def opposite(self) -> Colour:
        return Colour.BLUE if self is Colour.RED else Colour.RED


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Box(Generic[T]):
    def __init__(self, content: T) -> None:
        self.content = content


class Callable_:  # noqa: N801
    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, m: int) -> int:
        return self.n * m * FACTOR

    def method(self, m: int) -> int:
        return self(m) + 1


@case(3, returns=[9, 18, 27, 1, "square with 3", "nested", ["Square"]])
def classes(side: float) -> Any:
    one = Square(side)
    return [
        *(one.area(), one.doubled, one.kept, Square.unit().area(), one.name(), one.Nested.value),
        Shape.registry[:1],
    ]


@case(returns=[3, [1, 2], True, "b", 3, "x", "Box"])
def special_classes() -> Any:
    tracks = sorted([Track("b", 2), Track("a")])
    return [
        *(Point(1).total(), list(Point(1)), tracks[0] == Track("a")),
        *(Colour.RED.opposite().value, int(Flags.A | Flags.B), Box[str]("x").content, Box.__name__),
    ]


@case(returns=[9, "made in f"])
def class_in_a_function() -> Any:
    class Local:
        tripled = FACTOR * FACTOR  # a global that only a class body uses
        FACTOR = "made in f"
        again = FACTOR

    return [Local.tripled, Local.again]


# ------------------------------------------------------------ closures and globals


def make_closure() -> Callable[[int], list[int]]:
    base = 10

    def add(n: int) -> list[int]:
        return [base + n, depth(n)]

    def depth(n: int) -> int:
        return 0 if n == 0 else 1 + depth(n - 1)

    base = 20  # assigned after the function was made
    return add


case(2, returns=[22, 2], name="closure")(make_closure())


def make_empty_cell() -> Callable[[], str]:
    def look() -> str:
        try:
            return never_assigned
        except NameError:
            return "empty"

    if FACTOR == 0:
        never_assigned = ""
    return look


case(returns="empty", name="empty_cell")(make_empty_cell())


@case(returns=[1, [2, 3], "later"])
def globals_of_all_kinds() -> Any:
    return [LIMITS["low"], LIMITS["high"], ASSIGNED_LATER]


ASSIGNED_LATER = "later"


@case(returns=1)
def global_statement() -> int:
    global COUNTER  # noqa: PLW0603 - what it does to the caller's is the question
    COUNTER += 1
    return COUNTER


@case(returns=["of the user", "abc"])
def logger_and_pattern() -> Any:
    LOGGER.info("hello")
    found = WORD.match("abc1")
    return [LOGGER.name, found and found[0]]


@case(returns=[3, 6, "kw"])
def defaults(n: int = FACTOR, m: Callable[[int], int] = lambda n: n * 2, *, k: str = "kw") -> Any:
    return [n, m(n), k]


@case(1, 2, 3, returns=[1, [2, 3], {}])
def varied(first: int, *rest: int, **named: int) -> Any:
    return [first, list(rest), named]


# ------------------------------------------------------------ decorators


def doubled(function: F) -> F:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return 2 * function(*args, **kwargs)

    return typing.cast(F, wrapper)


class Decorating:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return self.factor * function(*args)

        return typing.cast(F, wrapper)


@case(4, returns=96)
@doubled
@Decorating(FACTOR)
def decorated(n: int) -> int:
    return n * 4


@functools.lru_cache(maxsize=7)
def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


case(80, returns=23416728348467685, name="lru_cache")(fibonacci)


@case(returns=[23416728348467685, 7])
def helper_with_lru_cache() -> Any:
    return [fibonacci(80), fibonacci.cache_info().maxsize]


@contextlib.contextmanager
def adding(values: list[str]) -> Iterator[None]:
    values.append("in")
    yield
    values.append("out")


@case(returns=["in", "body", "out"])
def context_manager() -> list[str]:
    values: list[str] = []
    with adding(values):
        values.append("body")
    return values


@functools.singledispatch
def kind(value: Any) -> str:
    return "other"


@kind.register
def _(value: int) -> str:
    return "int"


@case(returns=["int", "other"])
def single_dispatch() -> list[str]:
    return [kind(1), kind("a")]


# ------------------------------------------------------------ what is not a plain function

case(4, returns=12, name="lambda")(lambda n: n * FACTOR)
case(4, returns=15, name="partial")(functools.partial(helper))
case(4, returns=[1, [2, 4], {"k": 1}], name="partial_with_arguments")(functools.partial(varied, 1, 2, k=1))
case(4, returns=8, name="partial_of_lambda")(functools.partial(lambda n, m: n * m, 2))
case(4, returns=25, name="bound_method")(Callable_(2).method)
case(4, returns=24, name="callable_object")(Callable_(2))
case(returns="square with 3", name="static_method")(Square.name)
case(returns="Square", name="class_method")(lambda: type(Square.unit()).__name__)
case(9, returns=3.0, name="builtin")(math.sqrt)
case([3, 1], returns=[1, 3], name="builtin_function")(sorted)
case({"a": 1}, returns=1, name="operator")(operator.itemgetter("a"))
case([3, 4], returns=5.0, name="function_of_a_package")(norm)
case("ab", returns={"a": 1, "b": 1}, name="class")(collections.Counter)


@case(2, returns=9)
async def coroutine_function(n: int) -> int:
    await asyncio.sleep(0)
    return await another(n)


async def another(n: int) -> int:
    return helper(n)


@case(returns="a/b")
def paths() -> str:
    return str(Path("a") / "b")


@case(returns=[[0, 1, 4], {"a": "aaa"}, [2, 1]])
def comprehensions() -> Any:
    return [
        [n * n for n in range(3)],
        {k: k * FACTOR for k in "a"},
        sorted([1, 2], key=lambda n: -n * FACTOR),
    ]


@case(returns=[["why"], 3])
def exceptions() -> Any:
    try:
        refuse()
    except Refused as error:
        return [list(error.args), error.code]


def refuse() -> None:
    raise Refused("why", 3)


class Refused(ValueError):
    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.code = code
