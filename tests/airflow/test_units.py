"""The parts that need no Airflow processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from flow_airflow import FlowGPUOperator, FlowTaskTrigger
from flow_airflow.compat import AirflowFailException
from flow_airflow.failures import to_airflow
from flow_airflow.links import FlowTaskLink
from flow_airflow.logs import LONGEST_LINE, TaskLog
from flow_airflow.nodes import Node, will_retry
from flow_core.errors import (
    AuthenticationError,
    FlowError,
    ProviderUnavailable,
    RemoteExecutionError,
    SpecRejected,
    ValidationError,
    WorkerDiedError,
)
from flow_core.models import LogChunk, TaskConfig

STARTED = datetime(2025, 1, 1, 12, tzinfo=timezone.utc)


def context(**changes: Any) -> dict[str, Any]:
    """The part of Airflow's context that a node is read from, at the first try of a task with two retries."""
    values = {
        "try_number": 1,
        "max_tries": 2,
        "retries": 2,
        "map_index": -1,
        "run_started": STARTED,
    } | changes
    ti = SimpleNamespace(
        dag_id="train",
        run_id="manual__2025",
        task_id="fit",
        map_index=values["map_index"],
        try_number=values["try_number"],
        max_tries=values["max_tries"],
    )
    return {
        "ti": ti,
        "task": SimpleNamespace(retries=values["retries"]),
        "dag_run": SimpleNamespace(start_date=values["run_started"]),
    }


# -- who a node is


def test_a_retry_has_the_key_of_the_first_try() -> None:
    first, second = (Node.from_context(context(try_number=number)) for number in (1, 2))
    assert first.key == second.key


def test_a_clear_changes_the_key_and_a_retry_after_it_does_not() -> None:
    # Cleared after try 1: Airflow sets max_tries = 1 + 2.
    before = Node.from_context(context())
    after = Node.from_context(context(try_number=2, max_tries=3))
    retried = Node.from_context(context(try_number=3, max_tries=3))
    assert before.key != after.key == retried.key
    assert (before.epoch, after.epoch) == (1, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"map_index": 0},
        {"map_index": 1},
        {"run_started": STARTED + timedelta(seconds=1)},
        {"run_started": None},
    ],
)
def test_another_index_or_another_run_under_the_same_id_is_another_node(changes: dict[str, Any]) -> None:
    assert Node.from_context(context()).key != Node.from_context(context(**changes)).key


def test_the_key_does_not_depend_on_the_time_zone() -> None:
    elsewhere = STARTED.astimezone(timezone(timedelta(hours=9)))
    assert Node.from_context(context()).key == Node.from_context(context(run_started=elsewhere)).key


@pytest.mark.parametrize("dag_id", ["train", "ML.train / été", "…", "x" * 300])
def test_the_name_of_a_node_is_a_valid_task_name(dag_id: str) -> None:
    node = replace(Node.from_context(context(map_index=12)), dag_id=dag_id)
    assert TaskConfig(name=node.name, instance_type="a100", command="true").name.endswith("-12")


@pytest.mark.parametrize(
    ("try_number", "max_tries", "expected"), [(1, 0, False), (1, 1, True), (2, 1, False)]
)
def test_whether_a_retry_comes(try_number: int, max_tries: int, expected: bool) -> None:
    assert will_retry(context(try_number=try_number, max_tries=max_tries)) is expected


# -- output


class Output:
    """A task's output that has been written so far, served in pieces of `piece` bytes."""

    def __init__(self, *nodes: bytes, piece: int = 65536) -> None:
        self.nodes = list(nodes)
        self.piece = piece
        self.ended = False

    def read_log(self, offset: int = 0, limit: int = 65536, *, node: int = 0) -> LogChunk:
        data = self.nodes[node][offset : offset + min(limit, self.piece)]
        following = offset + len(data)
        return LogChunk(
            data=data, next_offset=following, end=self.ended and following == len(self.nodes[node])
        )


def drain(log: TaskLog) -> list[str]:
    lines = log.read()
    while not log.caught_up:
        lines += log.read()
    return lines


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 65536])
def test_lines_are_whole_however_the_output_is_cut(piece: int) -> None:
    output = Output("one\nzwölf\n\nthe last has no end: ü".encode(), piece=piece)
    output.ended = True
    log = TaskLog(output)
    assert drain(log) == ["one", "zwölf", "", "the last has no end: ü"]
    assert log.ended


def test_an_unfinished_line_waits_for_its_end() -> None:
    output = Output(b"ready\nload")
    log = TaskLog(output)
    assert drain(log) == ["ready"]
    output.nodes[0] += b"ing\n"
    assert drain(log) == ["loading"]


def test_another_process_reads_on_where_the_first_has_stopped() -> None:
    output = Output(b"one\ntwo\nthr")
    first = TaskLog(output)
    assert drain(first) == ["one", "two"]
    output.nodes[0] += b"ee\nfour\n"
    assert drain(TaskLog(output, offsets=first.offsets)) == ["three", "four"]


def test_a_progress_bar_shows_what_a_terminal_would_show() -> None:
    assert drain(TaskLog(Output(b"\r 1%\r50%\r100%\nwindows\r\n"))) == ["100%", "windows"]


