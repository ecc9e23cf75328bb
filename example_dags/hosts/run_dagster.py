"""Run the Dagster example in a Dagster instance of its own.

python -m example_dags.hosts.run_dagster HOME PICTURE OUT
"""

from __future__ import annotations

import importlib.util
import os
import time
from types import ModuleType

import dagster as dg

from example_dags.hosts.outcome import DAGS, Order, Outcome, say


def load(name: str) -> ModuleType:
    """Import a file of the example; its folder has the name of a package and stays off sys.path."""
    spec = importlib.util.spec_from_file_location(name, DAGS / "dagster" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    order = Order.from_command_line()
    home = order.home / "dagster"
    home.mkdir(parents=True)
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    os.environ["DAGSTER_HOME"] = str(home)
    job = load("digits_defs").defs.resolve_job_def("digits")
    config = dg.RunConfig(ops={"report": {"config": {"picture": str(order.picture)}}})
    with dg.DagsterInstance.get() as instance:
        say("running the assets settings, sweep, best and report")
        started = time.time()
        result = job.execute_in_process(run_config=config, instance=instance)
        ended = time.time()
        results, report = result.output_for_node("sweep"), result.output_for_node("report")
    Outcome(dg.__version__, results, report, started, ended).write(order.out)


if __name__ == "__main__":
    main()
