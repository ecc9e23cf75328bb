"""A task's output as whole lines, each once, in order, across processes. Takes pieces in; who asked emits the lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flow_core.models import LogChunk

#: A line longer than this comes in pieces, so that output without line ends neither hides nor fills the
#: memory.
LONGEST_LINE = 16384


class Line(NamedTuple):
    """A line as it is shown; the machine that printed it has said `offset` bytes up to its end."""

    text: str
    node: int
    offset: int


#: So much text is one event of a log at most, where it holds several lines.
_EVENT_CHARACTERS = 3000


def fitting(lines: Sequence[Line], begin: int) -> Sequence[Line]:
    """Return the lines from `begin` on that fit into one event of a log: one machine's, and at least one."""
    end, size = begin + 1, len(lines[begin].text)
    while end < len(lines) and lines[end].node == lines[begin].node:
        size += len(lines[end].text) + 1
        if size > _EVENT_CHARACTERS:
            break
        end += 1
    return lines[begin:end]


class NodeLines:
    """The output of one machine of a task, from byte `offset` on."""

    def __init__(self, node: int, offset: int, prefix: str) -> None:
        self._node = node
        self._prefix = prefix
        self._partial = b""
        #: Up to here every byte has been handed out in a line.
        self.offset = offset
        #: Whether the task has ended and every line has been handed out.
        self.ended = False

    @property
    def taken(self) -> int:
        """The bytes that need not be read again: in lines that are handed out, or begun here."""
        return self.offset + len(self._partial)

    def take(self, chunk: LogChunk) -> list[Line]:
        """Return the lines that a piece of output, from byte `taken` on, completes; at the end also the unfinished."""
        *whole, self._partial = (self._partial + chunk.data).split(b"\n")
        lines = [self._hand_out(line, ending=1) for line in whole]
        while len(self._partial) > LONGEST_LINE:
            cut = _character_border(self._partial, LONGEST_LINE)
            lines.append(self._hand_out(self._partial[:cut]))
            self._partial = self._partial[cut:]
        if chunk.end and self._partial:
            lines.append(self._hand_out(self._partial))
            self._partial = b""
        self.ended = chunk.end
        return lines

    def _hand_out(self, line: bytes, ending: int = 0) -> Line:
        self.offset += len(line) + ending
        # A progress bar rewrites its line with carriage returns; what it showed last is what a terminal would
        # show.
        shown = line.rstrip(b"\r").rpartition(b"\r")[2]
        return Line(self._prefix + shown.decode("utf-8", "replace"), self._node, self.offset)


def _character_border(data: bytes, near: int) -> int:
    """Return the last index up to `near` that does not split a UTF-8 character."""
    cut = near
    while cut > near - 4 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


class TaskLines:
    """The output of all machines of a task. Its `offsets` let another process read on from here."""

    def __init__(self, offsets: Sequence[int]) -> None:
        several = len(offsets) > 1
        self.nodes = [
            NodeLines(node, offset, f"[{node}] " if several else "") for node, offset in enumerate(offsets)
        ]

    @property
    def wanted(self) -> dict[int, int]:
        """From which byte on to read which machine's output."""
        return {node: log.taken for node, log in enumerate(self.nodes) if not log.ended}

    def take(self, chunks: Mapping[int, LogChunk]) -> list[Line]:
        """Return the lines that a piece of each machine's output completes."""
        return [line for node, chunk in chunks.items() for line in self.nodes[node].take(chunk)]

    @property
    def offsets(self) -> list[int]:
        """The bytes per machine whose lines have been handed out."""
        return [log.offset for log in self.nodes]

    @property
    def ended(self) -> bool:
        """Whether the task has ended and every line has been handed out."""
        return all(log.ended for log in self.nodes)


class ReadsLog(Protocol):
    """What this module needs of a `flow_core.Task`."""

    def read_log(self, offset: int = 0, limit: int = 65536, *, node: int = 0) -> LogChunk:
        """Return the output from byte `offset` on, without blocking."""


class TaskLog:
    """Reads the output of one task, in the process that waits for it alone."""

    def __init__(self, task: ReadsLog, *, nodes: int = 1, offsets: Sequence[int] = ()) -> None:
        self._task = task
        self._lines = TaskLines(list(offsets) or [0] * nodes)
        #: Whether the last `read` found nothing new anywhere, so that reading again at once is no use.
        self.caught_up = False

    def read(self) -> list[str]:
        """Return the lines that one more piece of each machine's output completes; see `caught_up`."""
        chunks = {node: self._task.read_log(offset, node=node) for node, offset in self._lines.wanted.items()}
        self.caught_up = all(not chunk.data or chunk.end for chunk in chunks.values())
        return [line.text for line in self._lines.take(chunks)]

    @property
    def offsets(self) -> list[int]:
        """The bytes per machine whose lines have been handed out."""
        return self._lines.offsets

    @property
    def ended(self) -> bool:
        """Whether the task has ended and every line has been handed out."""
        return self._lines.ended
