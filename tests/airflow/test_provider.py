"""What Airflow's command line says of this provider."""

from __future__ import annotations

import json
import os
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import flow_airflow
from example_dags.hosts.airflow_server import AIRFLOW
from flow_airflow.provider_info import get_provider_info


def listed(what: str, home: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [AIRFLOW, "providers", what, "--output", "json"],
        env={**os.environ, "AIRFLOW_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("[") :])
    return found


@pytest.mark.parametrize(
    ("what", "mention"),
    [
        ("list", "flow-gpu"),
        ("hooks", "flow_airflow.hooks.FlowHook"),
        ("links", "flow_airflow.links.FlowTaskLink"),
        ("triggers", "flow_airflow.triggers"),
        ("widgets", "extra__flow__provider"),
        ("behaviours", "flow"),
    ],
)
def test_the_command_line_knows_the_provider(tmp_path: Path, what: str, mention: str) -> None:
    assert any(mention in str(one.values()) for one in listed(what, tmp_path))


def test_airflow_accepts_what_the_provider_says_of_itself() -> None:
    import airflow

    jsonschema: Any = import_module("jsonschema")  # it comes with Airflow, without types
    schema = json.loads((Path(airflow.__path__[0]) / "provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)


def test_every_name_that_is_offered_is_there_and_listed() -> None:
    info = get_provider_info()
    modules = {
        module
        for kind in ("operators", "sensors", "hooks", "triggers")
        for entry in info[kind]
        for module in entry["python-modules"]
    }
    for name in flow_airflow.__all__:
        found = getattr(flow_airflow, name)
        assert not isinstance(found, type) or found.__module__ in modules


def test_the_decorator_is_found_under_its_name() -> None:
    from airflow.sdk import task

    assert callable(task.flow_gpu)
