"""Functions run by `call.py` in real processes, on every Python that is here: values, prints, disks."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flow_core import payload
from flow_core.errors import ResultError, TaskExecutionError
from flow_core.runner.strict_json import JSON_LIMIT_BYTES

if TYPE_CHECKING:
    from tests.core.conftest import Machine

NASTY = ["", "'; rm -rf /; '", '"\\"', "a\nb\r\n", "\0", "\ud800", "😀 é", "$(date) `id` %s {0}", "\u2028"]


# ------------------------------------------------------------ values


def test_a_value_comes_back(each: Machine) -> None:
    done = each.call(
        "def f(a, *, b=1):\n    return {'a': a, 'b': b}", args=[[1, None, True]], kwargs={"b": 2.5}
    )
    assert (done.code, done.value) == (0, {"a": [1, None, True], "b": 2.5})


def test_nasty_strings_and_huge_ints_arrive_unchanged_in_every_place(each: Machine) -> None:
    values = [*NASTY, 10**4000, -(2**63), 5e-324, 1.7976931348623157e308, -0.0]
    keyed = dict.fromkeys(NASTY, values)
    done = each.call("def f(x, **k):\n    return [x, k]", args=[values], kwargs=keyed)
    assert done.value == [values, keyed]


def test_tuples_arrive_as_lists_both_ways(machine: Machine) -> None:
    done = machine.call("def f(x):\n    assert x == [1, [2]], x\n    return (3, (4,))", args=[(1, (2,))])
    assert done.value == [3, [4]]


@pytest.mark.parametrize("flags", [(), ("-I",), ("-E",), ("-S",), ("-B",), ("-O",)], ids="".join)
def test_the_interpreters_flags_do_not_matter(each: Machine, flags: tuple[str, ...]) -> None:
    each.call("import helper\ndef f():\n    return helper.X")
    each.put("helper.py", "X = 7")
    assert each.start(*flags).value == 7


def test_no_function_of_ours_and_no_orchestrator_is_in_the_process(each: Machine) -> None:
    code = "import sys, os\ndef f():\n    return [sorted(sys.modules), sys.path, os.getcwd(), sys.argv]"
    modules, path, cwd, argv = each.call(code).value
    assert not [name for name in modules if name.startswith("flow_core")]
    assert "json" not in modules or "re" in modules
    assert path[0] == str(each.work)
    assert str(each.runner) not in path
    assert str(each.runner.parent) not in path
    assert (cwd, argv) == (str(each.work), ["train.py"])


def test_a_numpy_like_float_travels(machine: Machine) -> None:
    done = machine.call("class Double(float):\n    pass\ndef f():\n    return [Double(0.5), Double(2)]")
    assert done.value == [0.5, 2.0]


# ------------------------------------------------------------ prints


def test_prints_from_everywhere_cannot_break_the_result(each: Machine) -> None:
    done = each.call("""
import atexit, sys, threading
print('at import')
@atexit.register
def last(): print('{"v": 1, "ok": false}'); sys.stderr.write('late error: not one\\n')
def talk(): print('in a thread')
def f():
    thread = threading.Thread(target=talk); thread.start(); thread.join()
    sys.stdout.write('no newline'); sys.stderr.write('to stderr'); print('\\ud800 \\x00 😀')
    return 'value'
