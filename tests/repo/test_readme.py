"""The README's examples run as they stand: each in the environment of the host that it is for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"

#: What a user would do next with the example of each section.
NEXT = {
    "From Python": "",
    "On warm workers": "",
    "As a node in Airflow": "print(training().task_ids)",
    "As a node in Prefect": "print(training())",
    "As a node in Dagster": "print(dg.materialize([model], resources=defs.resources).output_for_node('model'))",
}
SHOWN = {
    "From Python": "0.349\n0.001\n",
    "On warm workers": "[0, 3, 6, 9, 12]\n28\n",
    "As a node in Airflow": "['train']\n",
    "As a node in Prefect": "[{'loss': 0.349}, {'loss': 0.122}, {'loss': 0.042}]\n",
    "As a node in Dagster": "{'loss': 0.349}\n",
}


#: Examples without a host.
_PLAIN = ("From Python", "On warm workers")


def example(section: str) -> str:
    """The first Python block below a heading of the README."""
    found = re.search(
        rf"^#+ {section}\n.*?^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found, f"the README has no example for {section!r}"
    return found[1]


@pytest.fixture
def project(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the README's function in it, and a machine with two simulated GPUs."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text(example("The function"))
    for variable in ("AIRFLOW_HOME", "DAGSTER_HOME", "PREFECT_HOME"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    assert home.name in os.environ["FLOW_LOCAL_HOME"]
    return folder


def belongs_here(section: str) -> bool:
    """Whether an example's host is installed beside these tests."""
    return section in _PLAIN or find_spec(section.rpartition(" ")[2].lower()) is not None


@pytest.mark.parametrize("section", [section for section in NEXT if belongs_here(section)])
def test_the_example_runs(section: str, project: Path) -> None:
    script = project / "example.py"
    script.write_text(f"{example(section)}\n{NEXT[section]}\n")
    done = subprocess.run([sys.executable, script], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(SHOWN[section]), done.stdout + done.stderr
