"""Many calls of which only so many are under way at a time, and the values that they give."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from flow_core.errors import FlowError
from flow_core.futures import Future


def values(
    futures: Iterator[Future], *, limit: int, ordered: bool, return_exceptions: bool
) -> Generator[Any, None, None]:
    """Yield the value of each call, in their order or as they end; a failure is raised, or its exception yielded.

    At most `limit` futures have been taken and their values not yielded. When the iteration ends early, they are
    cancelled.
    """
    ended = _in_order(futures, limit) if ordered else _as_they_end(futures, limit)
    try:
        for future in ended:
            try:
                value = future.result()
            except FlowError as error:
                if not return_exceptions:
                    raise
                value = error
            yield value
    finally:
        ended.close()


def _in_order(futures: Iterator[Future], limit: int) -> Generator[Future, None, None]:
    window: deque[Future] = deque()
    try:
        for future in futures:
            window.append(future)
            if len(window) >= limit:
                yield window[0]
                window.popleft()
        while window:
            yield window[0]
            window.popleft()
    finally:
        _cancel(window)


def _as_they_end(futures: Iterator[Future], limit: int) -> Generator[Future, None, None]:
    ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
    window: set[Future] = set()
    try:
        while True:
            while len(window) < limit and (future := next(futures, None)) is not None:
                window.add(future)
                future.add_done_callback(ended.put)
            if not window:
                return
            future = ended.get()
            yield future
            window.discard(future)
    finally:
        _cancel(window)


def _cancel(window: Iterable[Future]) -> None:
    for future in window:
        future.cancel()
