from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import pytest

# Unit tests import Airflow too; it must not look into, or write to, the user's home.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="flow-airflow-unit-"))

with warnings.catch_warnings():
    # Airflow 3.1 is warned, and by itself, the first time that this is imported.
    warnings.simplefilter("ignore")
    from airflow.sdk import task as _task  # noqa: F401

from tests.airflow.deployment import Database, Deployment, Executor
from tests.airflow.harness import Airflow, Run, running_airflow
from tests.airflow.in_process import environment
from tests.infra.fixtures import unavailable
from tests.infra.packages import Unavailable

if TYPE_CHECKING:
    from flow_core import Flow


@pytest.fixture(scope="session")
def database() -> Database:
    """The database of this test run's Airflow: the variable AIRFLOW_TEST_DATABASE chooses it."""
    name = os.environ.get("AIRFLOW_TEST_DATABASE", "sqlite")
    assert name in get_args(Database), f"AIRFLOW_TEST_DATABASE={name}: there are {get_args(Database)}"
    return cast("Database", name)


@pytest.fixture(scope="session")
def airflow(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    """A real Airflow for the whole session."""
    with running_airflow(plan(tmp_path_factory.mktemp("airflow"), database=database)) as started:
        yield started


def plan(home: Path, *, database: Database, executor: Executor = "LocalExecutor") -> Deployment:
    """Choose an Airflow for tests; where it cannot be had they are left out, and in CI they fail."""
    try:
        return Deployment.plan(home, database=database, executor=executor)
    except Unavailable as reason:
        unavailable(reason)


@pytest.fixture(scope="session")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of an Airflow without processes, for DAGs that run in one of their own: see `in_process`."""
    return environment(tmp_path_factory.mktemp("airflow-home"))


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


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Flow keeps what a test of one process runs, with two simulated GPUs."""
    monkeypatch.setenv("FLOW_LOCAL_HOME", str(tmp_path / "flow"))
    monkeypatch.setenv("FLOW_OBJECTS_HOME", str(tmp_path / "objects"))
    monkeypatch.setenv("FLOW_LOCAL_GPUS", "2")
    return tmp_path
