"""The pins are plain `name==version` lines, and they pin everything that an environment installs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "constraints").glob("*"))


def test_there_is_one_file_for_each_environment() -> None:
    assert [file.name for file in FILES] == [
        "airflow-3.1.txt",
        "airflow-3.2.txt",
        "airflow.txt",
        "bench-airflow.txt",
        "bench.txt",
        "core.txt",
        "dagster.txt",
        "demo.txt",
        "prefect.txt",
        "screens.txt",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_line_is_a_name_and_a_version_and_each_name_stands_once(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9A-Za-z.]*", line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_this_environment_holds_exactly_what_is_pinned() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints/core.txt").read_text().splitlines())
    installed = {
        re.sub(r"[-_.]+", "-", found.name).lower(): found.version for found in distributions(path=[site()])
    }
    assert installed.pop("flow-gpu") == "0.1.0"
    assert {name: version for name, version in installed.items() if pinned.get(name) != version} == {}


def site() -> str:
    """The site-packages folder of the Python that runs the tests."""
    code = "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"
    return str(json.loads(subprocess.check_output([sys.executable, "-c", code])))
