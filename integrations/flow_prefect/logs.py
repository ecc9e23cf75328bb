"""Carries the output of a body into the log of its task run: every line once, in order, while it happens."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, Protocol

from prefect.logging import get_logger, get_run_logger

from flow_core import InvokeTask

#: Prefect Cloud cuts a log entry at 25 000 characters.
_LONGEST = 20_000

#: A body that prints without end must not keep its reader from looking at the time.
_PIECES = 16

_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) \| ?")


class Logger(Protocol):
    """What is needed of a run's logger."""

    def log(self, level: int, msg: object, *args: object) -> None:
        """Record one message."""


class LogPump:
    """Reads a task's output from where it left off and hands it to a logger line by line."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._offset = 0
        self._rest = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def pump(self, task: InvokeTask) -> tuple[bool, bool]:
        """Log what is new; return (whether there was anything, whether all is read and no more will come)."""
        start = self._offset
        for _ in range(_PIECES):
            chunk = task.read_log(self._offset)
            self._offset = chunk.next_offset
            for line in self._lines(self._decode(chunk.data, chunk.end), last=chunk.end):
                self._log(line)
            if chunk.end or not chunk.data:
                return self._offset > start, chunk.end
        return True, False

    def _lines(self, text: str, *, last: bool) -> Iterator[str]:
        *lines, self._rest = (self._rest + text).split("\n")
        yield from lines
        while len(self._rest) > _LONGEST or (last and self._rest):
            line, self._rest = self._rest[:_LONGEST], self._rest[_LONGEST:]
            yield line

    def _log(self, line: str) -> None:
        shown = line.rstrip("\r").rpartition("\r")[2]  # of a progress bar, its last state
        shown = shown.replace("\0", "\ufffd")  # PostgreSQL cannot store NUL
        found = _LEVEL.match(shown)
        level = logging.INFO
        if found:
            level, shown = getattr(logging, found[1]), shown[found.end() :]
        for start in range(0, len(shown) or 1, _LONGEST):
            self._logger.log(level, "%s", shown[start : start + _LONGEST])


def _run_logger(*_args: object, **_kwargs: object) -> Any:
    """Stands in for Prefect's `get_run_logger` on the machine. Alone there: it uses nothing of this module."""
    import logging
    import sys

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            for line in self.format(record).split("\n"):
                sys.stdout.write(f"{record.levelname} | {line}\n")
            sys.stdout.flush()

    logger = logging.getLogger("flow.task_run")
    if not logger.handlers:
        logger.addHandler(Lines())
        logger.setLevel(logging.DEBUG)  # the host's own level decides
        logger.propagate = False
    return logger


def stand_ins() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what replaces Prefect's loggers in a body: functions that travel by value and need nothing there."""
    copy = FunctionType(_run_logger.__code__, {"__name__": "__main__"}, "get_run_logger")
    copy.__module__ = "__main__"  # pickled by value, whether or not this package is installed
    return {get_run_logger: copy, get_logger: copy}
