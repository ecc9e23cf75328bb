"""A task's output as whole lines, each once, in order, across processes. Reads; who asked emits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flow_core.models import LogChunk

#: A line longer than this comes in pieces, so that output without line ends neither hides nor fills the
#: memory.
LONGEST_LINE = 16384


class ReadsLog(Protocol):
    """What this module needs of a `flow_core.Task`."""

    def read_log(self, offset: int = 0, limit: int = 65536, *, node: int = 0) -> LogChunk:
        """Return the output from byte `offset` on, without blocking."""


class NodeLog:
    """The output of one machine of a task, from byte `offset` on."""

    def __init__(self, task: ReadsLog, node: int, offset: int, prefix: str) -> None:
        self._task = task
        self._node = node
        self._prefix = prefix
        self._partial = b""
        #: Up to here every byte has been handed out in a line.
        self.offset = offset
        #: Whether the last read found nothing new.
        self.caught_up = False
        #: Whether the task has ended and every line has been handed out.
        self.ended = False

    def read(self) -> list[str]:
        """Return the lines that one more piece of output completes; at the end also the unfinished one."""
        if self.ended:
            return []
        chunk = self._task.read_log(self.offset + len(self._partial), node=self._node)
        self.caught_up, self.ended = not chunk.data or chunk.end, chunk.end
        *whole, self._partial = (self._partial + chunk.data).split(b"\n")
        lines = [self._hand_out(line, ending=1) for line in whole]
        while len(self._partial) > LONGEST_LINE:
            cut = _character_border(self._partial, LONGEST_LINE)
            lines.append(self._hand_out(self._partial[:cut]))
            self._partial = self._partial[cut:]
        if chunk.end and self._partial:
            lines.append(self._hand_out(self._partial))
            self._partial = b""
        return lines

    def _hand_out(self, line: bytes, ending: int = 0) -> str:
        self.offset += len(line) + ending
        # A progress bar rewrites its line with carriage returns; what it showed last is what a terminal would
        # show.
        shown = line.rstrip(b"\r").rpartition(b"\r")[2]
        return self._prefix + shown.decode("utf-8", "replace")


def _character_border(data: bytes, near: int) -> int:
    """Return the last index up to `near` that does not split a UTF-8 character."""
    cut = near
    while cut > near - 4 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


class TaskLog:
    """The output of all machines of a task. Its `offsets` let another process read on from here."""

    def __init__(self, task: ReadsLog, *, nodes: int = 1, offsets: Sequence[int] = ()) -> None:
        starts = list(offsets) or [0] * nodes
        several = len(starts) > 1
        self._logs = [
            NodeLog(task, node, offset, f"[{node}] " if several else "") for node, offset in enumerate(starts)
        ]

    def read(self) -> list[str]:
        """Return the lines that one more piece of each machine's output completes; see `caught_up`."""
        return [line for log in self._logs for line in log.read()]

    @property
    def offsets(self) -> list[int]:
        """The bytes per machine whose lines have been handed out."""
        return [log.offset for log in self._logs]

    @property
    def caught_up(self) -> bool:
        """Whether the last `read` found nothing new anywhere, so that reading again at once is no use."""
        return all(log.caught_up for log in self._logs)

    @property
    def ended(self) -> bool:
        """Whether the task has ended and every line has been handed out."""
        return all(log.ended for log in self._logs)
