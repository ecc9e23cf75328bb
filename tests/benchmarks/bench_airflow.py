"""Waiting in the triggerer at scale, and what a task costs, in a whole Airflow: ``make bench-airflow``.

Two parts, each measured in the real scheduler, triggerer, DAG processor and API server, with SQLite and LocalExecutor:

- *waiting*: so many mapped tasks wait at once. Requests are counted by the back end that answers them (ours), or by the
  client (SSH); for files they follow from the interval. The loop's lag, the triggerer's memory and its processor time
  are those of a quiet window; then a few tasks end, one after the other, while the others wait.
- *overhead*: DAG runs of the same few tasks that do nothing, in turn, round after round; the run's length through the
  number of tasks.

Results are written after each step, so that a run that is cut short has said what it knows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from example_dags.hosts.airflow_server import AirflowServer
from tests.benchmarks import airflow_report as report
from tests.benchmarks.airflow_parts import provider
from tests.benchmarks.airflow_parts.notes import FOLDER, SERVER
from tests.benchmarks.airflow_waiting import Files, FlowTasks, Remote, SSHJobs, measure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
console = Console()

KINDS = ("bash", "python", "external_python", "virtualenv", "flow_command", "flow_function", "flow_deferred")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1000, help="how many wait at once (default 1000)")
    parser.add_argument("--few", type=int, default=100, help="how many for comparison (default 100)")
    parser.add_argument(
        "--ssh-tasks", type=int, default=50, help="how many wait by SSHRemoteJobOperator's trigger"
    )
    parser.add_argument(
        "--interval", type=float, default=5.0, help="seconds between two looks, for all (default 5)"
    )
    parser.add_argument("--window", type=float, default=25.0, help="how long it is quiet (default 25 s)")
    parser.add_argument("--ends", type=int, default=12, help="how many tasks end while the others wait")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the overhead (default 5)")
    parser.add_argument("--overhead-tasks", type=int, default=8, help="tasks of each of its DAG runs")
    parser.add_argument("--hold", type=float, default=6.0, help="hold_event_s of the deferred ones")
    parser.add_argument("--minutes", type=float, default=11.0, help="begin nothing new after so long")
    parser.add_argument("--only", choices=["waiting", "overhead"])
    parser.add_argument("--json", type=Path, help="write all samples there, after each step")
    parser.add_argument("--docs", type=Path, help="replace the tables in this Markdown file")
    return parser.parse_args()


class Results:
    """What is known so far, on disk after each step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = time.monotonic()
        self.records: list[dict[str, Any]] = []

    def add(self, **record: Any) -> None:
        self.records.append(record)
        if self.options.json is not None:
            self.options.json.write_text(json.dumps(self.records, indent=1))

    def publish(self) -> None:
        """Print the tables, and put them into the documentation where that was asked for."""
        for table in report.tables(self.records):
            console.print(table)
        if self.options.docs is not None:
            report.write(self.options.docs, self.records)

    @property
    def late(self) -> bool:
        return bool(time.monotonic() - self.began > self.options.minutes * 60)

    def attempt(self, what: str, do: Callable[[], Any]) -> None:
        """Do a step; one that fails, or for which there is no time, is among the results."""
        if self.late:
            self.add(failed=what, why="there was no time left")
            return
        began = time.monotonic()
        try:
            do()
        except (RuntimeError, OSError, AssertionError, LookupError) as error:
            self.add(failed=what, why=f"{type(error).__name__}: {error}".splitlines()[0][:200])
        console.print(
            f"[dim]{time.monotonic() - self.began:5.0f} s[/]  {what}: {time.monotonic() - began:.0f} s"
        )


