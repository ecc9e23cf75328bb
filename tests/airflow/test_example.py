"""The example DAG, as the DAG processor sees it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from airflow.sdk import DAG

FILE = Path(__file__).resolve().parents[2] / "example_dags" / "airflow" / "digits_dag.py"


def test_the_example_is_a_dag_of_four_nodes() -> None:
    spec = importlib.util.spec_from_file_location("digits_dag", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dag: DAG = module.settings.dag
    assert {task.task_id: task.downstream_task_ids for task in dag.tasks} == {
        "settings": {"evaluate"},
        "evaluate": {"pick_best"},
        "pick_best": {"refit"},
        "refit": set(),
    }
