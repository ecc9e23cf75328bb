"""Which errors a retry policy may answer, and what a failed step says. Pure."""

from __future__ import annotations

import pytest

from flow_core.errors import (
    FlowError,
    NetworkError,
    ProviderUnavailable,
    QuotaExceededError,
    RemoteExecutionError,
    ResultError,
    SerializationError,
    SpecRejected,
    TaskCancelledError,
    TaskExecutionError,
    TaskOutOfMemoryError,
    ValidationError,
    WorkerDiedError,
)
from flow_dagster.failures import as_failure, as_map_failure, can_succeed


@pytest.mark.parametrize(
    "error",
    [
        ValidationError("'nvidia-a100' is not a GPU"),
        SpecRejected("8 GPUs of 2"),
        SerializationError("Cannot serialize arguments. Save to disk and pass path."),
        ResultError("the result is a set"),
        TaskCancelledError("somebody cancelled it"),
        RemoteExecutionError("no torch", exception_type="ModuleNotFoundError"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_can_never_succeed_asks_for_no_retry(error: FlowError) -> None:
    assert not can_succeed(error)
    assert as_failure(error, {}).allow_retries is False


@pytest.mark.parametrize(
    "error",
    [
        NetworkError("cut"),
        ProviderUnavailable("down"),
        QuotaExceededError("8 of 8"),
        TaskExecutionError("exit code 1"),
        TaskOutOfMemoryError("killed"),
        WorkerDiedError("the machine is gone"),
        RemoteExecutionError("ValueError: loss is NaN", exception_type="ValueError"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_succeed_is_left_to_the_retry_policy(error: FlowError) -> None:
    assert can_succeed(error)
    assert as_failure(error, {}).allow_retries is True


def test_a_failure_says_everything_and_keeps_the_metadata() -> None:
    error = RemoteExecutionError(
        "Remote execution failed: ValueError: bad",
        exception_type="ValueError",
        remote_traceback='Traceback (most recent call last):\n  File "train.py", line 3\nValueError: bad',
        log_tail="epoch 1\n",
    )
    failure = as_failure(error, {"flow/task_id": "train-1"})
    assert failure.description is not None
    assert failure.description.startswith("Remote execution failed: ValueError: bad")
    assert 'File "train.py", line 3' in failure.description
    assert "epoch 1" in failure.description
    assert failure.metadata["flow/task_id"].value == "train-1"
    assert failure.metadata["flow/error_code"].value == "remote-execution"


def test_a_map_names_every_item_that_failed_and_shows_the_first_in_full() -> None:
    errors: dict[int, FlowError] = {
        4: TaskExecutionError("four\nmore"),
        1: ValidationError("one", suggestions=["do it"]),
    }
    failure = as_map_failure(errors, 9, {})
    assert failure.description == (
        "2 of 9 items failed:\n"
        "  [1] ValidationError: one\n"
        "  [4] TaskExecutionError: four\n"
        "\n"
        "The first, item 1, in full:\n"
        "one\n  - do it"
    )
    assert failure.allow_retries is True


def test_a_map_whose_items_can_never_succeed_asks_for_no_retry() -> None:
    assert as_map_failure({0: ValidationError("no")}, 1, {}).allow_retries is False


def test_a_map_with_very_many_failures_stays_readable() -> None:
    failure = as_map_failure({item: TaskExecutionError("no") for item in range(500)}, 500, {})
    assert failure.description is not None
    assert "… and 480 more" in failure.description
    assert len(failure.description.splitlines()) < 30
