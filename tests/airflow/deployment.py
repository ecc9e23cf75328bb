"""What an Airflow for the tests consists of: its processes, their settings and the database they share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from example_dags.hosts import airflow_server
from example_dags.hosts.airflow_server import AIRFLOW, COMPONENTS
from tests.infra.postgres import Server

Database = Literal["sqlite", "postgresql"]

HERE = Path(__file__).resolve().parent
DAGS = HERE / "dags"


@dataclass(frozen=True)
class Deployment:
    """A folder, a port for the API, and the commands of the components in the order in which they start."""

    home: Path
    dags: Path
    port: int
    environment: dict[str, str]
    commands: dict[str, list[str]]
    server: Server | None

    @classmethod
    def plan(
        cls, home: Path, *, database: Database = "sqlite", dags: Path = DAGS, port: int | None = None
    ) -> Deployment:
        """Choose ports and make the database server's files, but start nothing. Raises Unavailable."""
        free, workers, triggerer, database_port = airflow_server.free_ports(4)
        port = port or free
        server = Server.prepare(database_port) if database == "postgresql" else None
        commands = {"database": server.command} if server is not None else {}
        return cls(
            home=home,
            dags=dags,
            port=port,
            environment=_environment(home, dags, (port, workers, triggerer), server),
            commands=commands | {name: [str(AIRFLOW), name] for name in COMPONENTS},
            server=server,
        )


def _environment(
    home: Path, dags: Path, ports: tuple[int, int, int], server: Server | None
) -> dict[str, str]:
    """Return the variables with which all of Airflow's processes are started."""
    import flow_airflow
    import flow_core

    base = airflow_server.environment(home, dags, *ports)
    packages = [Path(one.__path__[0]).parent for one in (flow_airflow, flow_core)]
    ours = {
        "PYTHONPATH": os.pathsep.join(str(one) for one in packages),
        "AIRFLOW__CORE__PARALLELISM": "24",
        # Its plugin need not look for somebody to tell things to at the start of each worker.
        "AIRFLOW__OPENLINEAGE__DISABLED": "True",
        # A worker that was killed is missed after a quarter of a minute, not after five.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "15",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
        # … and so is a scheduler.
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "12",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "5",
        "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "3",
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "3",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "8",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "FLOW_LOCAL_HOME": str(home / "flow"),
        "FLOW_LOCAL_GPUS": "4",
    }
    if server is not None:
        ours["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] = server.url("psycopg2")
        ours["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC"] = server.url("asyncpg")
    kept = {name: value for name, value in base.items() if not name.startswith(("FLOW_", "PYTEST"))}
    return kept | ours
