"""How a call ends without a value, and what its error record tells; on every Python that is here."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from flow_core.errors import RemoteExecutionError

if TYPE_CHECKING:
    from tests.core.conftest import Machine

NASTY = ["", "'; rm -rf /; '", '"\\"', "a\nb\r\n", "\0", "\ud800", "😀 é", "$(date) `id` %s {0}", "\u2028"]


# ------------------------------------------------------------ ends without a value


@pytest.mark.parametrize(
    ("argument", "code", "text"),
    [
        ("0", 1, "sys.exit(0) was called before the function returned a value"),
        ("", 1, "sys.exit() was called before the function returned a value"),
        ("3", 3, "sys.exit(3) was called before the function returned a value"),
        ("256", 1, "sys.exit(256) was called before the function returned a value"),
        ("-1", 255, "sys.exit(-1) was called before the function returned a value"),
        ("'out of data'", 1, "out of data"),
    ],
)
def test_sys_exit_is_never_a_success(each: Machine, argument: str, code: int, text: str) -> None:
    done = each.call(f"import sys\ndef f():\n    sys.exit({argument})")
    record = done.record
    assert (done.code, record["type"], record["message"], record["exit_code"]) == (
        code,
        "SystemExit",
        text,
        code,
    )


def test_sys_exit_at_import_is_recorded_too(machine: Machine) -> None:
    assert machine.call("import sys; sys.exit(0)\ndef f(): pass").record["type"] == "SystemExit"


def test_a_keyboard_interrupt_is_recorded(each: Machine) -> None:
    done = each.call("def f():\n    raise KeyboardInterrupt('now')")
    assert (done.code, done.record["type"], done.record["message"]) == (130, "KeyboardInterrupt", "now")


def test_a_process_that_exits_by_itself_leaves_no_result(each: Machine) -> None:
    done = each.call("import os\ndef f():\n    os._exit(7)")
    assert (done.code, done.result) == (7, None)


def test_a_crash_in_native_code_shows_the_python_line_in_the_log(each: Machine) -> None:
    done = each.call("import ctypes\ndef f():\n    ctypes.string_at(0)")
    assert (done.code, done.result) == (-signal.SIGSEGV, None)
    assert "Segmentation fault" in done.err
    assert "train.py" in done.err


def test_the_child_of_a_forking_function_writes_no_result(each: Machine) -> None:
    code = """
import os
def f():
    pid = os.fork()
    if pid == 0:
        return 'child'
    os.waitpid(pid, 0)
    return 'parent'
"""
    assert each.call(code).value == "parent"


# ------------------------------------------------------------ exceptions


def test_an_exception_is_shown_with_the_users_lines_and_without_ours(each: Machine) -> None:
    done = each.call("""
def inner(x):
    return 1 / x  # the line
def f():
    try:
        inner(0)
    except ZeroDivisionError as error:
        raise ValueError('two\\nlines') from error
""")
    record = done.record
    assert done.code == 1
    assert (record["type"], record["module"], record["qualname"]) == ("ValueError", "builtins", "ValueError")
    assert (record["message"], record["args"]) == ("two\nlines", ["two\nlines"])
    assert record["cause"]["type"] == "ZeroDivisionError"
    assert record["context"] is None
    trace = record["traceback"]
    assert "return 1 / x  # the line" in trace
    assert "raise ValueError('two\\nlines') from error" in trace
    assert "direct cause" in trace
    assert trace.endswith("ValueError: two\nlines\n")
    assert "flow_runner" not in trace
    assert trace in done.err
    files = [line for line in trace.splitlines() if line.startswith("  File")]
    assert all(str(each.work / "train.py") in line for line in files)


def test_a_context_and_a_suppressed_one_are_told_apart(each: Machine) -> None:
    code = "def f(none):\n    try:\n        {}['k']\n    except KeyError:\n        raise OSError(5, 'gone') from %s"
    record = each.call(code % "None", args=[1]).record
    assert (record["context"], record["cause"], record["args"]) == (None, None, [5, "gone"])
    record = each.call((code % "None").replace(" from None", ""), args=[1]).record
    assert (record["context"]["type"], record["context"]["message"]) == ("KeyError", "'k'")


def test_notes_travel(each: Machine) -> None:
    code = "def f():\n    e = ValueError('x'); e.__notes__ = ['first', 'second', 3]\n    raise e"
    assert each.call(code).record["notes"] == ["first", "second"]


def test_an_exception_group_brings_its_members(each: Machine) -> None:
    done = each.call("def f():\n    raise ExceptionGroup('two', [ValueError('a'), KeyError('b')])")
    if done.record["type"] == "NameError":
        pytest.skip("no groups before Python 3.11")
    assert [member["type"] for member in done.record["exceptions"]] == ["ValueError", "KeyError"]
    assert "ValueError: a" in done.record["traceback"]


def test_exceptions_that_resist_are_recorded_anyway(each: Machine) -> None:
    done = each.call("""
import threading
class Bad(Exception):
    def __init__(self): super().__init__(threading.Lock()); self.lock = threading.Lock()
    def __str__(self): raise SystemExit(0)
    __repr__ = __str__
def f():
    raise Bad()
""")
    record = done.record
    assert (done.code, record["type"], record["module"], record["args"]) == (1, "Bad", "train", None)
    assert record["message"] == "<Bad whose __str__ raised SystemExit>"


def test_a_recursion_error_has_a_short_record(each: Machine) -> None:
    done = each.call("def g(n):\n    return g(n + 1)\ndef f():\n    return g(0)")
    assert done.record["type"] == "RecursionError"
    assert len(done.result or b"") < 20_000


def test_an_endless_chain_and_an_endless_message_have_an_end(machine: Machine) -> None:
    done = machine.call("""
def f():
    a, b = ValueError('x' * 10_000_000), KeyError('b')
    a.__cause__, b.__cause__ = b, a
    raise a
""")
    assert done.record["cause"]["cause"] is None
    assert "characters left out" in done.record["message"]
    assert len(done.result or b"") < 1_000_000


def test_a_syntax_error_shows_the_line(each: Machine) -> None:
    record = each.call("def f():\n    return 1 +\n").record
    assert record["type"] == "SyntaxError"
    assert "train.py" in record["traceback"]
    assert "return 1 +" in record["traceback"]
    assert "flow_runner" not in record["traceback"]


def test_an_exception_while_importing_shows_the_users_lines_only(each: Machine) -> None:
    record = each.call("import nothing_of_this_name\ndef f(): pass").record
    assert (record["type"], record["message"]) == (
        "ModuleNotFoundError",
        "No module named 'nothing_of_this_name'",
    )
    assert "import nothing_of_this_name" in record["traceback"]
    assert "importlib" not in record["traceback"]


def test_the_caller_gets_the_users_exception(each: Machine) -> None:
    done = each.call("def f():\n    raise ValueError('Something went wrong')")
    with pytest.raises(
        ValueError, match="Remote execution failed: ValueError: Something went wrong"
    ) as caught:
        _ = done.value
    assert isinstance(caught.value, RemoteExecutionError)
    assert "line 2, in f" in caught.value.remote_traceback
