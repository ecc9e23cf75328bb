"""What the user's function raised, rebuilt here: caught as the user's class, without running the user's code."""

from __future__ import annotations

import abc
import dataclasses
import errno
import pickle
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import pytest

from flow_core import errors
from flow_core.errors import RemoteExecutionError, remote_error

RAN: list[str] = []


def record(kind: str, message: str = "Something went wrong", **more: Any) -> dict[str, Any]:
    return {"type": kind, "module": "builtins", "qualname": kind, "message": message, **more}


def mine(cls: type, message: str = "Something went wrong", **more: Any) -> dict[str, Any]:
    return {
        "type": cls.__name__,
        "module": cls.__module__,
        "qualname": cls.__qualname__,
        "message": message,
        **more,
    }


@pytest.fixture(autouse=True)
def no_user_code_runs() -> Iterator[None]:
    RAN.clear()
    yield
    assert RAN == []


class Plain(Exception):
    pass


class Outer:
    class Nested(Plain):
        pass


class OddInit(ValueError):
    def __init__(self, first: int, second: int) -> None:
        RAN.append("init")
        super().__init__(first, second)


class OddNew(ValueError):
    def __new__(cls, *args: Any) -> Any:
        RAN.append("new")
        return super().__new__(cls)


class Slotted(Exception):
    __slots__ = ("message", "weight")


class SlottedOSError(OSError):
    __slots__ = ("errno", "weight")


class OwnRuntimeError(RuntimeError):
    def __init__(self, *, needed: int) -> None:
        RAN.append("init")


class Properties(Exception):
    @property
    def message(self) -> str:
        RAN.append("message")
        return "theirs"

    @property
    def task_id(self) -> str:
        RAN.append("task_id")
        raise KeyError("task_id")

    @property
    def args(self) -> Any:
        RAN.append("args")
        return ()

    @args.setter
    def args(self, value: Any) -> None:
        RAN.append("set args")


class Dunders(Exception):
    def __str__(self) -> str:
        RAN.append("str")
        return "theirs"

    def __repr__(self) -> str:
        RAN.append("repr")
        return "theirs"

    def __setattr__(self, name: str, value: Any) -> None:
        RAN.append(f"set {name}")

    def __getattr__(self, name: str) -> Any:
        RAN.append(f"get {name}")
        return self.__getattr__(name)

    def __getattribute__(self, name: str) -> Any:
        RAN.append(f"get {name}")
        return super().__getattribute__(name)

    def __reduce__(self) -> Any:
        RAN.append("reduce")
        return (str, ())

    def __setstate__(self, state: Any) -> None:
        RAN.append("setstate")

    def __bool__(self) -> bool:
        RAN.append("bool")
        return False

    def __del__(self) -> None:
        RAN.append("del")

    def __eq__(self, other: object) -> bool:
        RAN.append("eq")
        return True

    def __hash__(self) -> int:
        RAN.append("hash")
        return 1


class Registered(Exception):
    known: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        RAN.append("init_subclass")
        cls.known.append(cls)


@dataclasses.dataclass
class Data(Exception):
    code: int


class Abstract(ValueError, abc.ABC):
    @abc.abstractmethod
    def explain(self) -> str: ...


class Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        RAN.append("metaclass")
        return super().__call__(*args, **kwargs)

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if name != "WithMeta":
            RAN.append("metaclass new")
        return super().__new__(mcs, name, bases, namespace)


class WithMeta(Exception, metaclass=Meta):
    pass


class Helpful(Exception):
    def hint(self) -> str:
        return "add coal"


MIXABLE = [
    Plain,
    Outer.Nested,
    OddInit,
    OddNew,
    Slotted,
    SlottedOSError,
    OwnRuntimeError,
    Properties,
    Dunders,
    Registered,
    Data,
    Abstract,
    Helpful,
]
BUILTIN = [
    "ValueError",
    "KeyError",
    "OSError",
    "FileNotFoundError",
    "UnicodeDecodeError",
    "ImportError",
    "ModuleNotFoundError",
    "SyntaxError",
    "RecursionError",
    "NotImplementedError",
    "ZeroDivisionError",
    "AttributeError",
    "NameError",
    "MemoryError",
    "TimeoutError",
    "BlockingIOError",
    "UserWarning",
]


def looks_right(error: RemoteExecutionError, name: str) -> None:
    assert error.message == f"Remote execution failed: {name}: Something went wrong"
    assert str(error).startswith(error.message)
    assert repr(error) == f"RemoteExecutionError({error.message!r})"
    assert (error.task_id, error.exit_code, error.retryable) == ("t-1", 1, False)
    assert error.exception_type == name
    assert error.exception_message == "Something went wrong"
    assert hash(error) == hash(error)
    assert bool(error)
    assert not hasattr(error, "surely_not_there")
    text = "".join(traceback.format_exception(error))
    assert f"RemoteExecutionError: {error.message}" in text


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_exception_is_caught_as_itself_and_as_ours(name: str) -> None:
    error = remote_error(record(name), task_id="t-1", exit_code=1)
    assert isinstance(error, getattr(sys.modules["builtins"], name))
    assert isinstance(error, RuntimeError)
    looks_right(error, name)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    looks_right(again, name)


@pytest.mark.parametrize("cls", MIXABLE, ids=lambda cls: cls.__name__)
def test_a_class_of_the_user_is_caught_as_itself_and_none_of_its_code_runs(cls: type[Exception]) -> None:
    error = remote_error(mine(cls), task_id="t-1", exit_code=1)
    with pytest.raises(cls):
        raise cast("Exception", error)
    assert isinstance(error, RemoteExecutionError)
    looks_right(error, cls.__name__)
    again = pickle.loads(pickle.dumps(error))
    assert issubclass(type(again), cls)
    looks_right(again, cls.__name__)
    assert vars(again) == vars(error)
    del error, again
    assert Registered.known == []


