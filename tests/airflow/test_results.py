"""What becomes of a result, through a real Airflow: the same value in the next task, a reference, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_core import Flow, ObjectRef
from tests.airflow.harness import Airflow, Run, until


@pytest.fixture(scope="module")
def typed(airflow: Airflow) -> Run:
    return airflow.trigger("typed_results")


@pytest.fixture(scope="module")
def references(airflow: Airflow) -> Run:
    return airflow.trigger("references")


# -- values


@pytest.mark.parametrize(
    ("name", "arrived"),
    [
        ("tuple", "tuple (1, 'two')"),
        ("nested", "dict {'a': [(1, {2, 3})], 'b': frozenset({'x'})}"),
        ("set", "set {1}"),
        ("decimal", "Decimal Decimal('0.25')"),
        ("uuid", "UUID UUID('00000000-0000-0000-0000-000000000007')"),
    ],
)
def test_a_value_arrives_in_the_next_task_with_its_type(typed: Run, name: str, arrived: str) -> None:
    task = typed.task(f"got_{name}")
    assert task.ended(240) == "success", task.log()
    assert task.xcom() == arrived


def test_a_moment_arrives_to_the_microsecond(typed: Run) -> None:
    task = typed.task("got_datetime")
    assert task.ended(240) == "success", task.log()
    assert task.xcom().startswith("datetime datetime.datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "int_keys",
            "result['epochs'] has a key that is no text: 1 (builtins.int); return {str(key): one for",
        ),
        ("bytes", "result['weights'] is a bytes, which Airflow does not store (TypeError"),
        ("nan", "result['loss'][1] is nan, for which JSON has no form"),
        ("path", "result[0] is a pathlib.PosixPath, which Airflow does not store"),
        ("exception", "result['error'] is a ValueError, which Airflow does not store"),
        (
            "naive_enum",
            "result[1] is a decimal.Decimal, Decimal('0.12345678901234567890'), and Airflow makes",
        ),
        ("huge_int", "result[0] is an int of 81 bits, and 64 can be sent; return hex(value)"),
        ("nul", "result['text'] holds the character \\0, which PostgreSQL does not store"),
    ],
)
def test_a_value_that_would_be_lost_is_refused_by_path_value_and_way_out(
    typed: Run, name: str, said: str
) -> None:
    task = typed.task(f"refuse_{name}")
    assert task.ended(240) == "failed"
    log = task.log()
    assert said in log
    assert f"the result of Flow task {task.xcom('flow_task_id')} cannot be an XCom" in log
    assert 'result_as="reference"' in log
    assert "clear this task. It then collects that result and runs nothing again" in log
    assert task.info["try_number"] == 1, "trying again cannot help"


def test_what_json_cannot_bring_from_the_machine_is_refused_in_the_same_way(typed: Run) -> None:
    task = typed.task("refuse_json")
    assert task.ended(240) == "failed"
    log = task.log()
    assert "result['weights'] is a bytes" in log
    assert 'serialization="pickle"' in log
    assert 'result_as="reference"' in log
    assert task.info["try_number"] == 1, "trying again cannot help"


def test_nan_becomes_none_where_that_is_asked_for_and_the_log_says_where(typed: Run) -> None:
    task = typed.task("nan_as_none")
    assert task.ended(240) == "success", task.log()
    assert task.xcom() == {"loss": [0.5, None]}
    assert "result['loss'][1]: no number. None is handed on in its place." in task.log()


def test_multiple_outputs_are_one_xcom_each_and_the_whole(typed: Run) -> None:
    task = typed.task("outputs")
    assert task.ended(240) == "success", task.log()
    assert [task.xcom(key) for key in ("loss", "steps", "return_value")] == [
        0.5,
        [1, 2],
        {"loss": 0.5, "steps": [1, 2]},
    ]
    assert typed.task("got_output").ended() == "success"
    assert typed.task("got_output").xcom() == "float 0.5"


def test_a_result_without_outputs_is_refused_with_the_reason(typed: Run) -> None:
    task = typed.task("no_outputs")
    assert task.ended(240) == "failed"
    assert "result is a int and no dict, and multiple_outputs stores each value of a dict" in task.log()


def test_the_none_of_a_mapped_task_keeps_its_place(typed: Run) -> None:
    task = typed.task("got_some_none")
    assert task.ended(240) == "success", task.log()
    assert task.xcom() == [1, None, 3]


def test_a_none_that_is_mapped_over_is_refused_with_the_name_of_who_maps(typed: Run) -> None:
    task = typed.task("map_over_none")
    assert task.ended(240) == "failed"
    assert "result is None, and 'never' maps over it" in task.log()


# -- references


def test_a_small_result_is_a_value_and_a_large_one_a_reference(references: Run) -> None:
    for name in ("small", "large", "deferred_large"):
        assert references.task(name).ended(240) == "success", references.task(name).log()
    assert references.task("small").xcom() == [0] * 10
    for name in ("large", "deferred_large"):
        ref = ObjectRef.of(references.task(name).xcom())
        assert (ref.size_bytes > 1_400_000, ref.codec) == (True, "json")


def test_a_reference_is_its_value_in_the_next_node_at_any_depth(references: Run) -> None:
    task = references.task("deep")
    assert task.ended(240) == "success", task.log()
    assert task.xcom() == [700_000, 10, 10, 800_000]


def test_an_ordinary_task_loads_what_has_arrived_with_one_call(references: Run) -> None:
    for name, arrived in {
        "loaded_large": ["dict", True, 700_000],
        "loaded_small": ["list", False, 10],
        "lengths_loaded": [10, 800_000],
    }.items():
        task = references.task(name)
        assert task.ended(240) == "success", task.log()
        assert task.xcom() == arrived


def test_a_result_that_no_xcom_takes_goes_to_the_next_node_by_reference(references: Run) -> None:
    task = references.task("use_asked")
    assert task.ended(240) == "success", task.log()
    assert task.xcom() == 3


def test_a_result_that_is_mapped_over_is_a_value_whatever_its_size(references: Run) -> None:
    task = references.task("each", 2)
    assert task.ended(240) == "success"
    assert task.xcom() == "int 0"


@pytest.mark.parametrize("name", ["small", "deferred_large"])
def test_the_log_closes_with_one_line_about_what_was_used_in_both_modes(references: Run, name: str) -> None:
    task = references.task(name)
    assert task.ended(240) == "success", task.log()
    (line,) = [
        one
        for one in task.lines()
        if one.startswith(f"Flow task {task.xcom('flow_task_id')} completed: cpu on")
    ]
    assert ", waited " in line and ", ran " in line


# -- refused, and collected


def test_a_refused_result_is_collected_after_a_clear_without_a_second_run(
    airflow: Airflow, flow: Flow, trail: Path
) -> None:
    run = airflow.trigger("collected", trail=str(trail))
    task = run.task("kept")
    assert task.ended(240) == "failed", task.log()
    assert "cannot be an XCom: result['weights'] is a bytes" in task.log()
    first = task.xcom("flow_task_id")
    (airflow.home / "result_as").write_text("reference")
    run.clear("kept")
    task.reaches("success", timeout_s=240)
    assert f"Collecting the result of Flow task {first}" in task.log()
    assert task.xcom("flow_task_id") == first
    kept = flow.objects.get(task.xcom(), allow_pickle=True)
    assert kept == {"weights": b"123", "starts": 1}
    assert len(trail.read_text().splitlines()) == 1, "the work ran once"

    run.clear("kept")
    until("the work has run again", lambda: len(trail.read_text().splitlines()) == 2, 240)
    task.reaches("success", timeout_s=240)
    assert task.xcom("flow_task_id") != first, "a clear after success runs the work again"