""")
    assert (done.code, done.value) == (0, "value")
    for text in ("at import", "in a thread", "no newline", "\\ud800 \0 😀", '{"v": 1, "ok": false}'):
        assert text in done.out
    assert "to stderr" in done.err


def test_a_function_may_close_its_output(machine: Machine) -> None:
    done = machine.call(
        "import sys, os\ndef f():\n    sys.stdout.close(); os.close(2); sys.stdout = None\n    return 1"
    )
    assert done.value == 1


def test_prints_can_be_followed_before_the_end(machine: Machine) -> None:
    done = machine.call(
        "import os, signal\ndef f():\n    print('first'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert (done.code, done.out, done.result) == (-signal.SIGKILL, "first\n", None)


# ------------------------------------------------------------ async


def test_async_functions_are_awaited(each: Machine) -> None:
    code = "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x\ndef g(x):\n    return f(x)\n"
    assert each.call(code, "f", [1]).value == 1
    assert each.call(code, "g", [2]).value == 2


def test_an_exception_in_an_async_function_shows_the_users_lines_only(each: Machine) -> None:
    record = each.call("async def f():\n    raise ValueError('x')").record
    assert "raise ValueError('x')" in record["traceback"]
    assert "asyncio" not in record["traceback"]


# ------------------------------------------------------------ values that cannot travel


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("{'m': {1, 2}}", "result['m'] is a set; use sorted(value)"),
        ("[b'x']", "result[0] is a bytes; write it to a file"),
        ("{'a': {1: 2}}", "result['a'] has a key that is no string: 1 (int); use str(key)"),
        ("{None: 2}", "result has a key that is no string: None (NoneType)"),
        ("(i for i in [])", "result is a generator; use list(value)"),
        ("f", "result is a function"),
        ("10 ** 5000", "result is an int of more than 4300 digits"),
        ("loop()", "result[0]['self'] contains itself"),
        ("deep(600)", "is nested more than 400 deep"),
        ("Scalar()", "result is a train.Scalar; use .item()"),
        ("{'a' * 500: object()}", "…"),
        ("Colour.RED", "result is a train.Colour; use .value"),
        ("Point()", "result is a train.Point; use dataclasses.asdict(value)"),
        ("__import__('pathlib').PurePosixPath('x')", "use str(value)"),
    ],
)
def test_what_json_cannot_carry_is_named_with_a_way_out(machine: Machine, value: str, text: str) -> None:
    done = machine.call(f"""
import dataclasses, enum
class Scalar:
    dtype = 'float32'
    def item(self): return 1.0
class Colour(enum.Enum):
    RED = object()
@dataclasses.dataclass
class Point:
    x: int = 1
def loop():
    x = {{}}; x['self'] = x
    return [x]
def deep(n):
    value = []
    for _ in range(n): value = [value]
    return value
def f():
    return {value}
""")
    with pytest.raises(ResultError) as caught:
        payload.decode_result(done.result or b"")
    message = caught.value.message
    assert message.startswith("Cannot serialize the result. Save it to disk and return the path. ")
    assert text in message
    assert len(message) < 400


def test_what_json_cannot_carry_is_kept_as_a_pickle_so_that_the_work_was_not_for_nothing(
    machine: Machine,
) -> None:
    done = machine.call("def f():\n    return {'weights': b'12', 3: {4}}")
    assert done.code == 0
    with pytest.raises(ResultError, match=r"no string: 3 \(int\)") as caught:
        payload.decode_result(done.result or b"")
    assert "kept with its task as a pickle" in str(caught.value)
    assert done.value == {"weights": b"12", 3: {4}}


def test_what_no_pickle_can_hold_either_fails_the_call(machine: Machine) -> None:
    done = machine.call("def f():\n    return [(i for i in [])]")
    assert (done.code, done.record["type"]) == (1, "ResultNotSerializable")
    assert "result[0] is a generator; use list(value)" in done.record["message"]


def test_a_loss_that_has_become_nan_comes_back_as_nan(each: Machine) -> None:
    value = each.call("def f():\n    return {'loss': [1.5, float('nan'), float('inf'), float('-inf')]}").value
    assert [str(one) for one in value["loss"]] == ["1.5", "nan", "inf", "-inf"]


def test_a_generator_is_refused_on_every_python(each: Machine) -> None:
    assert "generator; use list(value)" in each.call("def f():\n    yield 1").record["message"]
    assert "async_generator" in each.call("async def f():\n    yield 1").record["message"]


def test_a_result_of_exactly_the_limit_travels_and_one_byte_more_does_not(each: Machine) -> None:
    code = "def f(n):\n    return 'x' * n"
    assert len(each.call(code, args=[JSON_LIMIT_BYTES - 2]).value) == JSON_LIMIT_BYTES - 2
    done = each.call(code, args=[JSON_LIMIT_BYTES - 1])
    assert (done.code, done.record["type"]) == (1, "ResultTooLarge")
    assert done.record["message"] == (
        "result takes 10,485,761 bytes as JSON; at most 10,485,760 can travel. Save it to disk and return the path, "
        "or call with result='ref'"
    )
    with pytest.raises(ResultError, match="Save it to disk and return the path"):
        _ = done.value


def test_lists_that_share_lists_without_end_are_refused_quickly(machine: Machine) -> None:
    code = "def f():\n    x = [1]\n    for _ in range(60): x = [x, x]\n    return x"
    assert machine.call(code).record["type"] == "ResultTooLarge"


# ------------------------------------------------------------ folders and disks


def test_a_result_is_for_its_owner_only(machine: Machine) -> None:
    machine.call("import os\ndef f():\n    os.umask(0); return 1")
    assert stat.S_IMODE((machine.task / "result").stat().st_mode) == 0o600
    assert sorted(path.name for path in machine.task.iterdir()) == ["call.json", "result", "work"]


def test_a_function_that_removes_its_folder_still_returns(machine: Machine) -> None:
    code = "import os, shutil\ndef f():\n    shutil.rmtree(os.getcwd()); return 1"
    assert machine.call(code).value == 1


@pytest.fixture
def full_disk(tmp_path: Path) -> Path:
    """A mount that is made small; unmounted with the namespace of the process that made it."""
    probe = [
        "unshare",
        "-m",
        "sh",
        "-c",
        f"mkdir -p '{tmp_path}/probe' && mount -t tmpfs none '{tmp_path}/probe'",
    ]
    try:
        done = subprocess.run(probe, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not here")
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.decode().strip()}")
    return tmp_path


@pytest.mark.parametrize(("room", "says"), [(64 * 1024, True), (0, False)])
def test_a_full_disk_is_never_a_success(machine: Machine, full_disk: Path, room: int, says: bool) -> None:
    """The record of the failure is written where a bit of room is left; else the log and the exit code tell."""
    machine.put("train.py", "def f(path, n, room):\n" + _FILL)
    script = f"""
