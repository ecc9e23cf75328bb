"""How a call of a session can fail: each way gives a true account of its own, and none harms the next call."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow, FlowApp
from flow_core.errors import (
    CallCancelledError,
    FlowError,
    PythonVersionMismatchError,
    RemoteExecutionError,
    ResultError,
    TaskExecutionError,
    TaskOutOfMemoryError,
    WorkerDiedError,
)
from flow_core.sessions import Session
from tests.core.conftest import interpreter


class Refused(LookupError):
    def __init__(self, key: str, code: int) -> None:
        super().__init__(key)
        self.code = code


class Unpicklable(Exception):
    def __init__(self) -> None:
        import threading

        super().__init__(threading.Lock())
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise SystemExit(0)


@pytest.fixture
def session(shared_session: Session) -> Iterator[Session]:
    yield shared_session
    # Whatever the call has done, both workers take the next ones.
    after = shared_session.function(lambda x: x + 1)
    assert [future.result(30) for future in after.map(range(8))] == list(range(1, 9))


def failure(session: Session, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    error = session.function(**options)(function).remote(*args).exception(60)
    assert isinstance(error, FlowError)
    return error


# ------------------------------------------------------------ the function's own exceptions


def test_the_users_exception_is_caught_as_its_own_class(session: Session) -> None:
    def fails() -> None:
        print("on the way")
        raise Refused("nothing", 3)

    error = failure(session, fails)
    assert isinstance(error, RemoteExecutionError)
    assert isinstance(error, Refused)
    assert str(error).startswith("Remote execution failed: Refused: nothing\n")
    assert (error.exception_type, error.exception_message, error.args) == ("Refused", "nothing", ("nothing",))
    assert 'raise Refused("nothing", 3)' in error.remote_traceback
    assert "test_session_errors.py" in error.remote_traceback
    assert "worker.py" not in error.remote_traceback
    assert "on the way" in error.log_tail
    assert error.task_id == session.task_id
    assert "Last lines of the log:\non the way" in str(error)


def test_a_builtin_exception_keeps_what_makes_it(session: Session) -> None:
    def fails() -> None:
        open("/no/such/file").close()

    error = failure(session, fails)
    assert isinstance(error, FileNotFoundError)
    assert error.errno == 2


def test_the_chain_of_causes_comes_along(session: Session) -> None:
    def fails() -> None:
        try:
            dict[str, int]()["key"]
        except KeyError as error:
            raise ValueError("why") from error

    def fails_in_context() -> None:
        try:
            dict[str, int]()["key"]
        except KeyError:
            raise ValueError("why")  # noqa: B904 - the context is the question

    error = failure(session, fails)
    assert isinstance(error.__cause__, KeyError)
    assert "direct cause" in error.remote_traceback
    error = failure(session, fails_in_context)
    assert error.__cause__ is None
    assert isinstance(error.__context__, KeyError)


def test_notes_come_along(session: Session) -> None:
    def fails() -> None:
        error = ValueError("x")
        error.__notes__ = ["first", "second"]  # type: ignore[attr-defined]
        raise error

    assert failure(session, fails).__notes__ == ["first", "second"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no groups before")
def test_an_exception_group_shows_its_members(session: Session) -> None:
    def fails() -> None:
        raise ExceptionGroup("two", [ValueError("a"), KeyError("b")])  # type: ignore[name-defined,unused-ignore] # noqa: F821

    error = failure(session, fails)
    assert type(error) is RemoteExecutionError
    assert error.exception_type == "ExceptionGroup"
    assert "ValueError: a" in error.remote_traceback
    assert "KeyError: 'b'" in error.remote_traceback


def test_an_exception_that_cannot_be_pickled_or_shown_is_told_anyway(session: Session) -> None:
    def fails() -> None:
        raise Unpicklable

    error = failure(session, fails, serialization="pickle")
    assert error.exception_message == "<Unpicklable whose __str__ raised SystemExit>"
    assert isinstance(error, Unpicklable)


def test_an_exception_of_a_class_that_is_only_there_is_told_by_its_name(session: Session) -> None:
    def fails() -> None:
        class OnlyThere(Exception):
            pass

        raise OnlyThere("from afar")

    error = failure(session, fails, serialization="pickle")
    assert type(error) is RemoteExecutionError
    assert str(error).startswith("Remote execution failed: OnlyThere: from afar")


def test_what_a_generator_raises_comes_after_what_it_has_yielded(session: Session) -> None:
    @session.function
    def numbers() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    values = iter(numbers.remote())
    assert next(values) == 1
    with pytest.raises(ValueError, match="no more"):
        next(values)


def test_a_missing_module_on_the_worker_is_the_functions_own_error(session: Session) -> None:
    def fails() -> None:
        import nothing_of_this_name  # type: ignore[import-not-found] # noqa: F401

    assert isinstance(failure(session, fails), ModuleNotFoundError)


def test_a_value_that_cannot_travel_back_is_named(session: Session) -> None:
    import threading

    error = failure(session, lambda: {"a": [threading.Lock()]}, serialization="pickle")
    assert isinstance(error, ResultError)
    assert "result['a'][0] is a _thread.lock" in str(error)
    error = failure(session, lambda: {"a": {1, 2}})
    assert "result['a'] is a set; use sorted(value)" in str(error)


# ------------------------------------------------------------ ends that are no exception


@pytest.mark.parametrize("code", [0, 3, "out of data"])
def test_sys_exit_is_never_a_value(session: Session, code: Any) -> None:
    error = failure(session, lambda: sys.exit(code))
    assert type(error) is RemoteExecutionError
    assert error.exception_type == "SystemExit"
    assert (code if isinstance(code, str) else f"sys.exit({code}) was called before") in str(error)


def test_a_keyboard_interrupt_of_the_functions_own_is_not_a_cancel(session: Session) -> None:
    def fails() -> None:
        raise KeyboardInterrupt("now")

    error = failure(session, fails)
    assert type(error) is RemoteExecutionError
    assert not isinstance(error, CallCancelledError)
    assert error.exception_type == "KeyboardInterrupt"


def test_os_exit_tells_its_code(session: Session) -> None:
    def fails() -> None:
        print("last words", flush=True)
        os._exit(0)

    error = failure(session, fails)
    assert type(error) is WorkerDiedError
    assert "the worker died while it ran 'fails': it ended with exit code 0" in str(error)
    assert (error.exit_code, error.signal, error.retryable) == (0, None, True)
    assert "last words" in error.log_tail


def test_a_segfault_tells_its_signal_and_where_python_was(session: Session) -> None:
    def crashes() -> None:
        import ctypes

        ctypes.string_at(0)

    error = failure(session, crashes)
    assert type(error) is WorkerDiedError
    assert (error.exit_code, error.signal) == (None, signal.SIGSEGV)
    assert "killed by SIGSEGV" in str(error)
    assert "Segmentation fault" in error.log_tail
    assert "in crashes" in error.log_tail


def test_a_kill_from_outside_is_no_out_of_memory(session: Session) -> None:
    error = failure(session, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert type(error) is WorkerDiedError
    assert "killed by SIGKILL" in str(error)
    assert error.reason == "killed"


def test_a_deep_recursion_and_too_little_memory_for_one_object_are_exceptions(session: Session) -> None:
    def recurse(n: int) -> int:
        return recurse(n + 1)

    def allocate() -> int:
        return len(bytearray(1 << 60))

    assert isinstance(failure(session, recurse, 0), RecursionError)
    assert isinstance(failure(session, allocate), MemoryError)


def memory_group() -> Path | None:
    """A cgroup in which the kernel kills what takes more than 100 MB; None where we may not make one."""
    for parent, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = parent / f"flow-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(100 * 1024 * 1024))
        except OSError:
            continue
        return group
    return None


def test_the_kernels_out_of_memory_killer_is_told_as_that(session: Session) -> None:
    group = memory_group()
    if group is None:
        pytest.skip("no cgroup with a memory limit can be made here")
    procs = str(group / "cgroup.procs")

    @session.function(workers=1)
    def hungry() -> int:
        Path(procs).write_text(str(os.getpid()))
        eaten = [bytearray(b"x" * 1024 * 1024) for _ in range(400)]
        return len(eaten)

    try:
        error = hungry.remote().exception(60)
    finally:
        deadline = time.monotonic() + 10
        while Path(procs).read_text().strip() and time.monotonic() < deadline:
            time.sleep(0.05)
        group.rmdir()
    assert type(error) is TaskOutOfMemoryError
    assert "the kernel killed it because memory ran out" in str(error)
    assert error.signal == signal.SIGKILL


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A home on a disk of 4 MB."""
    home = tmp_path / "small"
    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(home)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield home
    subprocess.run(["umount", "-l", str(home)], check=True)


