"""Pure functions for the DAGs here: they know nothing of us or of any orchestrator."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_LOADED = time.time()


def loaded() -> dict[str, float]:
    """Say when this file was imported, and by which process."""
    return {"pid": os.getpid(), "at": _LOADED}


def echo(value: Any = None, *more: Any) -> Any:
    """Return what was given."""
    return [value, *more] if more else value


def add(a: float, b: float) -> float:
    return a + b


def total(values: list[float]) -> float:
    return sum(values)


def double(value: float) -> float:
    return 2 * value


def gpus() -> dict[str, str | None]:
    """Say which GPUs this process may use."""
    return {"visible": os.environ.get("CUDA_VISIBLE_DEVICES")}


def leave_mark(trail: str) -> int:
    """Note that the work has started; return how often it has by now."""
    note(trail, "start")
    return sum(line.startswith("start ") for line in Path(trail).read_text().splitlines())


def note(trail: str, what: str) -> None:
    with Path(trail).open("a") as file:
        file.write(f"{what} {os.getpid()}\n")


def long(trail: str, seconds: float) -> dict[str, Any]:
    """Work for a while, or until the file `TRAIL.go` is there, and say so. Asked to stop, tidy up for two seconds."""

    def tidy_up(*_signal: Any) -> None:
        time.sleep(2)
        note(trail, "tidied up")
        sys.exit(1)

    signal.signal(signal.SIGTERM, tidy_up)
    starts = leave_mark(trail)
    for second in range(int(seconds * 2)):
        if Path(trail + ".go").exists():
            break
        print(f"half second {second}", flush=True)
        time.sleep(0.5)
    return {"starts": starts, "pid": os.getpid()}


def held(trail: str) -> dict[str, Any]:
    """Work until the file `TRAIL.go` is there, but not for ever."""
    starts = leave_mark(trail)
    give_up = time.monotonic() + 600
    while not Path(trail + ".go").exists() and time.monotonic() < give_up:
        time.sleep(0.1)
    return {"starts": starts, "pid": os.getpid()}


def fail(trail: str) -> float:
    leave_mark(trail)
    print("about to divide", flush=True)
    return 1 / 0


def fail_once(trail: str) -> dict[str, int]:
    starts = leave_mark(trail)
    if starts == 1:
        raise ValueError("not this time")
    return {"starts": starts}


def exit_badly() -> None:
    sys.exit(3)


def talk(lines: int, pause: float) -> int:
    """Print numbered lines with what could trip a log up: percent signs, braces, umlauts, escapes."""
    for number in range(lines):
        print(f"line {number:03d} 100% {{x}} %s ü \\n", flush=True)
        time.sleep(pause)
    return lines


def names(values: list[str], seconds: float = 0.0) -> set[str]:
    """Return what JSON does not carry."""
    time.sleep(seconds)
    return set(values)


def typed(name: str) -> Any:
    """Return a value of one of the types that JSON has not, or that Airflow has not."""
    import datetime as dt
    import decimal
    import enum
    import uuid

    class Colour(enum.IntEnum):
        RED = 1

    values: dict[str, Any] = {
        "tuple": (1, "two"),
        "nested": {"a": [(1, {2, 3})], "b": frozenset({"x"})},
        "set": {1},
        "datetime": dt.datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=dt.timezone.utc),
        "decimal": decimal.Decimal("0.25"),
        "uuid": uuid.UUID(int=7),
        "plain_dict": {"loss": 0.5, "steps": [1, 2]},
        "int_keys": {"epochs": {1: 0.5}},
        "bytes": {"weights": b"123"},
        "nan": {"loss": [0.5, float("nan")]},
        "path": [Path("/tmp/model")],
        "exception": {"error": ValueError("x")},
        "naive_enum": [Colour.RED.real, decimal.Decimal("0.12345678901234567890")],
        "huge_int": [2**80],
        "nul": {"text": "a\0b"},
    }
    return values[name]


def typed_once(trail: str) -> Any:
    return {"weights": b"123", "starts": leave_mark(trail)}


def none_if_two(value: int) -> int | None:
    return None if value == 2 else value


def zeros(count: int) -> list[int]:
    return [0] * count


def lengths(values: dict[str, Any], more: list[Any]) -> list[int]:
    """Say how long the lists are that have arrived, wherever they stood."""
    large, inner = values["list"]
    return [len(large), len(inner["small"]), *map(len, more)]


def count_bytes(value: dict[str, Any]) -> int:
    return len(value["weights"])
