"""What an Airflow for the tests consists of: its processes, their settings and the database they share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from example_dags.hosts import airflow_server
from example_dags.hosts.airflow_server import AIRFLOW, COMPONENTS
from tests.infra.postgres import Server
from tests.infra.redis import broker_command

Database = Literal["sqlite", "postgresql"]
Executor = Literal["LocalExecutor", "CeleryExecutor"]

HERE = Path(__file__).resolve().parent
DAGS = HERE / "dags"

_URL = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"


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
        cls,
        home: Path,
        *,
        database: Database = "sqlite",
        executor: Executor = "LocalExecutor",
        dags: Path = DAGS,
        port: int | None = None,
    ) -> Deployment:
        """Choose ports and make the database server's files, but start nothing. Raises Unavailable."""
        free, workers, triggerer, database_port, broker_port, *worker_ports = airflow_server.free_ports(7)
        port = port or free
        commands = {name: [str(AIRFLOW), name] for name in COMPONENTS}
        variables: dict[str, str] = {}
        if executor == "CeleryExecutor":
            broker = broker_command(broker_port, home)
            commands = {"broker": broker} | commands | _celery_workers(worker_ports)
            variables = _celery_variables(broker_port)
        server = Server.prepare(database_port) if database == "postgresql" else None
        if server is not None:
            commands = {"database": server.command} | commands
        else:
            # A request that logs what it does holds up the API server's event loop while it waits for SQLite's lock,
            # and with it the request that holds the lock: until this time is over, which others must outwait.
            commands["api-server"] = ["env", f"{_URL}={_sqlite(home, timeout_s=2)}", *commands["api-server"]]
        return cls(
            home=home,
            dags=dags,
            port=port,
            environment=_environment(home, dags, (port, workers, triggerer), server) | variables,
            commands=commands,
            server=server,
        )


def _celery_workers(log_ports: list[int]) -> dict[str, list[str]]:
    return {
        f"worker-{number}": [
            *("env", f"AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT={log_port}"),
            *(str(AIRFLOW), "celery", "worker", "--concurrency", "4"),
            *("--celery-hostname", f"worker-{number}@%h", "--pid", f"celery-{number}.pid"),
        ]
        for number, log_port in enumerate(log_ports, start=1)
    }


def _celery_variables(broker_port: int) -> dict[str, str]:
    return {
        "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
        "AIRFLOW__CELERY__BROKER_URL": f"redis://127.0.0.1:{broker_port}/0",
        "AIRFLOW__CELERY__RESULT_BACKEND": f"redis://127.0.0.1:{broker_port}/1",
        "C_FORCE_ROOT": "1",  # Celery refuses root otherwise
    }


def _sqlite(home: Path, *, timeout_s: int) -> str:
    return f"sqlite:///{home}/airflow.db?timeout={timeout_s}"


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
        "AIRFLOW__CORE__PARALLELISM": "40",
        # So many on two cores are served late. A worker that gives up after the usual 5 s only asks once more.
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "30",
        # Its plugin need not look for somebody to tell things to at the start of each worker.
        "AIRFLOW__OPENLINEAGE__DISABLED": "True",
        # A worker that was killed is missed after half a minute, not after five.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
        # … and so is a scheduler. Sooner would be too soon: on a busy machine the living one gives itself up.
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "45",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
        "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "3",
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "3",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "8",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "FLOW_LOCAL_HOME": str(home / "flow"),
        "FLOW_LOCAL_GPUS": "4",
    }
    if server is None:
        ours[_URL] = _sqlite(home, timeout_s=60)
        # With a pool, the API server's threads wait for a connection that others hold until one of them is free.
        ours["AIRFLOW__DATABASE__SQL_ALCHEMY_POOL_ENABLED"] = "False"
    else:
        ours[_URL] = server.url("psycopg2")
        ours[f"{_URL}_ASYNC"] = server.url("asyncpg")
    kept = {name: value for name, value in base.items() if not name.startswith(("FLOW_", "PYTEST"))}
    return kept | ours
