"""Records of the Airflow benchmark to tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.benchmarks import pages

Record = dict[str, Any]
Lines = list[list[str]]

WAITING_HEAD = [
    *("who waits", "tasks", "requests a minute", "loop lag p50 / p99 / max", "cores"),
    *("memory", "end to event", "end to execute_complete"),
]
OVERHEAD_HEAD = ["a task that does nothing", "median", "x BashOperator", "smallest to largest"]
NAMES = {
    "bash": "BashOperator",
    "python": "@task",
    "external_python": "@task.external_python",
    "virtualenv": "@task.virtualenv, cached",
    "flow_command": "FlowGPUOperator, a command",
    "flow_function": "FlowGPUOperator, a function",
    "flow_deferred": "FlowGPUOperator, deferred at once",
}


def seconds_between(begin: str, end: str) -> float:
    """Return the time between two moments as Airflow writes them."""
    first, last = (datetime.fromisoformat(one.replace("Z", "+00:00")) for one in (begin, end))
    return (last - first).total_seconds()


def waiting_lines(records: list[Record]) -> Lines:
    """One line for each way to wait."""
    return [
        [
            one["waiting"],
            f"{one['tasks']:,}",
            f"{one['requests_per_minute']:,.0f}" + ("" if one["counted"] else " (computed)"),
            " / ".join(f"{one['lag_ms'][name]:.1f}" for name in ("p50", "p99", "max")) + " ms",
            f"{one['cores']:.2f}",
            f"{one['bytes'] / 2**20:.0f} MiB ({one['bytes'] / one['tasks'] / 1024:.0f} KiB each)",
            _spread(one["until_fired_s"], one["ended"]),
            _spread(one["until_resumed_s"], one["ended"]),
        ]
        for one in records
        if "waiting" in one
    ]


def _spread(seconds: list[float], ended: int) -> str:
    if len(seconds) < ended:
        return f"{len(seconds)} of {ended} in time"
    return f"{statistics.median(seconds):.1f} s (to {max(seconds):.1f})"


def overhead_lines(records: list[Record]) -> Lines:
    """One line for each kind of task; ratios are those of one round."""
    rounds: dict[int, dict[str, float]] = {}
    for one in records:
        if "overhead" in one:
            rounds.setdefault(one["round"], {})[one["overhead"]] = one["seconds"]
    lines = []
    for kind, name in NAMES.items():
        seconds = [one[kind] for one in rounds.values() if kind in one]
        ratios = [one[kind] / one["bash"] for one in rounds.values() if kind in one and "bash" in one]
        if seconds and ratios:
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            ratio = f"{statistics.median(ratios):.2f}"
            lines.append([name, f"{statistics.median(seconds):.2f} s", ratio, spread])
    return lines


def all_tables(records: list[Record]) -> Iterator[tuple[str, list[str], Lines]]:
    """Title, head and lines of every table that has any."""
    failures = [[one["failed"], one["why"]] for one in records if "failed" in one]
    for title, head, lines in (
        ("Waiting on one triggerer", WAITING_HEAD, waiting_lines(records)),
        ("Overhead of a task", OVERHEAD_HEAD, overhead_lines(records)),
        ("Not measured", ["what", "why"], failures),
    ):
        if lines:
            yield title, head, lines


def tables(records: list[Record]) -> Iterator[Table]:
    """The tables for a terminal."""
    for title, head, lines in all_tables(records):
        table = Table(*head, title=title)
        for row in lines:
            table.add_row(*row)
        yield table


def write(path: Path, records: list[Record]) -> None:
    """Replace what lies between the markers of a Markdown file by the tables."""
    parts = [f"### {title}\n\n{pages.markdown(head, lines)}" for title, head, lines in all_tables(records)]
    parts.append(f"Airflow with SQLite and LocalExecutor. {pages.machine()}")
    pages.replace(path, "bench-airflow", "\n".join(parts))