@contextmanager
def airflow(folder: Path, variables: dict[str, str]) -> Iterator[AirflowServer]:
    """A whole Airflow for the benchmark's DAGs."""
    home = folder / "airflow"
    home.mkdir()
    server = AirflowServer(home, HERE / "airflow_dags")
    path = [str(ROOT), str(ROOT / "integrations"), str(folder / "site")]
    server.environment.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # users' workers do not compile our files each time
    server.environment |= {
        "PYTHONPATH": os.pathsep.join(path),
        "AIRFLOW__TRIGGERER__CAPACITY": "1200",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "3",
        "AIRFLOW__CORE__MAX_MAP_LENGTH": "1200",
        FOLDER: str(folder),
        "FLOW_PROVIDER": "local",
        "FLOW_LOCAL_HOME": str(folder / "flow"),
        **variables,
    }
    try:
        server.start(lambda text: console.print(f"[dim]{text}[/]"))
        yield server
    finally:
        server.stop()


def waiting(server: AirflowServer, results: Results, sizes: list[tuple[Remote, int]]) -> None:
    """Measure every way to wait."""
    server.api("POST", "/dags/probe/dagRuns", {"logical_date": None})
    options = results.options
    for remote, count in sizes:
        results.attempt(
            f"{count} waiting, {remote.title}",
            lambda remote=remote, count=count: results.add(  # type: ignore[misc]
                waiting=remote.title,
                tasks=count,
                **measure(
                    server,
                    remote,
                    count,
                    window_s=options.window,
                    ends=options.ends,
                    interval_s=options.interval,
                ),
            ),
        )


def overhead(server: AirflowServer, results: Results) -> None:
    """Run every kind once per round, in an order that turns; the first round is a warm-up."""
    for number in range(results.options.rounds + 1):
        turn = number % len(KINDS)
        for kind in (*KINDS[turn:], *KINDS[:turn]):
            if results.late:  # fewer rounds
                results.add(failed=f"overhead from round {number} on", why="there was no time left")
                return
            results.attempt(
                f"round {number}, {kind}" if number else f"warm-up, {kind}",
                lambda kind=kind, number=number: one_run(server, results, kind, number),  # type: ignore[misc]
            )


def one_run(server: AirflowServer, results: Results, kind: str, number: int) -> None:
    dag_id = f"overhead_{kind}"
    run_id = server.run(dag_id, {}, timeout_s=180)
    run = server.api("GET", f"/dags/{dag_id}/dagRuns/{run_id}")
    seconds = report.seconds_between(run["start_date"], run["end_date"])
    if number:
        results.add(overhead=kind, round=number, seconds=seconds / results.options.overhead_tasks)


def everything(options: argparse.Namespace, results: Results, stack: ExitStack) -> None:
    """Start what is needed and measure both parts."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flow-bench-airflow-")))
    (folder / "noop.py").write_text("def noop(number):\n    return number\n")
    provider.install(folder / "site")
    ssh = SSHJobs(folder, options.ssh_tasks)
    stack.callback(ssh.close)
    flow = FlowTasks(options.tasks)
    sizes: list[tuple[Remote, int]] = [
        (flow, options.few),
        (flow, options.tasks),
        (Files(folder), options.tasks),
        (ssh, options.ssh_tasks),
    ]
    if ssh.missing:
        results.add(failed=ssh.title, why=ssh.missing)
        sizes.pop()
    variables = {
        SERVER: flow.back_end.address,
        "FLOW_BENCH_INTERVAL_S": str(options.interval),
        "FLOW_BENCH_WAITING": " ".join(f"{remote.system}:{count}" for remote, count in sizes),
        "FLOW_BENCH_OVERHEAD": str(options.overhead_tasks),
        "FLOW_BENCH_HOLD_S": str(options.hold),
        **ssh.variables,
    }
    server = stack.enter_context(airflow(folder, variables))
    if options.only != "overhead":
        waiting(server, results, sizes)
    if options.only != "waiting":
        overhead(server, results)


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # all that was started is taken away
    results = Results(options)
    results.add(options={name: str(value) for name, value in vars(options).items()})
    try:
        with ExitStack() as stack:
            everything(options, results, stack)
    finally:
        results.publish()


if __name__ == "__main__":
    main()