def test_the_methods_of_the_users_class_are_there() -> None:
    error: Any = remote_error(mine(Helpful))
    assert error.hint() == "add coal"


@pytest.mark.parametrize(
    "name",
    [
        "SystemExit",
        "KeyboardInterrupt",
        "GeneratorExit",
        "StopIteration",
        "StopAsyncIteration",
        "ExceptionGroup",
        "BaseExceptionGroup",
        "NoSuchError",
        "int",
        "print",
        "Exception",
        "BaseException",
        "RuntimeError",
    ],
)
def test_what_would_steer_this_process_arrives_as_the_plain_error(name: str) -> None:
    error = remote_error(record(name), task_id="t-1", exit_code=1)
    assert type(error) is RemoteExecutionError
    looks_right(error, name)


def test_an_error_of_ours_raised_remotely_does_not_pass_for_one_of_this_process() -> None:
    error = remote_error(mine(errors.TaskCancelledError))
    assert type(error) is RemoteExecutionError
    assert error.exception_type == "TaskCancelledError"


def test_a_remote_timeout_is_not_the_end_of_ones_own_patience() -> None:
    error = remote_error(record("TimeoutError"))
    assert issubclass(type(error), TimeoutError)
    assert not issubclass(type(error), errors.FlowTimeoutError)


def test_a_class_with_a_metaclass_of_its_own_is_left_alone() -> None:
    assert type(remote_error(mine(WithMeta))) is RemoteExecutionError


def test_a_class_inside_a_function_is_not_found() -> None:
    class Local(Exception):
        pass

    assert type(remote_error(mine(Local))) is RemoteExecutionError


def test_a_class_of_a_module_that_is_not_loaded_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    error = remote_error({"type": "Zen", "module": "this", "qualname": "Zen", "message": "m"})
    assert type(error) is RemoteExecutionError
    assert "this" not in sys.modules


def test_lazy_modules_and_stand_ins_for_modules_are_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            RAN.append(f"module get {name}")
            return super().__getattribute__(name)

    class StandIn:
        def __getattr__(self, name: str) -> Any:
            RAN.append(f"stand-in get {name}")
            return Plain

    lazy: Any = Lazy("lazy_one")
    monkeypatch.setitem(sys.modules, "lazy_one", lazy)
    monkeypatch.setitem(sys.modules, "stand_in", StandIn())
    for module in ("lazy_one", "stand_in"):
        error = remote_error({"type": "Plain", "module": module, "qualname": "Plain", "message": "m"})
        assert type(error) is RemoteExecutionError
    sys.modules.pop("lazy_one")


def test_without_the_class_a_pickled_error_still_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("passing_module")
    module.Passing = type("Passing", (Exception,), {"__module__": "passing_module"})
    monkeypatch.setitem(sys.modules, "passing_module", module)
    error = remote_error(mine(module.Passing), task_id="t-1", exit_code=1)
    assert isinstance(error, module.Passing)
    sent = pickle.dumps(error)
    monkeypatch.delitem(sys.modules, "passing_module")
    again = pickle.loads(sent)
    assert type(again) is RemoteExecutionError
    looks_right(again, "Passing")


def test_the_arguments_of_the_exception_arrive_with_it() -> None:
    assert remote_error(record("KeyError", args=["colour"])).args == ("colour",)
    missing: Any = remote_error(record("FileNotFoundError", args=[2, "No such file or directory"]))
    assert (missing.errno, missing.strerror) == (errno.ENOENT, "No such file or directory")
    again: Any = pickle.loads(pickle.dumps(missing))
    assert again.args == (2, "No such file or directory")


def test_an_error_without_a_message_ends_after_its_type() -> None:
    assert str(remote_error(record("ValueError", ""))) == "Remote execution failed: ValueError"


@pytest.mark.parametrize(
    "thin", [{}, {"type": None}, {"module": 3, "qualname": ["x"], "notes": None, "cause": "x"}]
)
def test_a_record_with_holes_still_makes_an_error(thin: dict[str, Any]) -> None:
    assert str(remote_error(thin)) == "Remote execution failed: Exception"


def test_the_text_shows_the_remote_traceback_once_then_the_log() -> None:
    trace = 'Traceback (most recent call last):\n  File "train.py", line 3, in fit\nValueError: bad'
    error = remote_error(record("ValueError", "bad", traceback=trace), log_tail=f"epoch 1\n{trace}\n")
    assert str(error) == (
        f"Remote execution failed: ValueError: bad\n\nRemote traceback:\n{trace}\n\nLast lines of the log:\nepoch 1"
    )


def test_the_chain_and_the_notes_of_the_exception_are_rebuilt() -> None:
    cause = record("KeyError", "'x'", traceback="the cause's own")
    error = remote_error(record("ValueError", "bad", cause=cause, notes=["while fitting"]))
    assert isinstance(error.__cause__, KeyError)
    assert str(error.__cause__) == "Remote execution failed: KeyError: 'x'"
    assert error.__notes__ == ["while fitting"]
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again.__cause__, KeyError)
    assert again.__notes__ == ["while fitting"]
    context = remote_error(record("ValueError", context=record("OSError"))).__context__
    assert isinstance(context, OSError)


def test_the_exit_code_of_the_record_is_used_unless_the_task_knows_better() -> None:
    assert remote_error(record("SystemExit", "3", exit_code=3)).exit_code == 3
    assert remote_error(record("SystemExit", "3", exit_code=3), exit_code=4).exit_code == 4
