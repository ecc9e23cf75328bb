"""What tests see of the simulated GPU machine, and of Prefect's server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import processes_under

PATIENCE_S = 60.0


def until(what: str, seen: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Wait until `seen` returns something true, and return it."""
    deadline = time.monotonic() + patience_s
    while not (found := seen()):
        assert time.monotonic() < deadline, f"waited {patience_s:g} s for: {what}"
        time.sleep(0.05)
    return found


@dataclass(frozen=True)
class Machine:
    """Bodies leave marks, lines in files, where a test can count them."""

    home: Path
    python: Path
    marks: Path
    server: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def mark(self, name: str) -> str:
        """The path of a mark, to give to a task."""
        return str(self.marks / name)

    def count(self, name: str) -> int:
        """How many lines a mark has."""
        path = self.marks / name
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for(self, name: str, count: int = 1) -> None:
        """Wait until a mark has so many lines."""
        until(f"{count} marks {name!r}, seen {self.count(name)}", lambda: self.count(name) >= count)

    def processes(self) -> list[int]:
        """The living processes of all tasks."""
        return processes_under(self.home)

    def execute(self, flow_name: str, **parameters: Any) -> subprocess.Popen[str]:
        """Execute a flow of `flows.py` in a process of its own."""
        import json

        process = subprocess.Popen(
            [sys.executable, "-m", "tests.prefect.flows", flow_name, json.dumps(parameters)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PREFECT_API_URL": self.server},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process
