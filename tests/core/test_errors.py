"""The error tree: what is caught by what, what a user reads, and what survives a trip between processes."""

from __future__ import annotations

import builtins
import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest

from flow_core import errors
from flow_core.errors import FlowError

ALL = sorted(
    {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, FlowError)},
    key=lambda cls: cls.__name__,
)


@pytest.mark.parametrize(
    ("child", "parents"),
    [
        ("AuthenticationError", "FlowError"),
        ("ConfigError", "FlowError"),
        ("ResourceNotFoundError", "FlowError"),
        ("TaskNotFoundError", "ResourceNotFoundError"),
        ("VolumeNotFoundError", "ResourceNotFoundError"),
        ("ValidationError", "FlowError ValueError"),
        ("SpecRejected", "ValidationError"),
        ("SerializationError", "FlowError TypeError"),
        ("SessionClosedError", "FlowError RuntimeError"),
        ("APIError", "FlowError"),
        ("ValidationAPIError", "APIError"),
        ("NetworkError", "FlowError"),
        ("TimeoutError", "FlowError"),
        ("ProviderError", "FlowError"),
        ("ProviderUnavailable", "ProviderError"),
        ("ResourceNotAvailableError", "FlowError"),
        ("QuotaExceededError", "FlowError"),
        ("VolumeError", "FlowError"),
        ("TaskExecutionError", "FlowError"),
        ("TaskCancelledError", "TaskExecutionError"),
        ("CallCancelledError", "TaskCancelledError"),
        ("TaskTimeLimitError", "TaskExecutionError"),
        ("CallTimeoutError", "TaskTimeLimitError"),
        ("TaskOutOfMemoryError", "TaskExecutionError"),
        ("WorkerDiedError", "TaskExecutionError"),
        ("PythonVersionMismatchError", "TaskExecutionError"),
        ("ResultError", "TaskExecutionError"),
        ("RemoteExecutionError", "TaskExecutionError RuntimeError"),
    ],
)
def test_every_error_stands_where_the_documented_tree_has_it(child: str, parents: str) -> None:
    for parent in parents.split():
        expected = getattr(errors, parent, None) or getattr(builtins, parent)
        assert issubclass(getattr(errors, child), expected)


def test_both_documented_names_of_one_error_catch_it() -> None:
    assert errors.InsufficientQuotaError is errors.QuotaExceededError
    assert errors.FlowTimeoutError is errors.TimeoutError
    assert errors.SandboxExecutionError is errors.RemoteExecutionError
    assert errors.FunctionSerializationError is errors.AsyncFunctionError is errors.SerializationError
    assert not issubclass(
        errors.CallTimeoutError, builtins.TimeoutError
    )  # it is not one's own patience that ended
    with pytest.raises(builtins.TimeoutError):
        raise errors.TimeoutError("not within 3 s")


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_survives_pickling_and_copying_with_all_its_fields(cls: type[FlowError]) -> None:
    error = cls("no", suggestions=["try this", "or that"], error_code="e-42", retryable=True)
    for name in set(vars(error)) - set(vars(FlowError(""))) - {"_record", "_brief"}:
        vars(error)[name] = f"value of {name}"
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is cls
        assert vars(again) == vars(error)
        assert str(again) == str(error)
        assert again.args == error.args


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_has_a_code_of_its_own(cls: type[FlowError]) -> None:
    error = cls("no")
    assert error.message == "no"
    assert error.suggestions == []
    assert [other for other in ALL if other("").error_code == error.error_code] == [cls]


def test_exactly_what_another_attempt_can_help_is_retryable() -> None:
    retryable = {cls.__name__ for cls in ALL if cls("").retryable}
    assert retryable == {
        "NetworkError",
        "ProviderUnavailable",
        "ResourceNotAvailableError",
        "TimeoutError",
        "WorkerDiedError",
    }
    assert not errors.NetworkError("no", retryable=False).retryable


def test_the_text_is_the_message_and_one_line_per_suggestion() -> None:
    error = errors.ValidationError("ports[0] is 0.", suggestions=["Write 8888.", "Leave it out."])
    assert str(error) == "ports[0] is 0.\n  - Write 8888.\n  - Leave it out."
    assert repr(error) == "ValidationError('ports[0] is 0.')"


def test_one_suggestion_may_be_given_as_plain_text() -> None:
    assert FlowError("no", suggestions="Try again.").suggestions == ["Try again."]


def test_a_task_error_shows_how_it_ended_and_the_end_of_its_log() -> None:
    error = errors.TaskExecutionError(
        "Task t-1 failed with exit code 3.",
        task_id="t-1",
        exit_code=3,
        reason="exit",
        log_tail="step 1\nno space left\n",
        suggestions=["Read it all with task.logs()."],
    )
    assert (error.task_id, error.exit_code, error.signal, error.reason) == ("t-1", 3, None, "exit")
    assert str(error) == (
        "Task t-1 failed with exit code 3.\n  - Read it all with task.logs().\n\n"
        "Last lines of the log:\nstep 1\nno space left"
    )


def test_a_task_error_without_a_log_says_nothing_about_logs() -> None:
    assert str(errors.WorkerDiedError("gone", log_tail="\n \n")) == "gone"


def test_an_api_error_carries_its_http_status() -> None:
    assert errors.ValidationAPIError("no", status_code=422).status_code == 422
    assert errors.APIError("no").status_code is None


def test_an_unknown_keyword_is_refused() -> None:
    unchecked: Any = errors.TaskExecutionError
    with pytest.raises(TypeError, match="log_tial"):
        unchecked("no", log_tial="x")


def test_close_names_finds_typing_mistakes_and_nothing_else() -> None:
    names = ["instance_type", "min_gpu_memory_gb", "image"]
    assert errors.close_names("instnce_type", names) == ["instance_type"]
    assert errors.close_names("IMAGE", names) == ["image"]
    assert errors.close_names("colour", names) == []


def test_errors_and_gpu_names_cost_no_heavy_import() -> None:
    probe = "import sys, flow_core.errors, flow_core.gpus; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint(
        {"pydantic", "pydantic_core", "typing_extensions", "yaml", "requests", "cloudpickle"}
    )
