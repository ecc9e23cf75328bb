"""What the benchmark's operators and triggers tell it: lines in files that all of Airflow's processes share."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flow_core.ids import TaskId

#: The folder of the notes, of what stands for remote work, and the address of the back end that counts.
FOLDER, SERVER = "FLOW_BENCH_FOLDER", "FLOW_BENCH_SERVER"


def folder() -> Path:
    return Path(os.environ[FOLDER])


def note(name: str, text: str) -> None:
    """Add a line with the time to a file; one write, so that no two of them mix."""
    path = folder() / name
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{time.time():.4f} {text}\n".encode())
    finally:
        os.close(fd)


def read(path: Path) -> list[tuple[float, str]]:
    """Return the (time, text) of a file's lines; none where there is no such file."""
    if not path.exists():
        return []
    found = [line.split(" ", 1) for line in path.read_text().splitlines()]
    return [(float(at), text) for at, text in found]


def task_id(index: int) -> str:
    """Return the id of the Flow task that a mapped task waits for."""
    return str(TaskId.first("bench", str(index)))
