"""What the tests run on the "GPU machine": plain functions, standard library only."""

import os
import time
from pathlib import Path


def add(a, b=0):
    print(f"adding {a} and {b}", flush=True)
    return a + b


def where():
    return {"pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "")}


def fail(text="bad value"):
    print("before the failure", flush=True)
    raise ValueError(text)


def unserializable():
    return {"model": {1, 2}}


def double_or_fail(item):
    """Fails for numbers that divide by three."""
    print(f"item {item}", flush=True)
    if item % 3 == 0:
        raise ValueError(f"{item} divides by three")
    return item * 2


def count(folder, name="call"):
    """Leave a mark for every call that really ran, and return how many there are."""
    folder = Path(folder)
    (folder / f"{name}-{os.getpid()}-{time.time_ns()}").touch()
    return len(list(folder.glob(f"{name}-*")))


def count_until(folder, gate):
    """Leave a mark, then work until the file `gate` appears (one minute at most)."""
    made = count(folder)
    print(f"working as {os.getpid()}", flush=True)
    for _ in range(1200):
        if Path(gate).exists():
            return made
        time.sleep(0.05)
    raise TimeoutError(gate)


def fail_until(item, folder, gate):
    """Leave a mark for the item, and fail on item 1 until the file `gate` is there."""
    count(folder, f"item{item}")
    if item == 1 and not Path(gate).exists():
        raise ValueError("the gate is closed")
    return item
