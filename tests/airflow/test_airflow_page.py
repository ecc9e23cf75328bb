"""The examples of docs/airflow.md run as they stand, each a DAG file of its own, in a real Airflow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.deployment import Deployment
from tests.airflow.harness import Airflow, Run
from tests.repo.test_readme import example

PAGE = (Path(__file__).parents[2] / "docs" / "airflow.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE, re.M | re.S))

#: What tasks of each example hand on.
GIVEN: dict[str, dict[str, Any]] = {
    "A function of a file": {"train": {"loss": 0.001}, "report": "the loss is 0.001"},
    "A command": {"shell": "2", "exact": "one argument $HOME"},
    "Functions of the DAG file": {"scale": 3.5, "total": 21},
    "Many at once": {"best": 0.031},
    "Results": {"norm": 6250.0, "count": 100_000},
    "Warm workers": {"same": True},
    "Waiting for a task": {"trained": {"loss": 0.729}},
    "Ending tasks": {"end": []},
    "Volumes": {"read": "kept"},
    "Connections": {"there": "there"},
}


def test_every_example_has_its_result() -> None:
    assert set(EXAMPLES) == set(GIVEN)
    assert PAGE.count("```python") == len(GIVEN)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """A run of each example, by its title."""
    folder = tmp_path_factory.mktemp("page")
    dags = folder / "dags"
    dags.mkdir()
    (dags / "train.py").write_text(example("The function"))
    for number, text in enumerate(EXAMPLES.values()):
        (dags / f"example_{number}.py").write_text(text)
    deployment = Deployment.plan(folder, dags=dags)
    # Nobody is killed here, so a slow machine may take its time.
    deployment.environment |= {
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "300",
    }
    airflow = Airflow(deployment)
    try:
        airflow.start()
        named = {title: re.search(r'DAG\("(\w+)"', text) for title, text in EXAMPLES.items()}
        yield {title: airflow.trigger(found[1]) for title, found in named.items() if found}
    finally:
        airflow.stop()


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_hands_on_what_it_says(runs: dict[str, Run], title: str) -> None:
    run = runs[title]
    state = run.ended(280)
    assert state == "success", [run.task(one["task_id"], one["map_index"]).log() for one in run.tasks()]
    assert {task_id: run.task(task_id).xcom() for task_id in GIVEN[title]} == GIVEN[title]
