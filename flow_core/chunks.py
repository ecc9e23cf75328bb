"""Many calls of one function as few messages: chunks whose size follows from how long the calls take.

A chunk holds about `_CHUNK_US` of work, so the first ones are single calls, and calls of more than `_ALONE_US` stay
single. Should an item take longer than expected, the worker gives the rest of its chunk back, and that goes elsewhere.
Should its worker die, the outcomes of its chunk are lost with it: which of them had been reached nobody can tell.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import ParamSpec

from flow_core import encoding, payload
from flow_core.definitions import PLAIN, CallOptions, Definition
from flow_core.errors import FlowError, SerializationError
from flow_core.futures import Future
from flow_core.runner import parcels

if TYPE_CHECKING:
    from flow_core.dispatch import Pool

P = ParamSpec("P")

_CHUNK_US = 2000.0
_ALONE_US = 30.0
_MOST_ITEMS = 1700
_CHUNKS_PER_WORKER = 3
_SINGLES_PER_WORKER = 16

Shape = Callable[[list[Any]], "tuple[Sequence[Any], bool]"]
"""Makes items into arguments: the one argument of each call, or lists of all, and which of both it is."""


class Chunk(Future):
    """The outcome of several calls. What its worker has given back is in `rest`, another chunk."""

    __slots__ = ("items", "rest", "star")

    def __init__(
        self, runs: Any, definition: Definition, options: CallOptions, items: Sequence[Any], *, star: bool
    ) -> None:
        super().__init__(runs, definition, options)
        self.items = items
        self.star = star
        self.count = len(items)
        self.rest: Chunk | None = None

    def write(self, arena: parcels.Arena | None) -> None:
        """Write the items down. Raises SerializationError."""
        lent_from = None if self.options.repeats else arena
        self.body = encoding.items(self.definition.codec, self.items, lent_from, star=self.star)

    def cut(self, begun: int, arena: parcels.Arena | None) -> Chunk:
        """Return what follows after the first `begun` items as a chunk of its own."""
        rest = Chunk(self.runs, self.definition, self.options, self.items[begun:], star=self.star)
        rest.write(arena)
        rest.rest, self.rest = self.rest, rest
        self.items = self.items[:begun]
        self.count = begun
        return rest

    def parts(self) -> Iterator[Chunk]:
        """Yield the chunk, and what was given back of it."""
        chunk: Chunk | None = self
        while chunk is not None:
            yield chunk
            chunk = chunk.rest

    def outcomes(self, *, return_exceptions: bool) -> tuple[list[Any], FlowError | None]:
        """Wait; return the value of each item that was not given back, up to the first error, and that error.

        With `return_exceptions` the errors are among the values.
        """
        try:
            values, records = self.result()
        except FlowError as lost:  # with the worker, by no fault of an item
            return ([lost] * self.count, None) if return_exceptions else ([], lost)
        for at, record in sorted((int(index), record) for index, record in records.items()):
            error = payload.error_of(record, task_id=self.runs.task_id)
            if not return_exceptions:
                return values[:at], error
            values[at] = error
        return values, None


def as_they_are(items: list[Any]) -> tuple[Sequence[Any], bool]:
    """Each item is the one argument of a call."""
    return items, False


class _Joined(itertools.chain[Any]):
    """The items of the lists that a generator yields: as quick as the lists, where a generator would slow each item."""

    lists: Generator[list[Any]]

    def close(self) -> None:
        """End it, as a generator is ended."""
        self.lists.close()
        deque(self, maxlen=0)  # what was left of the last list


def _joined(lists: Callable[P, Generator[list[Any]]]) -> Callable[P, _Joined]:
    """Make the generator of lists an iterator of their items."""

    @functools.wraps(lists)
    def joined(*args: P.args, **kwargs: P.kwargs) -> _Joined:
        made = lists(*args, **kwargs)
        values = cast(_Joined, _Joined.from_iterable(made))
        values.lists = made
        return values

    return joined


@_joined
def run(
    current: Callable[[], tuple[Pool, Definition]],
    items: Iterable[Any],
    *,
    shape: Shape = as_they_are,
    ordered: bool = True,
    return_exceptions: bool = False,
    max_concurrent: int | None = None,
    options: CallOptions = PLAIN,
) -> Generator[list[Any]]:
    """Yield the value for each item of the definition that `current` gives, with its pool, when the first is asked for.

    `shape` makes the arguments of some calls out of their items.
    In the order of the items, or with `ordered=False` as they come. At most `max_concurrent` items are taken ahead of
    what has been yielded, and never more than a few chunks for each worker. An item's error is raised where its value
    would be, or yielded with `return_exceptions`; the other items are not affected.
    """
    source = iter(items)
    pool, definition = current()
    made = functools.partial(Chunk, pool, definition, options)
    open_chunks: deque[Chunk] = deque()
    workers = pool.spec.workers
    try:
        while True:
            while True:
                size = _size(definition, max_concurrent, sum(chunk.count for chunk in open_chunks))
                if len(open_chunks) >= workers * (_CHUNKS_PER_WORKER if size > 1 else _SINGLES_PER_WORKER):
                    break
                chunk = _next_chunk(pool, made, shape, itertools.islice(source, size))
                if chunk is None:
                    break
                open_chunks.append(chunk)
            if not open_chunks:
                return
            chunk = open_chunks.popleft() if ordered else _first_ended(open_chunks)
            for part in chunk.parts():
                values, error = part.outcomes(return_exceptions=return_exceptions)
                yield values
                if error is not None:
                    raise error
    finally:
        for chunk in open_chunks:  # whoever iterates has stopped early
            chunk.cancel()


def _size(definition: Definition, max_concurrent: int | None, taken: int) -> int:
    wanted = 1 if definition.estimate > _ALONE_US else int(_CHUNK_US / max(definition.estimate, 0.1))
    most = _MOST_ITEMS if max_concurrent is None else max(0, max_concurrent - taken)
    return min(max(1, wanted), most)


def _next_chunk(pool: Pool, made: Callable[..., Chunk], shape: Shape, items: Iterable[Any]) -> Chunk | None:
    taken = list(items)
    if not taken:
        return None
    arguments, star = shape(taken)
    chunks = list(_written(pool, made(arguments, star=star)))
    for chunk, following in itertools.zip_longest(chunks, chunks[1:]):
        chunk.rest = following
        pool.enter(chunk)
    return chunks[0]


def _written(pool: Pool, chunk: Chunk) -> Iterator[Chunk]:
    """Write a chunk down, in as many parts as it takes for each of them to fit into what may travel at once.

    References go apart: one that leads nowhere is the fault of its item. Raises SerializationError.
    """
    try:
        chunk.write(pool.arena)
    except SerializationError as error:
        if error.error_code != encoding.TOO_LARGE or chunk.count == 1:
            raise
    else:
        if chunk.count == 1 or not (chunk.body.refs or len(chunk.body.body) > encoding.MOST_BYTES):
            yield chunk
            return
        for segment in chunk.body.segments:
            assert pool.arena is not None
            pool.arena.give_back(segment.number)
    half = chunk.count // 2
    for items in (chunk.items[:half], chunk.items[half:]):
        part = Chunk(pool, chunk.definition, chunk.options, items, star=chunk.star)
        yield from _written(pool, part)


def _first_ended(chunks: deque[Chunk]) -> Chunk:
    from flow_core.several import wait

    ended, _ = wait(chunks, num_returns=1)
    chunk = ended[0]
    assert isinstance(chunk, Chunk)
    chunks.remove(chunk)
    return chunk
