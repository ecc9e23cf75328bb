"""Run the digits example in Airflow, Prefect and Dagster, and show what came out and what the hosts cost.

    python example_dags/demo.py [--host airflow|prefect|dagster|plain]      (`make demo` sets up what it needs)

Every host runs from its own environment in .venvs/, and its tasks run with a Python that has scikit-learn and nothing
of ours: .venvs/demo stands for a GPU machine. All files are under .demo/, logs included. Nothing is left running.
With --config, the tasks run where that configuration says; the pictures are then on the machines that drew them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from example_dags.hosts.outcome import PROGRESS, Outcome
from flow_core import Flow
from flow_core.models import Snapshot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENVS = ROOT / ".venvs"

HOSTS = ("plain", "airflow", "prefect", "dagster")
ENVIRONMENTS = {"plain": "core"}
TIMEOUT_S = 900.0

DEFINITIONS = """\
wall          from starting the run in the host to its end; starting the host itself is "start-up"
busy          the part of it in which at least one task's command was running
per task      what lies around the tasks: (wall - busy) / tasks. It holds the host's scheduling, storing and passing
              of results, and our submitting, noticing of ends and collecting; "plain" is ours alone, without a host
"""


class DemoError(Exception):
    """Something that the person at the screen must know."""


@dataclass(frozen=True)
class Row:
    """What the table says of one host."""

    host: str
    outcome: Outcome
    tasks: int
    start_up_s: float
    busy_s: float

    @property
    def wall_s(self) -> float:
        return self.outcome.ended - self.outcome.started

    @property
    def overhead_s(self) -> float:
        return (self.wall_s - self.busy_s) / max(1, self.tasks)

    @property
    def numbers(self) -> dict[str, Any]:
        """What must be the same everywhere: all but times and paths."""
        accuracies = {str(one["setting"]): one["fold_accuracies"] for one in self.outcome.results}
        report = {name: value for name, value in self.outcome.report.items() if name != "picture"}
        return {"sweep": accuracies, **report}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", choices=HOSTS, help="run in this host only")
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="for all files (%(default)s)")
    parser.add_argument("--pictures", type=Path, default=HERE / "out", help="for the pictures (%(default)s)")
    parser.add_argument("--config", type=Path, help="run with these settings, not on this machine")
    given = parser.parse_args()
    folder, pictures = given.folder.resolve(), given.pictures.resolve()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        gpus = set_up(folder, pictures, given.config)
        with hold(folder):
            rows = [run(host, folder / host, pictures) for host in ([given.host] if given.host else HOSTS)]
        print("\n" + table(rows) + "\n\n" + DEFINITIONS + gpus)
        print(f"picture       {rows[-1].outcome.report['picture']}")
        check(rows)
    except DemoError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; everything that it started is stopped", file=sys.stderr)
        return 130
    return 0


def set_up(folder: Path, pictures: Path, config: Path | None) -> str:
    """Prepare the folders and the environment of everything that is started; return what to say about GPUs."""
    for name in [name for name in os.environ if name.startswith(("FLOW_", "MITHRIL_"))]:
        del os.environ[name]  # the user's own settings must not send the demo to a cloud
    folder.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONWARNINGS"] = "ignore"
    if config is not None:
        os.environ["FLOW_CONFIG"] = str(config.resolve())
        return f"settings      {config}"
    return set_up_this_machine(folder / "config.yaml")


def set_up_this_machine(config: Path) -> str:
    """Let tasks run here, with the Python of a GPU machine; return what to say about GPUs."""
    python = VENVS / "demo" / "bin" / "python"
    if not python.exists():
        raise DemoError(f"{python} does not exist: `make demo` makes the environments")
    config.write_text("provider: local\n")
    os.environ |= {"FLOW_CONFIG": str(config), "FLOW_LOCAL_PYTHON": str(python)}
    found = real_gpus()
    if found:
        return f"GPUs          {len(found)} real: {found[0]}"
    os.environ["FLOW_LOCAL_GPUS"] = "2"
    return 'GPUs      2 simulated: nvidia-smi finds none here, so `gpu="a100"` only takes a slot'


def hold(folder: Path) -> IO[str]:
    """Return a file that keeps every other demo out of the folder until it is closed. Raises DemoError."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise DemoError(f"another demo works in {folder}; give this one its own with --folder") from error
    return file


