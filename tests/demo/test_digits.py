"""The example's functions are plain Python: they are tested by calling them."""

from __future__ import annotations

import ast
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from example_dags import digits

SOURCE = Path(digits.__file__)


@pytest.fixture(scope="module")
def best() -> dict[str, Any]:
    return digits.evaluate({"C": 10.0, "gamma": 0.001})


def test_the_sweep_tries_at_least_eight_different_settings() -> None:
    settings = digits.sweep_settings()
    assert len(settings) >= 8
    assert len({json.dumps(setting, sort_keys=True) for setting in settings}) == len(settings)


def test_a_good_setting_reads_new_writers_and_a_bad_one_does_not(best: dict[str, Any]) -> None:
    assert best["accuracy"] > 0.97
    assert digits.evaluate({"C": 0.1, "gamma": 0.01})["accuracy"] < 0.2


def test_an_evaluation_is_json_and_says_how_it_came_about(best: dict[str, Any]) -> None:
    assert json.loads(json.dumps(best, allow_nan=False)) == best
    assert best["setting"] == {"C": 10.0, "gamma": 0.001}
    assert len(best["fold_accuracies"]) == 5
    assert best["accuracy"] == pytest.approx(sum(best["fold_accuracies"]) / 5, abs=1e-5)
    assert best["seconds"] > 0


def test_evaluating_again_gives_the_same_accuracy(best: dict[str, Any]) -> None:
    again = digits.evaluate(best["setting"])
    assert {**again, "seconds": 0} == {**best, "seconds": 0}


def test_the_highest_accuracy_wins_whatever_the_order() -> None:
    results = [_result(1.0, 0.001, 0.95), _result(10.0, 0.001, 0.97), _result(0.1, 0.001, 0.90)]
    assert digits.pick_best(results) == digits.pick_best(results[::-1]) == results[1]


def test_of_equals_the_softest_model_wins_whatever_the_order() -> None:
    results = [_result(10.0, 0.001, 0.97), _result(1.0, 0.01, 0.97), _result(1.0, 0.001, 0.97)]
    assert digits.pick_best(results) == digits.pick_best(results[::-1]) == results[2]


def test_an_empty_sweep_has_no_best() -> None:
    with pytest.raises(ValueError, match="the sweep has no results"):
        digits.pick_best([])


def test_refit_reports_what_the_held_out_digits_say(best: dict[str, Any], tmp_path: Path) -> None:
    report = digits.refit(best, str(tmp_path / "new folder" / "confusion.png"))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    matrix = report["confusion"]
    assert (len(matrix), {len(row) for row in matrix}) == (10, {10})
    right, total = sum(matrix[i][i] for i in range(10)), sum(map(sum, matrix))
    assert total == digits.HELD_OUT
    assert report["errors"] == total - right
    assert report["test_accuracy"] == pytest.approx(right / total, abs=1e-6)
    assert 0.95 < report["test_accuracy"] < 1
    assert report["cv_accuracy"] == best["accuracy"]


def test_refit_draws_the_same_picture_each_time(best: dict[str, Any], tmp_path: Path) -> None:
    first, second = (digits.refit(best, str(tmp_path / name)) for name in ("a.png", "b.png"))
    drawn = Path(first["picture"]).read_bytes()
    assert drawn[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", drawn[16:24])
    assert width > 1000
    assert height > 500
    assert Path(second["picture"]).read_bytes() == drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    assert {**first, "picture": ""} == {**second, "picture": ""}


def test_the_module_imports_nothing_but_the_standard_library_until_called() -> None:
    imported = {
        name.split(".")[0]
        for node in ast.parse(SOURCE.read_text()).body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def test_the_module_names_neither_us_nor_an_orchestrator_in_code() -> None:
    names = {node.id for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.Name)}
    roots = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(SOURCE.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not (names | roots) & {"flow_core", "airflow", "prefect", "dagster", "flow"}
    assert roots - sys.stdlib_module_names == {"sklearn", "matplotlib"}


def _result(c: float, gamma: float, accuracy: float) -> dict[str, Any]:
    return {"setting": {"C": c, "gamma": gamma}, "accuracy": accuracy}
