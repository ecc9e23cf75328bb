"""A result that no XCom takes: the try fails at once, and the next one hands it on without running the work again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse

from flow_airflow import load
from flow_airflow.compat import AirflowFailException
from flow_core import ObjectRef
from tests.airflow.one_worker import node, worker

pytestmark = pytest.mark.usefixtures("home")

WORK = """
def note(trail):
    with open(trail, "a") as file:
        print("ran", file=file)

def large(trail):
    note(trail)
    return "x" * (11 * 1024 * 1024)

def binary(trail):
    note(trail)
    return {"weights": b"123"}
"""


@pytest.fixture
def arguments(home: Path) -> dict[str, Any]:
    (home / "work.py").write_text(WORK)
    return {"module": str(home / "work.py"), "op_args": [str(home / "trail")]}


def runs(home: Path) -> int:
    return len((home / "trail").read_text().splitlines())


def test_a_result_too_large_to_come_as_a_value_is_taken_by_reference_by_the_next_try(
    home: Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises(
        AirflowFailException, match="takes 11,534,338 bytes as json; at most 10,485,760"
    ) as caught:
        worker(node(**arguments, function="large", result_as="value"))
    assert "cannot be an XCom" in str(caught.value)
    assert 'result_as="reference"' in str(caught.value)
    ref, _ = worker(node(**arguments, function="large"))
    assert isinstance(ref, ObjectRef)
    assert len(load({"text": [ref]})["text"][0]) == 11 * 1024 * 1024
    assert runs(home) == 1


def test_what_json_cannot_bring_comes_as_a_pickle_or_by_reference_in_the_next_try(
    home: Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises(AirflowFailException, match=r"result\['weights'\] is a bytes") as caught:
        worker(node(**arguments, function="binary"))
    assert 'serialization="pickle"' in str(caught.value)
    value, _ = worker(node(**arguments, function="binary", serialization="pickle", do_xcom_push=False))
    assert value == {"weights": b"123"}
    ref, _ = worker(node(**arguments, function="binary", result_as="reference"))
    assert load(ref, allow_pickle=True) == {"weights": b"123"}
    assert runs(home) == 1


def test_an_airflow_that_does_not_answer_for_a_while_ends_no_work(
    home: Path, arguments: dict[str, Any]
) -> None:
    stored: dict[str, Any] = {}
    answers = iter([AirflowRuntimeError(ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail={})), None])

    def xcom_push(key: str, value: Any) -> None:
        if isinstance(error := next(answers), Exception):
            raise error
        stored[key] = value

    worker(node(**arguments, function="binary", result_as="reference"), xcom_push=xcom_push)
    assert runs(home) == 1
    assert stored["flow_task_id"].startswith("train-fit-")


def test_loading_what_holds_no_reference_needs_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_PROVIDER", "none")
    assert load({"a": (1, [2])}) == {"a": (1, [2])}
