"""The log of an Airflow task says how much of the remote output is in it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from airflow.configuration import conf

from flow_airflow.shown import offsets_shown, origin, worker_log

TASK = "train-0123456789abcdef-1"


def lines(*said: tuple[int, int], task_id: str = TASK) -> str:
    """What a triggerer has written for these (node, offset)."""
    return "".join(
        json.dumps({"event": f"{task_id}[0]:999", "chan": origin(task_id, node, offset), "level": "info"})
        + "\n"
        for node, offset in said
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "attempt=1.log"
    path.write_text('{"event": "from the worker"}\n')
    return path


def triggerer(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.trigger.{number}.log")


def test_a_log_without_output_says_nothing(log: Path) -> None:
    triggerer(log, 7).write_text('{"event": "trigger starting"}\n')
    assert offsets_shown(str(log), TASK, [12]) == [12]


def test_the_last_line_of_each_machine_counts_whichever_triggerer_wrote_it(log: Path) -> None:
    triggerer(log, 7).write_text(lines((0, 20), (1, 500), (0, 40)))
    triggerer(log, 8).write_text('{"event": "trigger starting"}\n' + lines((0, 60)))
    assert offsets_shown(str(log), TASK, [12, 13, 14]) == [60, 500, 14]


def test_half_a_line_and_other_work_are_passed_over(log: Path) -> None:
    whole, torn = lines((0, 20)), lines((0, 40))[:-20]
    other = lines((0, 777), task_id="train-0123456789abcdef-2")
    triggerer(log, 7).write_text(other + whole + json.dumps({"event": f"{TASK}[0]:888"}) + "\n" + torn)
    triggerer(log.with_name("attempt=11.log"), 7).write_text(lines((0, 4000)))
    assert offsets_shown(str(log), TASK, [0]) == [20]


def test_a_long_log_is_read_from_its_end_alone(log: Path) -> None:
    long = lines(*((0, offset) for offset in range(0, 200_000, 10)))
    triggerer(log, 7).write_text(lines((1, 5)) + long)
    assert offsets_shown(str(log), TASK, [0, 0]) == [199_990, 5]


def test_what_only_this_triggerer_could_show_is_shown_again(log: Path) -> None:
    triggerer(log, 7).write_text(lines((0, 20)))
    log.unlink()  # the worker's log is elsewhere, so nobody looks at ours but through the present triggerer
    assert offsets_shown(str(log), TASK, [12]) == [12]
    assert offsets_shown(None, TASK, [12]) == [12]


def test_the_log_is_where_airflow_puts_it() -> None:
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=3, try_number=2)
    folder = conf.get("logging", "base_log_folder")
    assert worker_log(ti) == f"{folder}/dag_id=d/run_id=r/task_id=t/map_index=3/attempt=2.log"


def test_a_template_that_asks_for_what_a_trigger_does_not_know_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def render(ti: SimpleNamespace) -> str:
        return str(ti.logical_date)

    monkeypatch.setattr("flow_airflow.shown.log_filename_template_renderer", lambda: render)
    assert worker_log(SimpleNamespace()) is None
