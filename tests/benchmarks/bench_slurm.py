"""Many tasks on a real Slurm, as an array and one by one, and one call next to submitit's: ``make bench-slurm``.

The cluster is that of the tests with accounting (`tests/infra`): a controller, three nodes with simulated GPUs and a
database, all on this machine, so the processors are shared and Slurm itself is what takes most of the time. Calls are
counted where Slurm's tools are started. The systems of a comparison take turns within each round.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import submitit

from flow_core import Flow
from flow_core.runner import slurm_tools as tools
from tests.benchmarks import pages
from tests.infra import packages
from tests.infra.lab import Lab
from tests.infra.slurm import AccountedCluster

Lines = list[tuple[str, ...]]


def add(one: int, other: int) -> int:
    return one + other


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the starts of each of Slurm's tools."""
    calls: Counter[str] = Counter()
    original = tools.tool

    def tool(argv: list[str], *, deadline_s: float, cwd: str | None = None) -> tuple[int, str, str]:
        calls[argv[0]] += 1
        return original(argv, deadline_s=deadline_s, cwd=cwd)

    tools.tool = tool
    try:
        yield calls
    finally:
        tools.tool = original


# --- many tasks ------------------------------------------------------------------------------------------------------


def measured(flow: Flow, what: str, count: int, submit: Callable[[], list[str]]) -> Lines:
    """Submit `count` no-ops in one way and wait for all of them."""
    with counted() as calls:
        begin = time.perf_counter()
        ids = submit()
        submitted = time.perf_counter() - begin
        ends = flow.wait(ids, timeout=3600)
        wall = time.perf_counter() - begin
    assert len(ends) == count and all(end.exit_code == 0 for end in ends.values())
    said = ", ".join(f"{number} {name}" for name, number in sorted(calls.items()))
    return [
        (f"{count} tasks, {what}: submitting", f"{submitted:.2f} s"),
        ("… until all have ended", f"{wall:.1f} s, {count / wall:.0f} tasks/s"),
        ("… calls per task", f"{sum(calls.values()) / count:.2f} ({said})"),
    ]


def many_tasks(flow: Flow, count: int) -> Lines:
    def single(_number: int) -> str:
        return flow.run(["true"], upload_code=False).task_id

    def array() -> list[str]:
        return [task.task_id for task in flow.run_many([["true"]] * count, upload_code=False)]

    def one_by_one() -> list[str]:
        return [single(number) for number in range(count)]

    def by_threads() -> list[str]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(single, range(count)))

    return [
        *measured(flow, "one array", count, array),
        *measured(flow, "one by one", count, one_by_one),
        *measured(flow, "8 threads", count, by_threads),
    ]


# --- one call, next to submitit --------------------------------------------------------------------------------------


def ours(flow: Flow) -> Callable[[], None]:
    def call() -> None:
        assert flow.call_async(add, (40, 2)).get_result() == 42

    return call


def ours_many(flow: Flow, count: int) -> Callable[[], None]:
    def calls() -> None:
        flow.wait([task.task_id for task in flow.run_many([["true"]] * count, upload_code=False)])

    return calls


def theirs(executor: submitit.AutoExecutor, *, eager: bool) -> Callable[[], None]:
    """Submit one call; `eager` looks for its end all the time, in place of once a second as `result()` does."""

    def call() -> None:
        job = executor.submit(add, 40, 2)
        while eager and not job.paths.result_pickle.exists():
            time.sleep(0.01)
        assert job.result() == 42

    return call


def theirs_many(executor: submitit.AutoExecutor, count: int) -> Callable[[], None]:
    def calls() -> None:
        jobs = executor.map_array(add, range(count), range(count))
        assert [job.result() for job in jobs] == [2 * number for number in range(count)]

    return calls


def beside_submitit(flow: Flow, folder: Path, rounds: int, width: int) -> Lines:
    """Take turns; the time is from the call to its value, as a user waits for it."""
    executor = submitit.AutoExecutor(folder=folder / "submitit", cluster="slurm")
    executor.update_parameters(timeout_min=5, slurm_mem="100M", slurm_array_parallelism=1000)
    contenders: list[tuple[str, Callable[[], None]]] = [
        ("one call: flow_core", ours(flow)),
        ("one call: submitit", theirs(executor, eager=False)),
        ("one call: submitit, its end looked for every 10 ms", theirs(executor, eager=True)),
        (f"array of {width}: flow_core (commands)", ours_many(flow, width)),
        (f"array of {width}: submitit (calls)", theirs_many(executor, width)),
    ]
    samples: dict[str, list[float]] = {name: [] for name, _ in contenders}
    for number in range(rounds + 1):
        turn = number % len(contenders)
        for name, call in contenders[turn:] + contenders[:turn]:
            begin = time.perf_counter()
            call()
            if number:  # the first round fills caches
                samples[name].append(time.perf_counter() - begin)
    return [
        (name, f"{statistics.median(one):.2f} s ({min(one):.2f} to {max(one):.2f}, n={len(one)})")
        for name, one in samples.items()
    ]


# --- all of it -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=50)
    parser.add_argument("--docs", type=Path, help="the page that the table goes to", default=pages.BENCHMARKS)
    options = parser.parse_args()
    logging.getLogger("submitit").setLevel(logging.ERROR)
    packages.install(packages.SSH, packages.SLURM, packages.ACCOUNTING)
    with ExitStack() as stack:
        lab = stack.enter_context(closing(Lab()))
        stack.enter_context(lab.entered())
        os.environ.update(AccountedCluster(lab).env)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flow-bench-", dir="/var/tmp")))
        flow = Flow("slurm", slurm={"home": str(folder / "home"), "memory": "100M"})
        lines = [
            *beside_submitit(flow, folder, options.rounds, options.width),
            *many_tasks(flow, options.tasks),
        ]
    pages.show("Slurm", lines, target="bench-slurm", page=options.docs)


if __name__ == "__main__":
    main()
