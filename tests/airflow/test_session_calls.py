"""Calls of FlowGPUOperator in a session, as Airflow's worker makes them, against the local provider."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from flow_airflow import FlowGPUOperator
from flow_airflow.compat import AirflowFailException
from flow_airflow.decorators import FlowGPUDecoratedOperator
from flow_core import Flow, Session
from flow_core.errors import RemoteExecutionError
from tests.airflow.one_worker import node, worker

MODULE = """
import math
made = []

def count(step: int = 1):
    print("counting")
    assert count.__annotations__["step"] is int
    made.append(step)
    return {"calls": len(made), "sum": math.fsum(made)}

def fails():
    raise LookupError("no such row")

def nan():
    return math.nan
"""


@pytest.fixture
def session(home: Path) -> Iterator[str]:
    started = Session.start(flow=Flow("local"), workers=1, idle_limit=120)
    yield started.task_id
    started.cancel()
    started.wait(30)


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "steps.py"
    path.write_text(MODULE)
    return path


def called(session: str | None, module: Any, function: str, **arguments: Any) -> Any:
    value, _ = worker(node(module=str(module), function=function, session=session, **arguments))
    return value


def test_calls_of_a_file_find_what_earlier_ones_have_loaded_until_it_changes(
    session: str, module: Path
) -> None:
    assert called(session, module, "count") == {"calls": 1, "sum": 1}
    assert called(session, module, "count", op_kwargs={"step": 2}) == {"calls": 2, "sum": 3}
    module.write_text(MODULE + "\n")
    assert called(session, module, "count", op_args=[5]) == {"calls": 1, "sum": 5}


def test_a_dotted_name_is_a_module_that_is_installed_there(session: str) -> None:
    assert called(session, "os.path", "join", op_args=["a", "b"]) == "a/b"


def test_the_functions_own_exception_shows_its_lines(session: str, module: Path) -> None:
    with pytest.raises(LookupError, match="no such row") as caught:
        called(session, module, "fails")
    assert isinstance(caught.value, RemoteExecutionError)
    assert 'raise LookupError("no such row")' in str(caught.value)


def test_a_function_that_there_is_not_is_told_with_those_that_there_are(session: str, module: Path) -> None:
    with pytest.raises(AttributeError, match=r"no function 'cuont'. Its functions: count, fails, nan"):
        called(session, module, "cuont")


def test_a_value_that_no_xcom_takes_is_refused_or_replaced(session: str, module: Path) -> None:
    with pytest.raises(AirflowFailException, match="cannot be an XCom"):
        called(session, module, "nan", serialization="pickle")
    assert called(session, module, "nan", serialization="pickle", nan_as_none=True) is None


def test_a_file_that_is_not_there_and_a_session_that_never_was_are_told(session: str, tmp_path: Path) -> None:
    with pytest.raises(AirflowFailException, match="gone.py' cannot be read"):
        called(session, tmp_path / "gone.py", "count")
    operator = node(module="os.path", function="join", session="{{ start }}")
    operator.session = None  # what the template of a skipped task's XCom is rendered to
    with pytest.raises(AirflowFailException, match="session=None names no session"):
        worker(operator)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"command": "true"}, "takes calls of module and function, without command"),
        ({"module": "a.py", "function": "f", "code_root": "src"}, "without code_root"),
        ({"module": "a.py", "function": "f", "gpu": "a100"}, "gpu is the session's to say"),
        ({"module": "a.py", "function": "f", "deferrable": True}, "is not deferred: nobody but the process"),
    ],
)
def test_what_does_not_go_with_a_session_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"FlowGPUOperator 'fit'.*{problem}"):
        node(session="{{ start }}", **given)


def test_a_decorated_function_refuses_the_same() -> None:
    with (
        DAG("any"),
        pytest.raises(ValueError, match="@task.flow_gpu 'f': a call in a session is not deferred"),
    ):
        FlowGPUDecoratedOperator(python_callable=lambda: None, task_id="f", session="s", deferrable=True)


def test_without_a_session_it_is_a_task_of_its_own() -> None:
    assert isinstance(node(module="a.py", function="f", deferrable=True), FlowGPUOperator)
