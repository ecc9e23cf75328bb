"""How long it takes until a fault is noticed: ``make bench-faults`` runs the fault tests and writes docs/faults.md.

The tests assert what is noticed; this collects when. What is printed is this machine's at this moment, with the
timings of the test cluster: a real one has a SlurmdTimeout of 300 s, not of 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import pages
from tests.infra import notice

TESTS = ("tests/ssh/test_faults.py", "tests/ssh/test_pool_faults.py", "tests/slurm/test_faults.py")

Row = dict[str, Any]


def measured() -> list[Row]:
    """Run the tests and return what they have noted."""
    with tempfile.TemporaryDirectory(prefix="flow-faults-") as folder:
        notes = Path(folder) / "times"
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
        subprocess.run(command, cwd=pages.ROOT, env={**os.environ, notice.VARIABLE: str(notes)}, check=True)
        return [json.loads(line) for line in notes.read_text().splitlines()]


def tables(rows: list[Row]) -> str:
    """Return one table for each back end: a line for each fault, a column for each question."""
    shown = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == provider]
        questions = list(dict.fromkeys(row["what"] for row in mine))
        lines = []
        for fault in dict.fromkeys(row["fault"] for row in mine):
            cells = [
                cell([row for row in mine if (row["fault"], row["what"]) == (fault, what)])
                for what in questions
            ]
            lines.append([fault, *cells])
        shown.append(f"### {provider}\n\n{pages.markdown(['fault', *questions], lines)}")
    return "\n".join(shown)


def cell(rows: list[Row]) -> str:
    """The slowest of several, and what it was told."""
    if not rows:
        return ""
    slowest = max(rows, key=lambda row: float(row["seconds"]))
    return f"{slowest['seconds']:.1f} s: {OUTCOMES.get(slowest['outcome'], slowest['outcome'])}"


#: What a reader is told in place of the names of our classes.
OUTCOMES = {
    "HostUnreachable": "unavailable",
    "ProviderUnavailable": "unavailable",
    "Snapshot": "last known state",
    "LogChunk": "the log",
    "NoneType": "done",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--docs", type=Path, default=pages.ROOT / "docs" / "faults.md", help="where the tables go"
    )
    parser.add_argument("--notes", type=Path, help="take these measurements, and run nothing")
    options = parser.parse_args()
    rows = (
        [json.loads(line) for line in options.notes.read_text().splitlines()] if options.notes else measured()
    )
    text = tables(rows)
    pages.replace(options.docs, "bench-faults", f"{text}\n{pages.machine()}")
    print(text)


if __name__ == "__main__":
    main()
