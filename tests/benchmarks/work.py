"""What the measured systems run: each function is the same for all of them, and says enough to check its answer."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from mmap import mmap
from pathlib import Path
from typing import Any

COUNTS = "FLOW_BENCH_COUNTS"  # the folder in which every worker counts its calls

_kept: dict[int | str, Any] = {}  # of this worker


def echo(value: int) -> int:
    """The no-op: an answer that shows which call it belongs to."""
    return value


def counted(value: int) -> int:
    """A no-op that also counts itself, in memory that the benchmark can read."""
    if "counter" not in _kept:
        _kept["counter"] = _counter_file()
    _kept["counter"][0] += 1
    return value


def _counter_file() -> memoryview:
    handle, _ = tempfile.mkstemp(dir=os.environ[COUNTS])
    os.ftruncate(handle, 8)
    return memoryview(mmap(handle, 8)).cast("Q")


def all_counted(folder: Path) -> int:
    """How many calls of `counted` ran, in whichever process."""
    return sum(int.from_bytes(path.read_bytes(), "little") for path in folder.iterdir())


def mark(path: str) -> str:
    """Leave a file: somebody outside sees that the call has started."""
    Path(path).touch()
    return path


def hold(folder: str) -> int:
    """Keep a worker busy, and say so in a folder, until somebody says there that it is enough."""
    Path(folder, str(os.getpid())).touch()
    while not Path(folder, "enough").exists():
        time.sleep(0.01)
    return os.getpid()


class Counter:
    """State that lives in one worker."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, step: int) -> int:
        self.value += step
        return self.value


class Echo:
    """The no-op of an object."""

    def echo(self, value: int) -> int:
        return value


# --- arrays: uint8, the number of the call in the first four bytes, ones elsewhere ----------------------------


def array(size: int) -> Any:
    """A new array of ones."""
    import numpy as np

    return np.ones(size, dtype=np.uint8)


def marked(kept: Any, number: int) -> Any:
    """Mark an array with a number, so that no answer can be one that was given before."""
    kept[:4] = memoryview(number.to_bytes(4, "little"))
    return kept


def produce(size: int, number: int) -> Any:
    """Return an array that this worker keeps: what is measured is its way, not its making."""
    if size not in _kept:
        _kept[size] = array(size)
    return marked(_kept[size], number)


def number_of(array: Any) -> int:
    """Read both ends of an array: which number it was marked with, -1 where it is damaged."""
    return int.from_bytes(array[:4].tobytes(), "little") if array[-1] == 1 else -1


def read_ends(array: Any) -> int:
    """Take an array and look at its ends."""
    return number_of(array)


def read_all(array: Any) -> tuple[int, int, int]:
    """Take an array and read every byte: its number, the sum of its other words, the page faults of reading."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    total = int(array.view("uint64")[1:].sum())
    return number_of(array), total, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def total_of(size: int) -> int:
    """The sum that `read_all` finds in an undamaged array."""
    return (size // 8 - 1) * 0x0101010101010101 % 2**64
