"""A DAG file run from beginning to end in one process, as `dag.test()` does it, with an Airflow home of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from example_dags.hosts.airflow_server import AIRFLOW

ROOT = Path(__file__).parents[2]

_RUN = """
import json
import example
run = example.dag.test()
ended = [one for one in run.get_task_instances() if one.map_index < 0]
states = {one.task_id: str(one.state) for one in ended}
given = {one.task_id: one.xcom_pull(one.task_id, map_indexes=-1) for one in ended}
print(json.dumps({"states": states, "given": given}, default=str))
"""


@dataclass(frozen=True)
class Ended:
    """What a run has come to: the tasks' states and XComs by their ids, and all that was logged."""

    states: dict[str, str]
    given: dict[str, Any]
    log: str


def environment(home: Path) -> dict[str, str]:
    """Return the variables of an Airflow with a database of its own, made now."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "FLOW_"))},
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__OPENLINEAGE__DISABLED": "True",
        "FLOW_LOCAL_HOME": str(home / "flow"),
        "FLOW_OBJECTS_HOME": str(home / "objects"),
        "FLOW_LOCAL_GPUS": "4",
    }
    subprocess.run([AIRFLOW, "db", "migrate"], env=variables, check=True, capture_output=True, timeout=240)
    return variables


def run_dag(folder: Path, dag: str, variables: dict[str, str]) -> Ended:
    """Run the DAG file with the text `dag`, whose DAG is named `dag`, from a folder with all that it needs."""
    (folder / "example.py").write_text(dag)
    (folder / "run.py").write_text(_RUN)
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "integrations")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "run.py"],
        cwd=folder,
        env={**variables, "AIRFLOW__CORE__DAGS_FOLDER": str(folder), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith('{"states"')]
    assert said, done.stderr[-3000:]
    return Ended(**json.loads(said[0]), log=done.stdout)
