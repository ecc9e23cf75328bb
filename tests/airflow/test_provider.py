"""What Airflow's command line says of this provider."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import flow_airflow
from flow_airflow.provider_info import get_provider_info

#: What `airflow providers` lists, and what of ours must be in it.
MENTIONS = {
    "list": "flow-gpu",
    "hooks": "flow_airflow.hooks.FlowHook",
    "links": "flow_airflow.links.FlowTaskLink",
    "triggers": "flow_airflow.triggers",
    "widgets": "extra__flow__provider",
    "behaviours": "flow",
}

#: The same as as many runs of `airflow providers WHAT --output json`, which take long to start.
_LISTS = f"""
from airflow.cli.cli_parser import get_parser
for what in {list(MENTIONS)}:
    arguments = get_parser().parse_args(["providers", what, "--output", "json"])
    print()
    print("===", what)
    arguments.func(arguments)
"""


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What Airflow's command line lists, by the name of the list."""
    done = subprocess.run(
        [sys.executable, "-c", _LISTS],
        env={**os.environ, "AIRFLOW_HOME": str(tmp_path_factory.mktemp("home"))},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    parts = (part.partition("\n") for part in done.stdout.split("\n=== ")[1:])
    return {what: json.loads(said[said.index("[") :]) for what, _, said in parts}


@pytest.mark.parametrize("what", MENTIONS)
def test_the_command_line_knows_the_provider(listed: dict[str, list[dict[str, Any]]], what: str) -> None:
    assert any(MENTIONS[what] in str(one.values()) for one in listed[what])


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
