"""Records to tables: medians over rounds, the spread of the ratios, and who could not be measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.benchmarks import pages

Record = dict[str, Any]
Lines = list[list[str]]

#: Rows in which a rate says more than a time.
RATES = {"no-op calls one by one", "map over 10,000", "stateful calls, pipelined"}
#: Figures that others publish, which nobody here has measured.
CITED = {"no-op calls one by one": ["Flame, as published", "", "9,124 /s", "", "30,000 calls, one node"]}
HEAD = ["what", "system", "median", "x floor", "smallest to largest", "note"]
MEMORY_HEAD = ["system", "with two workers", "each further idle worker", "1,000 calls that wait"]


def lines(records: list[Record]) -> Lines:
    """One line for each row and system, fastest first within a row."""
    grouped: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if "row" in record:
            grouped[record["row"]][record["system"]].append(record)
    out: Lines = []
    for row, systems in grouped.items():
        ordered = sorted(
            systems.items(), key=lambda item: statistics.median(one["seconds"] for one in item[1])
        )
        out += [line(row, system, samples) for system, samples in ordered]
        if row in CITED:
            name, *rest = CITED[row]
            out.append([row, name, rest[1], "", "", rest[3]])
    return out


def line(row: str, system: str, samples: list[Record]) -> list[str]:
    """One system in one row."""
    median = statistics.median(one["seconds"] for one in samples)
    ratios = [one["seconds"] / one["floor_s"] for one in samples if one["floor_s"]]
    if row in RATES:
        rates = [1 / one["seconds"] for one in samples]
        spread, shown = f"{min(rates):,.0f} to {max(rates):,.0f} /s", f"{1 / median:,.0f} /s"
    else:
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        shown = duration(median)
    return [row, system, shown, f"{statistics.median(ratios):.2f}" if ratios else "", spread, note(samples)]


def note(samples: list[Record]) -> str:
    """What else is known of a line."""
    said = []
    if samples[0]["calls"] > 1:
        said.append(f"{samples[0]['calls']:,} calls")
    for name, values in facts(samples):
        median = statistics.median(values)
        if name == "faults" and median:
            said.append(f"{median:,.0f} page faults")
        elif name == "p99_s":
            said.append(f"99 % within {duration(median)}")
        elif name == "ordered" and not all(values):
            said.append("not in order")
    return ", ".join(said)


def facts(samples: list[Record]) -> Iterator[tuple[str, list[float]]]:
    """The further figures of samples, each with its values."""
    for name in samples[0]["facts"]:
        yield name, [one["facts"][name] for one in samples]


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def memory_lines(records: list[Record]) -> Lines:
    """One line for each system whose memory was measured."""
    return [
        [
            record["memory"],
            f"{record['bytes']['two_workers'] / 2**20:.1f} MiB",
            f"{record['bytes']['worker'] / 2**20:.1f} MiB",
            f"{record['bytes']['thousand_calls'] / 2**20:.2f} MiB",
        ]
        for record in records
        if "memory" in record
    ]


def failures(records: list[Record]) -> Lines:
    """What could not be measured, and why."""
    return [[record["failed"], record["why"]] for record in records if "failed" in record]


def all_tables(records: list[Record]) -> Iterator[tuple[str, list[str], Lines]]:
    """Title, head and lines of every table that has any."""
    yield "Calls on two warm workers", HEAD, lines(records)
    yield "Memory (proportional set size, client and workers)", MEMORY_HEAD, memory_lines(records)
    if failures(records):
        yield "Not measured here", ["what", "why"], failures(records)


def tables(records: list[Record]) -> Iterator[Table]:
    """The tables for a terminal."""
    for title, head, body in all_tables(records):
        table = Table(*head, title=title)
        last = ""
        for row in body:
            table.add_row(*(row if row[0] != last else ["", *row[1:]]))
            last = row[0]
        yield table


def write(path: Path, records: list[Record]) -> None:
    """Replace what lies between the markers of a Markdown file by the tables."""
    parts = [f"### {title}\n\n{pages.markdown(head, body)}" for title, head, body in all_tables(records)]
    pages.replace(path, "bench-sessions", "\n".join([*parts, pages.machine()]))