def test_a_full_disk_is_an_error_of_the_call_that_writes_and_of_no_other(small_disk: Path) -> None:
    with Session(flow=Flow("local", local={"home": small_disk}), workers=1) as session:

        @session.function
        def fill(path: str) -> None:
            with open(path, "wb") as file:
                file.write(b"x" * 8_000_000)

        @session.function
        def talk(times: int) -> str:
            print("y" * times, end="")
            return "value"

        error = fill.remote(str(small_disk / "big")).exception(60)
        assert isinstance(error, OSError)
        assert isinstance(error, RemoteExecutionError)
        assert "No space left on device" in str(error)
        assert talk.remote(0).result(60) == "value"
        error = talk.remote(100_000).exception(60)  # as Python does it: what is printed has no room
        assert isinstance(error, OSError)
        assert talk.remote(0).result(60) == "value"
        (small_disk / "big").unlink()
        assert talk.remote(100_000).result(60) == "value"


# ------------------------------------------------------------ ends of the whole session


def test_a_session_that_cannot_start_says_why(home: Path) -> None:
    with Session(flow=Flow("local", local={"home": home, "python": "/no/such/python"})) as session:
        error = session.function(lambda: 1).remote().exception(60)
    assert isinstance(error, TaskExecutionError)
    assert "/no/such/python" in str(error)


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_a_worker_of_another_python_refuses_before_it_runs_anything(
    home: Path, tmp_path: Path, version: str
) -> None:
    python = interpreter(version)
    if python is None or python == sys.executable:
        pytest.skip(f"no other Python {version} here")
    noted = tmp_path / "noted"
    flow = Flow("local", local={"python": python})
    with Session(flow=flow) as session:
        errors = [session.function(noted.touch).remote().exception(60)]
    errors.append(FlowApp(flow=flow).function(noted.touch).spawn().exception(60))
    here = "{}.{}".format(*sys.version_info)
    for error in errors:
        assert isinstance(error, PythonVersionMismatchError)
        assert f"captured by Python {here}, and this machine runs Python {version}." in str(error)
    assert not noted.exists()


def test_a_session_whose_task_is_cancelled_ends_its_calls_with_that(home: Path) -> None:
    with Session(workers=1) as session:
        sleep = session.function(lambda: time.sleep(60)).remote()
        Flow().cancel([session.task_id])
        error = sleep.exception(60)
        assert isinstance(error, FlowError)
        assert re.search("cancel", str(error))
        assert not isinstance(error, RemoteExecutionError)


def test_a_supervisor_that_is_killed_ends_its_calls_and_leaves_no_worker(home: Path) -> None:
    with Session(workers=1) as session:
        pid = session.function(os.getpid).remote().result(60)
        parent = session.function(os.getppid).remote().result(60)
        sleep = session.function(lambda: time.sleep(60)).remote()
        os.kill(parent, signal.SIGKILL)
        error = sleep.exception(60)
        assert isinstance(error, TaskExecutionError)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}/exe").exists()
