"""Run the Airflow example in an Airflow of its own.

python -m example_dags.hosts.run_airflow HOME PICTURE OUT
"""

from __future__ import annotations

import time
from importlib.metadata import version

from example_dags.hosts.airflow_server import running_airflow
from example_dags.hosts.outcome import DAGS, Order, Outcome, say


def main() -> None:
    order = Order.from_command_line()
    home = order.home / "airflow"
    home.mkdir(parents=True)
    with running_airflow(home, DAGS / "airflow", say) as airflow:
        say("running the DAG settings >> evaluate >> pick_best >> refit")
        started = time.time()
        run_id = airflow.run("digits", {"picture": str(order.picture)})
        ended = time.time()
        count = len(airflow.xcom("digits", run_id, "settings"))
        results = [airflow.xcom("digits", run_id, "evaluate", index) for index in range(count)]
        report = airflow.xcom("digits", run_id, "refit")
        say("stopping it")
    Outcome(version("apache-airflow"), results, report, started, ended).write(order.out)


if __name__ == "__main__":
    main()
