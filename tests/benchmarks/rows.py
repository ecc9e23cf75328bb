"""The rows of the table: each measures every system of a process once per round, in an order that turns.

Every answer is checked. A sample is divided by the floor of its own round.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import work
from tests.benchmarks.floors import Copy, PingPong
from tests.benchmarks.peers import System

MEGABYTE = 1_000_000
CALLS = 30_000
ITEMS = 10_000
LATENCY_CALLS = 200


@dataclass(frozen=True)
class Sample:
    """What one system took in one round: seconds of one call, and the floor's seconds in the same round."""

    row: str
    system: str
    seconds: float
    floor_s: float | None = None
    calls: int = 1
    facts: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Itself as JSON."""
        return asdict(self)


def turned(systems: list[System], number: int) -> list[System]:
    """The systems in the order of a round."""
    at = number % len(systems) if systems else 0
    return systems[at:] + systems[:at]


def timed(action: Callable[[], object]) -> float:
    """The seconds that an action takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


# --- one call at a time ---------------------------------------------------------------------------------------


def latency(systems: list[System], floor: PingPong, number: int) -> Iterator[Sample]:
    """Single calls, those of all systems in turn; then a block of calls of each alone."""
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    floors = []
    for call in range(LATENCY_CALLS):
        floors.append(timed(floor.once))
        for system in turned(systems, call):
            begin = time.perf_counter()
            value = system.call(work.echo, call)
            seconds[system.name].append(time.perf_counter() - begin)
            assert value == call, (system.name, value, call)
    for name, each in seconds.items():
        yield Sample("warm call, in turn", name, statistics.median(each), statistics.median(floors))
    block = statistics.median(timed(floor.once) for _ in range(LATENCY_CALLS))
    for system in turned(systems, number):
        each = [timed(lambda one=system: one.call(work.echo, 1)) for _ in range(LATENCY_CALLS)]  # type: ignore[misc]
        yield Sample(
            "warm call, in a block",
            system.name,
            statistics.median(each),
            block,
            facts={"p99_s": sorted(each)[-2]},
        )


# --- many calls -----------------------------------------------------------------------------------------------


def throughput(systems: list[System], number: int) -> Iterator[Sample]:
    """No-ops submitted one by one, then waited for; counted in the workers."""
    for system in turned(systems, number):
        calls = int(CALLS * system.share)
        with counting() as folder:
            begin = time.perf_counter()
            values = system.gather([system.submit(work.counted, item) for item in range(calls)])
            seconds = time.perf_counter() - begin
            assert values == list(range(calls)), system.name
            yield Sample("no-op calls one by one", system.name, seconds / calls, calls=calls)
            assert work.all_counted(folder) == calls, system.name


@contextmanager
def counting() -> Iterator[Path]:
    """The folder of the counts, each set to zero: the workers keep their files mapped."""
    folder = Path(os.environ[work.COUNTS])
    for path in folder.iterdir():
        with path.open("r+b") as file:
            file.write(bytes(8))
    yield folder


def mapping(systems: list[System], number: int) -> Iterator[Sample]:
    """A map over no-ops."""
    for system in turned(systems, number):
        begin = time.perf_counter()
        values = system.map(work.echo, range(ITEMS))
        seconds = time.perf_counter() - begin
        assert values == list(range(ITEMS)), system.name
        yield Sample("map over 10,000", system.name, seconds / ITEMS, calls=ITEMS)


def stateful(systems: list[System], number: int) -> Iterator[Sample]:
    """Calls of one object, submitted one by one, then waited for; its count shows that each ran once."""
    for system in turned(systems, number):
        calls = int(CALLS * system.share)
        add = system.actor()
        assert system.gather([add(1)]) == [1]
        begin = time.perf_counter()
        values = system.gather([add(1) for _ in range(calls)])
        seconds = time.perf_counter() - begin
        assert sorted(values) == list(range(2, calls + 2)), system.name
        ordered = values == sorted(values)
        yield Sample(
            "stateful calls, pipelined",
            system.name,
            seconds / calls,
            calls=calls,
            facts={"ordered": ordered},
        )


def starts_at_once(system: System, folder: Path) -> None:
    """Fail unless a call starts without anybody waiting for it."""
    path = folder / f"started by {system.name}"
    handle = system.submit(work.mark, str(path))
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{system.name} starts a call only when it is waited for"
        time.sleep(0.01)
    assert system.gather([handle]) == [str(path)]


# --- arrays ---------------------------------------------------------------------------------------------------


Timed = tuple[float, int]  # seconds, and the page faults of the reader


