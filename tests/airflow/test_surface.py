"""What a DAG author can write, in a real Airflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.harness import Airflow, Run, TaskRun, until


@pytest.fixture(scope="module")
def run(airflow: Airflow) -> Run:
    return airflow.trigger("surface")


@pytest.mark.parametrize(
    ("task_id", "value"),
    [
        ("deep_arguments", [{"a": [0.5, {"b": [[1, 2], "2"]}]}]),
        ("deep_command", "deep|0.5|"),
        ("deep_environment", "2"),
        ("not_a_file", "train.sh"),
    ],
)
def test_arguments_come_at_any_depth(run: Run, task_id: str, value: Any) -> None:
    task = run.task(task_id)
    assert task.ended() == "success", task.log()
    assert task.xcom() == value


@pytest.mark.parametrize("task_id", ["pickled", "pickled_deferred"])
def test_a_value_may_be_what_json_does_not_carry(run: Run, task_id: str) -> None:
    task = run.task(task_id)
    assert task.ended() == "success", task.log()
    assert "b" in str(task.xcom())


def test_a_mapping_can_become_several_xcoms(run: Run) -> None:
    task = run.task("several")
    assert task.ended() == "success", task.log()
    assert (task.xcom("loss"), task.xcom("epochs")) == (0.5, 3)


# -- connections


SECRET = "sesame-do-not-tell"


@pytest.fixture(scope="module")
def connected(airflow: Airflow, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of tasks that work through a connection, which was made as the form makes it."""
    extra = {
        "provider": "local",
        "home": str(airflow.flow_home / "elsewhere"),
        "gpus": 2,
        "task_url": "https://dashboards.example.org/gpus?task={task_id}",
    }
    body = {
        "connection_id": "surface",
        "conn_type": "flow",
        "password": SECRET,
        "extra": json.dumps(extra),
    }
    airflow.api("POST", "/connections", body)
    return airflow.trigger("connected")


@pytest.mark.every_airflow
@pytest.mark.parametrize("task_id", ["sync", "deferred"])
def test_a_task_works_where_its_connection_says(connected: Run, task_id: str) -> None:
    task = connected.task(task_id)
    assert task.ended() == "success", task.log()
    assert Path(task.xcom()).is_relative_to(connected.airflow.flow_home / "elsewhere")


def test_the_secrets_of_a_connection_show_nowhere(connected: Run) -> None:
    connected.ended()
    for task_id in ("sync", "deferred"):
        task = connected.task(task_id)
        entries = connected.airflow.api("GET", f"{task.path}/xcomEntries")
        assert SECRET not in task.log() + json.dumps([task.info, entries])


def test_a_connection_that_there_is_not_fails_the_task_with_its_name(connected: Run) -> None:
    task = connected.task("unknown")
    assert task.ended() == "failed"
    assert "`nowhere` isn't defined" in task.log()


@pytest.mark.parametrize(
    ("fields", "worked", "said"),
    [
        ({"extra": '{"provider": "local", "gpus": 2}'}, True, "local: it answers, and has"),
        ({"extra": '{"provider": "local", "gpu": 2}'}, False, "Did you mean 'gpus'?"),
        ({"host": "127.0.0.1", "port": 1, "extra": '{"provider": "ssh"}'}, False, "cannot be reached"),
    ],
)
def test_the_test_button_says_in_one_line_what_it_found(
    airflow: Airflow, fields: dict[str, Any], worked: bool, said: str
) -> None:
    body = {"connection_id": "tried", "conn_type": "flow", **fields}
    answer = airflow.api("POST", "/connections/test", body)
    assert answer["status"] is worked and said in answer["message"], answer
    assert "\n" not in answer["message"]


def test_the_form_of_a_connection_has_its_fields(airflow: Airflow) -> None:
    (form,) = [
        one for one in airflow.request("GET", "/ui/connections/hook_meta") if one["connection_type"] == "flow"
    ]
    assert form["hook_name"] == "Flow"
    assert {"provider", "identity_file", "partition"} <= set(form["extra_fields"])
    assert form["standard_fields"]["url_schema"]["hidden"]


# -- the link


def links(task: TaskRun) -> dict[str, str]:
    found: dict[str, str] = task.run.airflow.api("GET", f"{task.path}/links")["extra_links"]
    return found


@pytest.mark.parametrize("task_id", ["sync", "deferred"])
def test_the_link_leads_to_the_page_of_the_task(connected: Run, task_id: str) -> None:
    task = connected.task(task_id)
    task.ended()
    page = f"https://dashboards.example.org/gpus?task={task.xcom('flow_task_id')}"
    assert links(task) == {"Flow task": page}


def test_the_link_is_there_while_the_task_runs(airflow: Airflow, connected: Run) -> None:
    connected.ended()
    task = airflow.trigger("connected", seconds=30).task("long")
    page = until("the link is there", lambda: links(task)["Flow task"])
    assert task.state() in ("running", "deferred")
    task.mark("failed")
    assert task.xcom("flow_task_id") in page


def test_there_is_no_link_where_there_is_no_page(run: Run) -> None:
    task = run.task("deep_command")
    task.ended()
    assert links(task) in ({"Flow task": None}, {"Flow task": ""})
