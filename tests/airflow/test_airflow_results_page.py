"""The examples of docs/airflow-results.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.in_process import ROOT, run_dag
from tests.repo.test_readme import example

PAGE = (ROOT / "docs" / "airflow-results.md").read_text()
EXAMPLES = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
)

#: What some tasks of each example hand on.
GIVEN: dict[str, dict[str, Any]] = {
    "Values": {"report": "the loss is 0.729"},
    "References": {"evaluate": 0.0, "look": ["loss"]},
}


def test_every_example_is_run() -> None:
    assert PAGE.count("```python") == len(EXAMPLES)
    assert set(EXAMPLES) == set(GIVEN)


@pytest.mark.parametrize("title", GIVEN)
def test_the_example_runs(variables: dict[str, str], tmp_path: Path, title: str) -> None:
    best = "\n\ndef best(models):\n    return min(one['loss'] for one in models)\n"
    (tmp_path / "train.py").write_text(example("The function") + best)
    done = run_dag(tmp_path, EXAMPLES[title], variables)
    assert set(done.states.values()) == {"success"}, done.log
    assert {name: done.given[name] for name in GIVEN[title]} == GIVEN[title]