class Arrays:
    """Arrays of one size on their way to a worker, back, and from call to call."""

    def __init__(self, size: int, repeats: int) -> None:
        self.size, self.label, self.repeats = size, f"{size // MEGABYTE} MB", repeats
        self.array, self.copy = work.array(size), Copy(size)
        self.mark = 0

    def samples(self, systems: list[System], number: int) -> Iterator[Sample]:
        """One round: in each row a system does its repetitions at a stretch, beside the floor's."""
        rows: dict[str, tuple[Callable[[System], Timed], Callable[[], None]]] = {
            "argument": (self.as_argument, self.copy.once),
            "argument, every byte read": (self.as_argument_read, self.copy.once_and_read),
            "result": (self.as_result, self.copy.once),
            "result, every byte read": (self.as_result_read, self.copy.once_and_read),
        }
        if self.size >= 100 * MEGABYTE:
            rows["by reference to the next call"] = (self.by_reference, self.copy.once)
            rows["by reference, every byte read"] = (self.by_reference_read, self.copy.once_and_read)
        if self.mark == 0:
            for system in systems:  # so many calls that every worker makes the array that it keeps
                system.gather([system.submit(work.produce, self.size, 0) for _ in range(4)])
        for name, (once, floor) in rows.items():
            floor_s = statistics.median(timed(floor) for _ in range(max(5, self.repeats)))
            for system in turned(able(systems, "refer") if "reference" in name else systems, number):
                each = [once(system) for _ in range(self.repeats)]
                seconds, faults = (statistics.median(column) for column in zip(*each, strict=True))
                yield Sample(f"{self.label} {name}", system.name, seconds, floor_s, facts={"faults": faults})

    def next_mark(self) -> int:
        """A number that no array carried before."""
        self.mark += 1
        return self.mark

    def as_argument(self, system: System) -> Timed:
        """To a worker, which looks at both ends."""
        mark = self.next_mark()
        work.marked(self.array, mark)
        begin = time.perf_counter()
        value = system.call(work.read_ends, self.array)
        seconds = time.perf_counter() - begin
        assert value == mark, (system.name, value)
        return seconds, 0

    def as_argument_read(self, system: System) -> Timed:
        """To a worker, which reads every byte."""
        mark = self.next_mark()
        work.marked(self.array, mark)
        begin = time.perf_counter()
        answer = system.call(work.read_all, self.array)
        seconds = time.perf_counter() - begin
        return seconds, self.checked(answer, mark)

    def as_result(self, system: System) -> Timed:
        """From a worker; and the next result may not change this one."""
        first, second = self.next_mark(), self.next_mark()
        begin = time.perf_counter()
        value = system.call(work.produce, self.size, first)
        seconds = time.perf_counter() - begin
        later = system.call(work.produce, self.size, second)
        assert (work.number_of(value), work.number_of(later)) == (first, second), system.name
        return seconds, 0

    def as_result_read(self, system: System) -> Timed:
        """From a worker; then every byte is read here."""
        mark = self.next_mark()
        begin = time.perf_counter()
        answer = work.read_all(system.call(work.produce, self.size, mark))
        seconds = time.perf_counter() - begin
        return seconds, self.checked(answer, mark)

    def by_reference(self, system: System) -> Timed:
        """From the worker that made it to the next call, which looks at both ends, not through here."""
        mark = self.next_mark()
        reference = system.refer(system.submit(work.produce, self.size, mark))
        begin = time.perf_counter()
        value = system.call(work.read_ends, reference)
        seconds = time.perf_counter() - begin
        assert value == mark, (system.name, value)
        return seconds, 0

    def by_reference_read(self, system: System) -> Timed:
        """The same, and the next call reads every byte."""
        mark = self.next_mark()
        reference = system.refer(system.submit(work.produce, self.size, mark))
        begin = time.perf_counter()
        answer = system.call(work.read_all, reference)
        seconds = time.perf_counter() - begin
        return seconds, self.checked(answer, mark)

    def checked(self, answer: tuple[int, int, int], mark: int) -> int:
        """The page faults of a reading, whose other answers must be right."""
        number, total, faults = answer
        assert (number, total) == (mark, work.total_of(self.size)), answer
        return faults


# --- a process with its systems -------------------------------------------------------------------------------


def measure(
    kinds: list[type[System]], rounds: int, report: Callable[[Sample], None], *, within_s: float
) -> None:
    """Measure some systems beside each other, round by round; at least once, and no round begins after `within_s`."""
    began = time.monotonic()
    floor = PingPong()
    systems: list[System] = []
    with tempfile.TemporaryDirectory(prefix="flow-bench-") as folder:
        os.environ[work.COUNTS] = folder
        try:
            systems += [kind(2) for kind in kinds]
            with tempfile.TemporaryDirectory(prefix="flow-bench-") as marks:
                for system in able(systems, "submit"):
                    starts_at_once(system, Path(marks))
            sizes = [Arrays(MEGABYTE, 20), Arrays(100 * MEGABYTE, 1)]
            for number in range(-1, rounds):
                if number > 0 and time.monotonic() - began > within_s:
                    break
                for sample in one_round(systems, floor, sizes, number + 1):
                    if number >= 0:  # the round before warms everything up
                        report(sample)
        finally:
            for system in systems:
                system.close()
            floor.close()


def one_round(systems: list[System], floor: PingPong, sizes: list[Arrays], number: int) -> Iterator[Sample]:
    """Every row once."""
    yield from latency(systems, floor, number)
    yield from throughput(able(systems, "submit"), number)
    yield from mapping(able(systems, "map"), number)
    yield from stateful(able(systems, "actor"), number)
    for size in sizes:
        yield from size.samples(able(systems, "submit"), number)


def able(systems: list[System], verb: str) -> list[System]:
    """Those that have a verb."""
    return [system for system in systems if getattr(type(system), verb) is not getattr(System, verb)]
