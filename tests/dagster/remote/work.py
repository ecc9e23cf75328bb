"""What the tests run on the "GPU machine": plain functions, standard library only."""

import os
import time
from pathlib import Path


def add(a: int, b: int = 0) -> int:
    print(f"adding {a} and {b}", flush=True)
    return a + b


def fail(text: str = "bad value") -> None:
    print("before the failure", flush=True)
    raise ValueError(text)


def unserializable() -> dict[str, set[int]]:
    return {"model": {1, 2}}


def double_or_fail(item: int) -> int:
    """Fails for numbers that divide by three."""
    print(f"item {item}", flush=True)
    if item % 3 == 0:
        raise ValueError(f"{item} divides by three")
    return item * 2


def count(folder: str, name: str = "call") -> int:
    """Leave a mark for every call that really ran, and return how many there are."""
    marks = Path(folder)
    (marks / f"{name}-{os.getpid()}-{time.time_ns()}").touch()
    return len(list(marks.glob(f"{name}-*")))


def count_until(folder: str, gate: str) -> int:
    """Leave a mark, then work until the file `gate` appears (one minute at most)."""
    made = count(folder)
    print(f"working as {os.getpid()}", flush=True)
    for _ in range(1200):
        if Path(gate).exists():
            return made
        time.sleep(0.05)
    raise TimeoutError(gate)


def fail_until(item: int, folder: str, gate: str) -> int:
    """Leave a mark for the item, and fail on item 1 until the file `gate` is there."""
    count(folder, f"item{item}")
    if item == 1 and not Path(gate).exists():
        raise ValueError("the gate is closed")
    return item
