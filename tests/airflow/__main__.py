"""Try Airflow by hand, with the tests' DAGs or your own: it runs until Ctrl-C, and leaves nothing.

    .venvs/airflow/bin/python -m tests.airflow up --help

Nobody has to log in. Stopping it takes the DAG runs, the logs and the Flow tasks along.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from pathlib import Path
from typing import get_args

from tests.airflow.deployment import DAGS, Database, Deployment, Executor
from tests.airflow.harness import running_airflow
from tests.airflow.matrix import PAGE, page_with_table


def up(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="flow-airflow-") as folder:
        print(f"Starting; the logs of its processes are {folder}/*.out", flush=True)
        deployment = Deployment.plan(
            Path(folder),
            database=arguments.database,
            executor=arguments.executor,
            dags=arguments.dags.resolve(),
            port=arguments.port,
        )
        with running_airflow(deployment) as airflow:
            print(f"Airflow runs at {airflow.url} — Ctrl-C ends it.", flush=True)
            print(f"Flow sees its tasks with FLOW_LOCAL_HOME={airflow.flow_home}", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    return 0


def write_table(_arguments: argparse.Namespace) -> int:
    PAGE.write_text(page_with_table())
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.airflow", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(required=True)
    starts = commands.add_parser("up", help="start Airflow and print its URL")
    starts.add_argument("--database", choices=get_args(Database), default="sqlite")
    starts.add_argument("--executor", choices=get_args(Executor), default="LocalExecutor")
    starts.add_argument("--dags", type=Path, default=DAGS, help="a folder of DAG files (default: the tests')")
    starts.add_argument("--port", type=int, help="the API's port (default: a free one)")
    starts.set_defaults(do=up)
    commands.add_parser("table", help="write the matrix into its page").set_defaults(do=write_table)
    arguments = parser.parse_args()
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.default_int_handler)
    return int(arguments.do(arguments))


if __name__ == "__main__":
    sys.exit(main())
