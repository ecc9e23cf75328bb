"""How busy a task's GPUs are: the driver's tool is asked now and then, in a process of its own.

The runner itself loads and does nothing for it, and on a machine without the tool there is no such process. It ends
with the runner, however that ends, and holds none of the task's locks. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import os
import select

from . import task
from .light import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What has been seen so far, in the task's folder.
RECORD = "gpu-use.json"

_FIRST_S, _EVERY_S = 1.0, 10.0
_PATIENCE_S = 30.0  # the tool takes seconds where no process keeps the driver loaded
_TOOL = "nvidia-smi"


class Sampler:
    """The process that looks at the GPUs while the task runs."""

    def __init__(self, folder: str, tool: str, gpus: list[str]) -> None:
        theirs, self._ours = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _look_repeatedly(folder, theirs, tool, gpus)
            finally:
                os._exit(0)
        os.close(theirs)

    def dismiss(self) -> None:
        """End it."""
        os.close(self._ours)


def find_tool(path: str) -> str | None:
    """Return the driver's tool, found on `path`; None on a machine without a driver."""
    for folder in path.split(os.pathsep):
        tool = os.path.join(folder, _TOOL)
        if os.access(tool, os.X_OK):
            return tool
    return None


def _look_repeatedly(folder: str, pipe: int, tool: str, gpus: list[str]) -> None:
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, 256)
    seen, pause = _Seen(), _FIRST_S
    while not select.select([pipe], [], [], pause)[0]:
        seen.add(_ask(tool, gpus))
        if seen.count:
            task.write_json(folder, RECORD, seen.record())
        pause = _EVERY_S


def _ask(tool: str, gpus: list[str]) -> list[tuple[float, int]]:
    """Return (utilization in percent, used memory in MiB) of each GPU that tells."""
    import subprocess

    query = [tool, "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*query, "--id=" + ",".join(gpus)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=_PATIENCE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [row for row in map(_row, done.stdout.splitlines()) if row is not None]


def _row(line: str) -> tuple[float, int] | None:
    use, _, memory = line.partition(",")
    try:
        return float(use), int(memory)
    except ValueError:  # "[N/A]": a part of a GPU does not tell
        return None


class _Seen:
    """The mean and the peak of what has been seen."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._peak_mib = 0

    def add(self, rows: list[tuple[float, int]]) -> None:
        for use, memory in rows:
            self.count += 1
            self._sum += use
            self._peak_mib = max(self._peak_mib, memory)

    def record(self) -> dict[str, Any]:
        return {
            "utilization_percent": self._sum / self.count,
            "peak_memory_bytes": self._peak_mib * 1024 * 1024,
        }
