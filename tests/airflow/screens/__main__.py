"""Takes the documentation's pictures anew: ``make screenshots``. Starts an Airflow, a sweep on it and a browser."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from tests.airflow.deployment import Deployment
from tests.airflow.harness import running_airflow
from tests.infra import packages

HERE = Path(__file__).resolve().parent
#: Airflow 3.3.2's form sends port 0 for none, and its server then takes the connection for another than the stored one.
CONNECTION = {
    "port": 0,
    "connection_id": "gpus",
    "conn_type": "flow",
    "description": "The GPUs of this machine",
    "extra": '{"provider": "local"}',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="a Python that has selenium")
    parser.add_argument("--folder", type=Path, required=True, help="where the pictures go")
    options = parser.parse_args()
    packages.install(packages.BROWSER)
    options.folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="flow-airflow-") as home,
        running_airflow(Deployment.plan(Path(home), dags=HERE / "dags")) as airflow,
    ):
        airflow.api("POST", "/connections", CONNECTION)
        run = airflow.trigger("training")
        state = run.ended()
        assert state == "success", str(run)
        command = [options.python, HERE / "shoot.py", airflow.url, run.run_id, options.folder]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
