"""What systems take while they do nothing, and while calls wait. Proportional set sizes of all their processes."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks import work
from tests.benchmarks.peers import System

MARK = "FLOW_BENCH_MARK"  # in the environment of the measured process and, inherited, of all that it starts
FEW, MANY = 2, 6
OUTSTANDING = 5_000  # from some number on, ours holds back who submits
KIB = 1024


def measure(kind: type[System]) -> dict[str, float]:
    """Bytes: of the system with two workers, of each further worker, and of 1,000 calls that wait."""
    before = everything()
    with running(kind, FEW) as system:
        few = everything()
        waiting = outstanding(system)
    with running(kind, MANY):
        many = everything()
    return {
        "two_workers": few - before,
        "worker": (many - few) / (MANY - FEW),
        "thousand_calls": waiting,
    }


@contextmanager
def running(kind: type[System], workers: int) -> Iterator[System]:
    """A system all of whose workers have run something."""
    system = kind(workers)
    try:
        with held(system, workers):
            pass
        yield system
    finally:
        system.close()


@contextmanager
def held(system: System, workers: int) -> Iterator[None]:
    """Every worker is busy."""
    with tempfile.TemporaryDirectory(prefix="flow-bench-") as folder:
        handles = [system.submit(work.hold, folder) for _ in range(workers)]
        deadline = time.monotonic() + 60
        while len(os.listdir(folder)) < workers:
            assert time.monotonic() < deadline, f"{system.name} starts fewer than {workers} workers"
            time.sleep(0.05)
        try:
            yield
        finally:
            Path(folder, "enough").touch()
            system.gather(handles)


def outstanding(system: System) -> float:
    """Bytes of 1,000 calls that wait for busy workers, on both sides."""
    with held(system, FEW):
        before = everything()
        handles = [system.submit(work.echo, item) for item in range(OUTSTANDING)]
        after = everything()
    assert system.gather(handles) == list(range(OUTSTANDING))
    return (after - before) / (OUTSTANDING / 1000)


def everything() -> int:
    """The proportional set size of this process and of all that carry its mark."""
    gc.collect()
    time.sleep(1.0)  # what was started settles
    return sum(map(proportional_bytes, marked()))


def marked() -> list[Path]:
    """The processes that carry the mark of this one."""
    needle = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry)
        except OSError:
            continue
    return found


def proportional_bytes(process: Path) -> int:
    """What a process takes, shared pages divided among those that share them."""
    try:
        rollup = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * KIB for line in rollup if line.startswith("Pss:"))