def test_a_line_without_end_comes_in_pieces_that_split_no_character() -> None:
    lines = drain(TaskLog(Output("ü".encode() * LONGEST_LINE)))
    assert len(lines) == 1
    assert set(lines[0]) == {"ü"}


def test_the_output_of_several_machines_says_which() -> None:
    assert drain(TaskLog(Output(b"a\n", b"b\n"), nodes=2)) == ["[0] a", "[1] b"]


# -- failures


@pytest.mark.parametrize("error", [ValidationError("no"), SpecRejected("no"), AuthenticationError("no")])
def test_what_cannot_be_mended_by_waiting_is_not_tried_again(error: FlowError) -> None:
    assert isinstance(to_airflow(error), AirflowFailException)


@pytest.mark.parametrize(
    "error", [WorkerDiedError("gone"), ProviderUnavailable("busy"), RemoteExecutionError("raised"), OSError()]
)
def test_airflow_decides_about_everything_else(error: Exception) -> None:
    assert to_airflow(error) is None


# -- the operator's arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"command": "true", "script": "true"},
        {"command": "true", "module": "a.py", "function": "f"},
        {"module": "a.py"},
        {"function": "f", "command": "true"},
        {"command": "true", "op_args": [1]},
    ],
)
def test_contradictory_arguments_are_refused_when_the_dag_is_read(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="FlowGPUOperator 'node'"):
        FlowGPUOperator(task_id="node", **arguments)


#: Airflow knows who the node is: the key is ours.
FIELDS = set(TaskConfig.model_fields) - {"idempotency_key"} | {"gpu"}


def test_the_operator_takes_every_field_of_a_task_and_templates_it() -> None:
    assert FIELDS | {"provider", "op_args", "op_kwargs"} <= set(FlowGPUOperator.template_fields)


@pytest.mark.parametrize("field", sorted(FIELDS - {"command", "shell", "script"}))
def test_every_field_of_a_task_can_be_given_by_its_name_and_mapped_over(field: str) -> None:
    given: dict[str, Any] = {field: "{{ ds }}"}
    operator = FlowGPUOperator(task_id="node", command="true", **given)
    assert getattr(operator, field) == "{{ ds }}"
    FlowGPUOperator.partial(task_id="mapped", command="true").expand(**{field: ["{{ ds }}"]})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpus", "Did you mean 'gpu'?"),
        ("max_runtime_hours", "Did you mean 'max_run_time_hours'?"),
        ("retrys", "Did you mean 'retries'?"),
        ("op_arg", "Did you mean 'op_args'?"),
        ("idempotency_key", "Airflow says who the node is"),
    ],
)
def test_an_argument_that_is_not_known_is_refused_with_the_one_that_was_meant(name: str, hint: str) -> None:
    wrong: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=rf"FlowGPUOperator takes no argument '{name}'\. {re.escape(hint)}"):
        FlowGPUOperator(task_id="node", command="true", **wrong)


@pytest.mark.parametrize(
    "arguments", [{"command": "bash train.sh"}, {"shell": "train.sh"}, {"command": ["a", "b.sh"]}]
)
def test_a_command_that_looks_like_a_file_name_is_not_read_as_one(arguments: dict[str, Any]) -> None:
    operator = FlowGPUOperator(task_id="node", env={"A": "x.sh"}, **arguments)
    operator.render_template_fields({})
    assert {name: getattr(operator, name) for name in arguments} == arguments
    assert operator.env == {"A": "x.sh"}


def test_a_way_to_send_values_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="serialization='yaml' is neither 'json' nor 'pickle'"):
        FlowGPUOperator(task_id="node", module="a.py", function="f", serialization="yaml")


# -- the link


@pytest.mark.parametrize(
    ("known", "left", "shown"),
    [
        ("https://a/1", None, "https://a/1"),
        ("", "https://a/0", ""),
        (None, "https://a/1", "https://a/1"),
        (None, None, ""),
    ],
)
def test_the_link_of_a_leg_that_did_not_get_to_the_task_is_the_one_left_before(
    known: str | None, left: str | None, shown: str
) -> None:
    operator = FlowGPUOperator(task_id="node", command="true")
    operator.task_url = known
    ti = SimpleNamespace(task_id="node", map_index=-1, xcom_pull=lambda **_: left)
    assert FlowTaskLink().get_link(operator, ti_key=ti) == shown


# -- the trigger


def test_a_trigger_survives_its_trip_through_the_database() -> None:
    trigger = FlowTaskTrigger(flow_task_id="a-1", provider="local", log_offsets=[3], deadline=4.5)
    path, arguments = trigger.serialize()
    assert path == "flow_airflow.triggers.FlowTaskTrigger"
    assert FlowTaskTrigger(**arguments).serialize() == (path, arguments)


def test_a_dag_file_does_not_load_what_only_a_run_needs() -> None:
    # Every DAG file is read again and again, and once more by every worker.
    code = "import sys, flow_airflow.operators, flow_airflow.sensors; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.split()
    assert {"flow_core.config", "flow_core.models", "flow_core.flow"} & set(loaded) == set()
