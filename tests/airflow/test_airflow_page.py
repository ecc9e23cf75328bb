"""The examples of docs/airflow.md run as they stand, each a DAG file of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.in_process import ROOT, run_dag
from tests.repo.test_readme import example

PAGE = (ROOT / "docs" / "airflow.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE, re.M | re.S))

#: What some tasks of each example hand on.
GIVEN: dict[str, dict[str, Any]] = {
    "A function of a file": {"train": {"loss": 0.001}, "report": "the loss is 0.001"},
    "A command": {"shell": "12 epochs on 2 GPUs", "exact": "one argument $HOME"},
    "Functions of the DAG file": {"scale": 3.5, "total": 21},
    "Many at once": {"best": 0.031},
    "Results": {"norm": 6250.0, "count": 100_000},
    "Warm workers": {"same": True, "train": {"loss": 0.729}},
    "Waiting for a task": {"trained": {"loss": 0.729}},
    "Ending tasks": {"end": []},
    "Volumes": {"read": "kept"},
    "Connections": {"there": "there"},
}


def test_every_example_is_run() -> None:
    assert set(EXAMPLES) == set(GIVEN)
    assert PAGE.count("```python") == len(GIVEN)


@pytest.mark.parametrize("title", GIVEN)
def test_the_example_hands_on_what_it_says(variables: dict[str, str], tmp_path: Path, title: str) -> None:
    (tmp_path / "train.py").write_text(example("The function"))
    done = run_dag(tmp_path, EXAMPLES[title], variables)
    assert set(done.states.values()) == {"success"}, done.log
    assert {name: done.given[name] for name in GIVEN[title]} == GIVEN[title]