def real_gpus() -> list[str]:
    """The names of the GPUs that nvidia-smi finds."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return answer.stdout.split("\n")[:-1]
    return []


def run(host: str, home: Path, pictures: Path) -> Row:
    """Run the example in one host, with all its files in `home`."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    os.environ["FLOW_LOCAL_HOME"] = str(home / "flow")
    python = VENVS / ENVIRONMENTS.get(host, host) / "bin" / "python"
    if not python.exists():
        raise DemoError(f"{python} does not exist: `make demo HOST={host}` makes it")
    order = [str(home), str(pictures / f"digits-{host}.png"), str(home / "outcome.json")]
    print(f"{host}", flush=True)
    begun = time.time()
    before = {task.task_id for task in Flow().list_tasks(1000)}  # none of them is ours to count or to cancel
    with cancelled_tasks(before), (home / "log").open("w") as log:
        watch_script([str(python), "-m", f"example_dags.hosts.run_{host}", *order], log.fileno(), home)
    outcome = Outcome.read(home / "outcome.json")
    ends = [task.snapshot for task in Flow().list_tasks(1000) if task.task_id not in before]
    return Row(host, outcome, len(ends), outcome.started - begun, busy(ends, outcome))


@contextlib.contextmanager
def cancelled_tasks(before: Collection[str]) -> Iterator[None]:
    """Leave no task running but those that were there before, however the host's script ended."""
    try:
        yield
    finally:
        flow = Flow()
        ours = [task for task in flow.list_tasks(1000) if task.task_id not in before]
        live = [task.task_id for task in ours if not task.is_terminal]
        flow.cancel(live)
        for task_id in live:
            flow.get_task(task_id).wait(timeout=60)


def watch_script(command: Sequence[str], log: int, home: Path) -> None:
    """Run a host's script, show its progress and keep the rest in the log. Raises DemoError when it fails."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    timer = threading.Timer(TIMEOUT_S, stop, [process])
    timer.start()
    begun = time.monotonic()
    try:
        with process.stdout:
            for line in process.stdout:
                os.write(log, line.encode())
                if line.startswith(PROGRESS):
                    print(
                        f"  {time.monotonic() - begun:6.1f} s  {line[len(PROGRESS) :].rstrip()}", flush=True
                    )
        code = process.wait()
    finally:
        timer.cancel()
        stop(process)
    if code:
        tail = "".join(f"    {line}\n" for line in (home / "log").read_text().splitlines()[-30:])
        raise DemoError(f"{home.name} ended with exit code {code}. The end of its log:\n{tail}  logs: {home}")
    print(f"  {time.monotonic() - begun:6.1f} s  done", flush=True)


def stop(process: subprocess.Popen[str]) -> None:
    """Take the script and everything in its group away; it gets a moment to stop what it has started elsewhere."""
    for number, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def busy(ends: Sequence[Snapshot], outcome: Outcome) -> float:
    """For how long at least one task was running, in seconds."""
    spans = sorted(
        (seen.started_at.timestamp(), seen.ended_at.timestamp())
        for seen in ends
        if seen.started_at is not None and seen.ended_at is not None
    )
    total, reached = 0.0, outcome.started
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def check(rows: Sequence[Row]) -> None:
    """Raise DemoError unless all hosts have the same numbers."""
    first = rows[0]
    for row in rows[1:]:
        if row.numbers != first.numbers:
            raise DemoError(f"{row.host} and {first.host} disagree:\n  {row.numbers}\n  {first.numbers}")
    if len(rows) > 1:
        settings = len(first.outcome.results)
        print(
            f"agreed    all {len(rows)}: {settings} settings, their fold accuracies, the best one, the confusion matrix"
        )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text in a frame."""
    heads = ("host", "version", "tasks", "accuracy", "start-up", "wall", "busy", "per task")
    lines = [
        (
            row.host,
            row.outcome.version,
            str(row.tasks),
            f"{row.outcome.report['test_accuracy']:.4f}",
            f"{row.start_up_s:.1f} s",
            f"{row.wall_s:.1f} s",
            f"{row.busy_s:.1f} s",
            f"{row.overhead_s * 1000:.0f} ms",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]

    def rule(left: str, middle: str, right: str) -> str:
        return left + middle.join("─" * (width + 2) for width in widths) + right

    def text(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[:2] = [cell.ljust(width) for cell, width in zip(cells[:2], widths, strict=False)]
        return "│ " + " │ ".join(padded) + " │"

    return "\n".join(
        [rule("┌", "┬", "┐"), text(heads), rule("├", "┼", "┤"), *map(text, lines), rule("└", "┴", "┘")]
    )


if __name__ == "__main__":
    sys.exit(main())