cp -r "$FLOW_TASK_DIR" /tmp/copy.$$ && mount -t tmpfs -o size=4m none "$FLOW_TASK_DIR"
cp -r /tmp/copy.$$/. "$FLOW_TASK_DIR"; rm -r /tmp/copy.$$; cd "$FLOW_TASK_DIR/work"
"{machine.python}" "{machine.runner}/call.py"; echo "code $?"; cat "$FLOW_TASK_DIR/result"
"""
    call = payload.encode_call("train.py", "f", [str(machine.task / "filling"), 1_000_000, room])
    (machine.task / "call.json").write_bytes(call)
    env = {"FLOW_TASK_DIR": str(machine.task), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("code 74\n"), done.stderr
    assert "No space left on device" in done.stderr
    written = done.stdout.partition("\n")[2]
    assert bool(written) is says
    if says:
        error = payload.decode_error(written.encode())
        assert "could not be written" in str(error)
        assert "No space left on device" in str(error)


_FILL = """
    import os
    with open(path, 'wb', buffering=0) as file:
        try:
            while True: file.write(bytes(4096))
        except OSError: pass
        file.truncate(max(file.tell() - room, 0))
    return 'x' * n
"""


def test_of_many_nodes_the_value_is_the_firsts(machine: Machine) -> None:
    machine.put("train.py", "import os\ndef f():\n    return os.environ['FLOW_NODE_RANK']")
    done = [
        machine.run("train.py", env={"FLOW_NODE_RANK": rank, "FLOW_NUM_NODES": "3"})
        for rank in ("1", "0", "2")
    ]
    assert [each.code for each in done] == [0, 0, 0]
    assert done[-1].value == "0"


def test_of_many_nodes_the_first_failure_counts(machine: Machine) -> None:
    machine.put("train.py", """
import os
def f():
    if os.environ['FLOW_NODE_RANK'] != '0': raise ValueError(os.environ['FLOW_NODE_RANK'])
""")  # fmt: skip
    done = [
        machine.run("train.py", env={"FLOW_NODE_RANK": rank, "FLOW_NUM_NODES": "3"})
        for rank in ("0", "2", "1")
    ]
    assert done[-1].record["message"] == "2"
    assert sorted(path.name for path in machine.task.iterdir()) == ["call.json", "result", "work"]


def test_a_call_of_another_wire_version_is_refused_with_both_numbers(each: Machine) -> None:
    each.put("train.py", "def f(): pass")
    call = payload.encode_call("train.py", "f").replace(b'"v":1', b'"v":2')
    (each.task / "call.json").write_bytes(call)
    done = each.start()
    assert done.code == 1
    with pytest.raises(TaskExecutionError, match="version 2 of the wire format; this runner reads 1"):
        _ = done.value


def test_code_that_is_not_uploaded_is_found_where_the_call_starts(machine: Machine, tmp_path: Path) -> None:
    elsewhere = tmp_path / "image"
    elsewhere.mkdir()
    (elsewhere / "baked.py").write_text("def f(): return 'baked in'")
    assert machine.run("baked.py", cwd=elsewhere).value == "baked in"
