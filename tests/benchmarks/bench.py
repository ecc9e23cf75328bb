"""What the engine costs, beside a floor and beside peers, all in one interleaved run: ``make bench``.

Every row is measured once per round, in an order that turns with the rounds, and divided by the floor of the same
round (a bare ``python -I -S -c pass``), so that a machine that slows down slows both. Medians are printed with the
smallest and largest ratio. Seconds are this machine's at this moment; the ratios are what can be compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.table import Table

NOOP = "def noop():\n    return None\n"


@dataclass
class Row:
    """One thing that is measured: `once` does it and returns seconds."""

    name: str
    once: Callable[[], float]
    seconds: list[float] = field(default_factory=list)


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def python(*flags: str) -> Callable[[], float]:
    return lambda: timed(lambda: subprocess.run([sys.executable, *flags], check=True))


def noop() -> None:
    """What the peers call."""


def fresh_pool() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(noop).result()


def rows(home: Path) -> list[Row]:
    from flow_core import Flow

    flow = Flow("local", local={"home": str(home), "gpus": 4}, objects={"home": str(home / "objects")})
    large = flow.objects.put(pickle.PickleBuffer(bytearray(100_000_000)), codec="pickle")
    module = home / "noop.py"
    module.write_text(NOOP)
    measured = [
        Row("floor: python -I -S -c pass", python("-I", "-S", "-c", "pass")),
        Row("python -c pass", python("-c", "pass")),
        Row("python -c 'import flow_core'", python("-c", "import flow_core")),
        Row("python -c 'from flow_core import invoke'", python("-c", "from flow_core import invoke")),
        Row("run(['true']): submit alone", lambda: timed(lambda: flow.run(["true"], upload_code=False))),
        Row(
            "run(['true']): submit to end",
            lambda: timed(lambda: flow.run(["true"], upload_code=False).wait()),
        ),
        Row(
            "run(['true'], gpu='a100'): to end",
            lambda: timed(lambda: flow.run(["true"], gpu="a100", upload_code=False).wait()),
        ),
        Row("invoke a no-op from a file", lambda: timed(lambda: flow.invoke(module, "noop"))),
        Row("call a live no-op (cloudpickle)", lambda: timed(lambda: flow.call_async(noop).get_result())),
        Row(
            "the same, given 100 MB by reference",
            lambda: timed(lambda: flow.call_async(len, [large]).get_result()),
        ),
        Row("peer: a fresh spawn pool", lambda: timed(fresh_pool)),
    ]
    return measured + peers(home)


def peers(home: Path) -> list[Row]:
    """Those that are installed beside us."""
    found = []
    if importlib.util.find_spec("executorlib") is not None:
        import executorlib

        fresh = executorlib.SingleNodeExecutor()  # a process for each call
        found.append(Row("peer: executorlib", lambda: timed(lambda: fresh.submit(noop).result())))
    if importlib.util.find_spec("submitit") is not None:
        import submitit

        executor = submitit.LocalExecutor(folder=home / "submitit")
        found.append(Row("peer: python -c 'import submitit'", python("-c", "import submitit")))
        found.append(Row("peer: submitit local", lambda: timed(lambda: executor.submit(noop).result())))
    return found


def modules(statement: str) -> int:
    """How many modules a statement loads that Python has not loaded before."""
    code = f"import sys; before = set(sys.modules); {statement}; print(len(set(sys.modules) - before))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def interleaved(measured: list[Row], rounds: int, console: Console) -> None:
    for row in measured:
        row.once()  # caches are warm, the runner is installed
    for number in range(rounds):
        if console.is_terminal:
            console.print(f"round {number + 1} of {rounds}", end="\r")
        for row in measured[number % len(measured) :] + measured[: number % len(measured)]:
            row.seconds.append(row.once())


def table(measured: list[Row]) -> Table:
    floor = measured[0].seconds
    out = Table(
        "what", "median ms", "x floor", "smallest to largest", title="One call, each in its own process"
    )
    for row in measured:
        ratios = [one / base for one, base in zip(row.seconds, floor, strict=True)]
        out.add_row(
            row.name,
            f"{statistics.median(row.seconds) * 1000:.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        )
    return out


def crowd(home: Path, count: int) -> dict[str, str]:
    """Many tasks on four simulated GPUs."""
    from flow_core import Flow

    flow = Flow("local", local={"home": str(home), "gpus": 4})
    holders = [flow.run("sleep 1000", gpu="a100", upload_code=False) for _ in range(4)]
    begin = time.perf_counter()
    ids = [flow.run(["true"], gpu="a100", upload_code=False).task_id for _ in range(count)]
    submitted = time.perf_counter() - begin
    time.sleep(1.0)
    memory = waiting_memory_bytes(home)
    begin = time.perf_counter()
    flow.poll(ids)
    polled = time.perf_counter() - begin
    begin, late = time.perf_counter(), time.time()
    flow.cancel([one.task_id for one in holders])
    flow.engine.wait(ids)
    ran, noticed = time.perf_counter() - begin, time.time()
    last = max(json.loads(path.read_text())["ended_at"] for path in home.glob("tasks/*/1/exit.json"))
    assert last >= late
    return {
        f"submitting {count} tasks": f"{submitted / count * 1000:.1f} ms each",
        f"{count} waiting tasks: memory of each (proportional set size)": f"{memory / count / 2**20:.1f} MiB",
        f"one poll of {count} waiting tasks": f"{polled * 1000:.1f} ms",
        f"{count} queued no-ops on 4 GPUs": f"{count / ran:.0f} tasks/s",
        "last end to wait() returning": f"{(noticed - last) * 1000:.0f} ms",
    }


def waiting_memory_bytes(home: Path) -> int:
    """What all processes of the tasks under a home take, shared pages divided among those that share them."""
    needle, total = b"FLOW_TASK_DIR=" + os.fsencode(home), 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and needle in (entry / "environ").read_bytes():
                rollup = (entry / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
        except OSError:
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tasks", type=int, default=300)
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="flow-bench-") as folder:
        home = Path(folder).resolve()
        measured = rows(home)
        interleaved(measured, options.rounds, console)
        console.print(table(measured))
        (home / "crowd").mkdir()
        many = Table("what", "measured", title="Many tasks")
        for name, value in crowd(home / "crowd", options.tasks).items():
            many.add_row(name, value)
        console.print(many)
    loaded = Table("statement", "modules that it loads")
    for name in ("flow_core", "submitit"):
        if importlib.util.find_spec(name) is not None:
            loaded.add_row(f"import {name}", str(modules(f"import {name}")))
    loaded.add_row("from flow_core import invoke", str(modules("from flow_core import invoke")))
    console.print(loaded)
    load = os.getloadavg()[0]
    console.print(
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load average {load:.1f} at the end"
    )


if __name__ == "__main__":
    main()
