"""Output of a body as log entries: every line once, in order, at its level."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import pytest

from flow_core import InvokeTask, LogChunk
from flow_prefect.logs import LogPump, stand_ins


@dataclass
class Printed(InvokeTask):  # a task of which only the output is of interest
    """A task's output that grows, handed out in pieces of a given length."""

    data: bytes = b""
    piece: int = 65536
    ended: bool = False
    reads: list[int] = field(default_factory=list)

    def read_log(self, offset: int = 0, limit: int = 65536, *, node: int = 0) -> LogChunk:
        self.reads.append(offset)
        data = self.data[offset : offset + min(limit, self.piece)]
        at = offset + len(data)
        return LogChunk(data=data, next_offset=at, end=self.ended and at >= len(self.data))


class Entries:
    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def log(self, level: int, msg: object, *args: object) -> None:
        self.seen.append((level, str(msg) % args))

    @property
    def lines(self) -> list[str]:
        return [line for _, line in self.seen]


def drain(pump: LogPump, task: Printed) -> None:
    while not pump.pump(task)[1]:
        pass


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 65536])
def test_lines_arrive_whole_in_whatever_pieces_they_are_read(piece: int) -> None:
    text = "h\u00e4llo \U0001f600\n100% done %s\n\nlast without a newline"
    entries = Entries()
    drain(LogPump(entries), Printed(data=text.encode(), piece=piece, ended=True))
    assert entries.lines == text.split("\n")


def test_a_line_is_logged_when_it_is_complete_and_only_once() -> None:
    entries, task = Entries(), Printed(data=b"one\ntw")
    pump = LogPump(entries)
    assert pump.pump(task) == (True, False)
    assert entries.lines == ["one"]
    assert pump.pump(task) == (False, False)
    task.data += b"o\n"
    task.ended = True
    assert pump.pump(task) == (True, True)
    assert entries.lines == ["one", "two"]
    assert task.reads[-1] == len(b"one\ntw")


def test_a_very_long_line_is_split_and_nothing_is_lost() -> None:
    line = "".join(str(index % 10) for index in range(50_001))
    entries = Entries()
    drain(LogPump(entries), Printed(data=line.encode() + b"\nnext\n", ended=True))
    assert entries.lines[-1] == "next"
    assert "".join(entries.lines[:-1]) == line
    assert max(len(one) for one in entries.lines) <= 20_000


def test_a_body_that_prints_without_end_does_not_hold_its_reader() -> None:
    class Endless(Printed):
        def read_log(self, offset: int = 0, limit: int = 65536, *, node: int = 0) -> LogChunk:
            return LogChunk(data=b"y\n" * 100, next_offset=offset + 200, end=False)

    assert LogPump(Entries()).pump(Endless()) == (True, False)


def test_of_a_progress_bar_the_last_state_is_logged() -> None:
    entries = Entries()
    drain(LogPump(entries), Printed(data=b"\r 0%\r50%\r100%\r\ndone\r\n", ended=True))
    assert entries.lines == ["100%", "done"]


def test_what_no_database_stores_is_replaced() -> None:
    entries = Entries()
    drain(LogPump(entries), Printed(data=b"a\0b \xff\n", ended=True))
    assert entries.lines == ["a\ufffdb \ufffd"]


def test_levels_of_the_stand_in_logger_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    (stand_in, *_) = stand_ins().values()
    logger = stand_in()
    try:
        logger.debug("quiet")
        logger.info("with %s", "arguments")
        logger.error("two\nlines")
        assert stand_in() is logger
    finally:
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    entries = Entries()
    drain(LogPump(entries), Printed(data=capsys.readouterr().out.encode(), ended=True))
    expected = [(10, "quiet"), (20, "with arguments"), (40, "two"), (40, "lines")]
    assert entries.seen == expected


def test_the_stand_in_travels_without_our_package() -> None:
    import cloudpickle

    for stand_in in stand_ins().values():
        assert b"flow_prefect.logs" not in cloudpickle.dumps(stand_in)
