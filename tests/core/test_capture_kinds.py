"""Every kind of function, run by a process in another folder that has none of the caller's modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flow_core import capture
from tests.core.conftest import without_our_modules
from tests.core.functions_to_capture import CASES

if TYPE_CHECKING:
    from tests.core.conftest import Machine

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("name", CASES)
def test_each_kind_runs_in_a_process_that_cannot_import_it(
    machine: Machine, name: str, tmp_path: Path
) -> None:
    function, args, expected = CASES[name]
    for file, data in capture.capture(function, args).items():
        (machine.task / file).write_bytes(data)
    assert machine.start(env=without_our_modules(tmp_path)).value == expected


@pytest.fixture
def run_script(home: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run a script as the user would, in a folder of its own; return what it printed last, as JSON."""
    folder = tmp_path / "the user's project"
    folder.mkdir()

    def run(text: str, **files: str) -> Any:
        for name, content in {"main": text, **files}.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(content))
        done = subprocess.run(
            [sys.executable, "main.py"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_functions_of_a_script_and_of_the_modules_beside_it_travel(
    run_script: Callable[..., Any],
) -> None:
    value = run_script(
        """
        import json
        import tools
        from tools import scaled, Scale
        from flow_core import Flow

        OFFSET = 1

        class Result:
            def __init__(self, value):
                self.value = value

        def train(n):
            return Result([scaled(n) + OFFSET, tools.scaled(n), Scale(n).doubled()])

        if __name__ == "__main__":
            done = Flow().call_async(train, [3]).get_result(60)
            assert type(done) is Result
            print(json.dumps(done.value))
        """,
        tools="""
        import more
        FACTOR = 5

        def scaled(n):
            return n * FACTOR + more.NOTHING

        class Scale:
            def __init__(self, n):
                self.n = n

            def doubled(self):
                return scaled(self.n) * 2
        """,
        more="NOTHING = 0",
    )
    assert value == [16, 15, 30]


def test_the_function_of_a_notebook_travels(run_script: Callable[..., Any]) -> None:
    """A cell is compiled from text that is in no file, into the namespace of `__main__`."""
    value = run_script(
        """
        import json, linecache
        from flow_core import Flow

        def cell(text, number, namespace):
            name = f"/tmp/ipykernel_1/{number}.py"
            linecache.cache[name] = (len(text), None, text.splitlines(True), name)
            exec(compile(text, name, "exec"), namespace)

        namespace = {"__name__": "__main__", "Flow": Flow}
        cell("import math\\nrate = 2", 1, namespace)
        cell("def helper(x):\\n    return math.sqrt(x) * rate", 2, namespace)
        cell("def f(x):\\n    assert x >= 0, x  # in the cell\\n    return helper(x)", 3, namespace)
        cell("rate = 3\\nvalue = Flow().call_async(f, [4]).get_result(60)", 4, namespace)
        try:
            cell("Flow().call_async(f, [-1]).get_result(60)", 5, namespace)
        except AssertionError as error:
            trace = str(error)
        print(json.dumps([namespace["value"], "assert x >= 0, x  # in the cell" in trace]))
        """
    )
    assert value == [6.0, True]


@pytest.mark.parametrize("registered", [True, False], ids=["known", "unknown"])
def test_the_function_of_a_file_that_was_loaded_under_another_name_travels(
    run_script: Callable[..., Any], registered: bool
) -> None:
    """As Airflow loads a DAG file, and Prefect a flow file."""
    value = run_script(
        f"""
        import importlib.util, json, sys
        from flow_core import Flow

        spec = importlib.util.spec_from_file_location("unusual_prefix_5f_dag", "dag.py")
        module = importlib.util.module_from_spec(spec)
        if {registered}:
            sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        print(json.dumps(Flow().call_async(module.train, [2]).get_result(60)))
        """,
        dag="""
        import math
        from dataclasses import dataclass

        @dataclass
        class Options:
            rate: float = 1.5

        def helper(n):
            return n * Options().rate

        def train(n: int) -> float:
            return helper(n) + math.floor(0.5)
        """,
    )
    assert value == 3.0


def test_what_cannot_travel_is_named_by_its_path(run_script: Callable[..., Any]) -> None:
    messages = run_script(
        """
        import ctypes, json, socket, sqlite3, tempfile, threading
        from flow_core import Flow
        from flow_core.errors import SerializationError

        lock = threading.Lock()
        file = tempfile.TemporaryFile()
        nested = {"connections": [sqlite3.connect(":memory:")]}
        handle = ctypes.pointer(ctypes.c_int(1))

        class Model:
            def __init__(self):
                self.layers = [{"stream": handle}]

            def predict(self):
                return len(self.layers)

        def use_lock():
            with lock:
                return 1

        def indirectly():
            return use_lock()

        def closure():
            local = socket.socket()
            return lambda: local

        def refuse(function, *args):
            try:
                Flow().call_async(function, args)
            except SerializationError as error:
                return error.message
            return "sent"

        print(json.dumps([
            refuse(indirectly),
            refuse(closure()),
            refuse(lambda: file.read()),
            refuse(lambda: nested),
            refuse(Model().predict),
            refuse(len, {"a": [file]}),
        ]))
        """
    )
    for message, path in zip(
        messages,
        [
            "indirectly (global 'use_lock') (global 'lock') is a _thread.lock",
            "<lambda> (closure variable 'local') is a socket.socket",
            "<lambda> (global 'file') is a _io.BufferedRandom",
            "<lambda> (global 'nested')['connections'][0] is a sqlite3.Connection",
            "predict.__self__.layers[0]['stream'] is a __main__.LP_c_int",
            "args[0]['a'][0] is a _io.BufferedRandom",
        ],
        strict=True,
    ):
        assert path in message
