"""A Prefect server for the whole session, and for every test a GPU machine whose Python is bare."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read when Prefect is imported: its files go elsewhere, and it tells nobody of our tests.
os.environ.update(
    DO_NOT_TRACK="1",
    NO_PROXY="127.0.0.1,localhost",
    PREFECT_CLI_PROMPT="false",
    PREFECT_HOME=tempfile.mkdtemp(prefix="flow-prefect-"),
    PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW="ignore",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
)

import pytest

from tests.prefect.machine import Machine

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Prefect and what it stands on warn of their own future."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a Prefect server on a free port, which this process and its children use."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=240):
        address = PREFECT_API_URL.value()
        assert address is not None
        yield address


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with nothing installed."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def machine(
    home: Path, bare_python: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    """The GPU machine: two simulated GPUs and a bare Python; Prefect's server runs as well."""
    monkeypatch.setenv("FLOW_LOCAL_PYTHON", str(bare_python))
    marks = tmp_path / "marks"
    marks.mkdir()
    return Machine(home=home, python=bare_python, marks=marks, server=server)
