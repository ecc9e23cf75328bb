from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Unit tests import Airflow too; it must not look into, or write to, the user's home.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="flow-airflow-unit-"))

from tests.airflow.harness import Airflow, Run, running_airflow

if TYPE_CHECKING:
    from flow_core import Flow


@pytest.fixture(scope="session")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    """A real Airflow for the whole session."""
    with running_airflow(tmp_path_factory.mktemp("airflow")) as started:
        yield started


@pytest.fixture
def trail(tmp_path: Path) -> Path:
    """A file to which the remote work writes a line `start PID` whenever it starts."""
    return tmp_path / "trail"


@dataclass(frozen=True)
class Passive:
    """DAG runs that nobody interferes with, started together to save time."""

    values: Run
    failures: Run
    mapped: Run
    quick: Run
    trail: Path


@pytest.fixture(scope="session")
def passive(airflow: Airflow, tmp_path_factory: pytest.TempPathFactory) -> Passive:
    trail = tmp_path_factory.mktemp("failures") / "trail"
    return Passive(
        values=airflow.trigger("values"),
        failures=airflow.trigger("failures", trail=str(trail)),
        mapped=airflow.trigger("mapped"),
        quick=airflow.trigger("quick"),
        trail=trail,
    )


@pytest.fixture(scope="session")
def flow(airflow: Airflow) -> Iterator[Flow]:
    """What Airflow's tasks submit to, seen from outside."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FLOW_LOCAL_HOME", "FLOW_LOCAL_GPUS"):
            patch.setenv(name, airflow.environment[name])
        from flow_core import Flow

        yield Flow(provider="local")
