"""Where measurements are shown: tables in the Markdown pages, between markers, and one on the terminal."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks.md"


def marker(target: str) -> str:
    """The line before and after what a make target writes."""
    return f"<!-- tables of make {target} -->"


def replace(page: Path, target: str, text: str) -> None:
    """Replace what lies between a target's markers. Raises ValueError for a page without them."""
    line = re.escape(marker(target))
    found = re.compile(f"({line}\n).*?(?={line})", re.DOTALL)
    page_text, count = found.subn(lambda match: f"{match[1]}\n{text.strip()}\n\n", page.read_text())
    if count != 1:
        raise ValueError(f"{page} must hold the line {marker(target)} twice, and nothing else between them")
    page.write_text(page_text)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine() -> str:
    """What it was measured on."""
    return (
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.system()}, "
        f"load average {os.getloadavg()[0]:.1f} at the end."
    )


def show(title: str, rows: Sequence[tuple[str, ...]], *, target: str, page: Path | None) -> None:
    """Print rows of (what, measured), and write them into a page."""
    table = Table("what", "measured", title=title)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(machine())
    if page is not None:
        replace(page, target, f"{markdown(['what', 'measured'], rows)}\n{machine()}")
