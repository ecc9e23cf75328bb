"""Every kind of function on a warm worker, which runs many of them one after the other and can import none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flow_core.errors import SerializationError
from flow_core.function_options import Serialization
from flow_core.sessions import Session
from flow_core.several import get
from tests.core.functions_to_capture import CASES
from tests.core.test_capture_kinds import run_script

__all__ = ["run_script"]  # a fixture


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("serialization", Serialization)
def test_each_kind_runs_on_a_worker_that_cannot_import_it(
    shared_session: Session, name: str, serialization: Serialization
) -> None:
    function, args, expected = CASES[name]
    remote = shared_session.function(serialization=serialization)(function)
    for _ in range(1 if name == "global_statement" else 2):  # the second time it is there
        assert remote.remote(*args).result(30) == expected


def test_a_class_is_one_class_for_all_functions_of_a_worker(shared_session: Session) -> None:
    class Thing:
        pass

    pickled = shared_session.function(serialization="pickle", workers=1)

    @pickled
    def make() -> Thing:
        return Thing()

    @pickled
    def check(thing: Thing) -> bool:
        return isinstance(thing, Thing)

    thing = make.remote().result()
    assert type(thing) is Thing
    assert check.remote(thing).result()


def test_a_generator_of_each_kind_runs(shared_session: Session) -> None:
    class Counter:
        def __init__(self, n: int) -> None:
            self.n = n

        def count(self) -> Iterator[int]:
            yield from range(self.n)

    assert list(shared_session.function(Counter(3).count).remote()) == [0, 1, 2]


def test_what_cannot_travel_is_named_in_the_caller_before_anything_starts() -> None:
    lock = threading.Lock()
    session = Session(provider="local")

    @session.function
    def use() -> None:
        lock.acquire()

    with pytest.raises(SerializationError, match=r"use \(closure variable 'lock'\) is a _thread.lock"):
        use.remote()
    assert session._pools == {}


def test_the_session_of_a_script_runs_its_functions_and_those_of_its_modules(
    run_script: Callable[..., Any],
) -> None:
    value = run_script(
        """
        import json
        import jobs
        from jobs import session, scaled

        RATE = 2

        @session.function
        def here(n):
            return scaled(n) + RATE

        class Result:
            def __init__(self, value):
                self.value = value

        @session.function(serialization="pickle")
        def made(n):
            return Result(here(n))

        if __name__ == "__main__":
            with session:
                first = here.remote(1).result()
                RATE = 3
                second = made.remote(1).result()
                assert type(second) is Result
                print(json.dumps([first, second.value, jobs.scaled.remote(2).result(), scaled(2)]))
        """,
        jobs="""
        import flow_core

        session = flow_core.Session(workers=1)
        FACTOR = 5

        def helper(n):
            return n * FACTOR

        @session.function()
        def scaled(n: int) -> int:
            return helper(n)
        """,
    )
    assert value == [7, 8, 10, 10]


def test_the_session_of_a_notebook_runs_what_its_cells_define_and_define_again(
    run_script: Callable[..., Any],
) -> None:
    cells = [
        "import flow_core, math\nsession = flow_core.Session(workers=1)\nrate = 2",
        "def helper(x):\n    return math.sqrt(x) * rate\n@session.function\ndef f(x):\n    return helper(x)",
        "values = [f.remote(4).result()]",
        "def helper(x):\n    return x",  # the cell is changed and run again
        "values.append(f.remote(4).result())\nsession.close()",
    ]
    value = run_script(
        f"""
        import json, linecache
        namespace = {{"__name__": "__main__"}}
        for number, text in enumerate({cells!r}):
            name = f"/tmp/ipykernel_1/{{number}}.py"
            linecache.cache[name] = (len(text), None, text.splitlines(True), name)
            exec(compile(text, name, "exec"), namespace)
        print(json.dumps(namespace["values"]))
        """
    )
    assert value == [4.0, 4]


def test_a_worker_finds_none_of_the_callers_modules(shared_session: Session) -> None:
    @shared_session.function
    def look(name: str) -> str:
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            return str(error)
        return f"{name} is there"

    found = get(look.map(["tests.core.functions_to_capture", "flow_core", "numpy"]))
    assert found == ["No module named 'tests'", "No module named 'flow_core'", "numpy is there"]
