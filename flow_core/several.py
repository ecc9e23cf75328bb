"""What can be done with several futures at once, whatever runs their calls."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flow_core.errors import TimeoutError, ValidationError
from flow_core.futures import Future, time_left


def get(futures: Any, timeout: float | None = None, **of_refs: Any) -> Any:
    """Return the value of one future, or the list of the values of several, in their order.

    References (`ObjectRef`, or its JSON form) may stand among them; `of_refs` are the options with which those are
    read, such as `allow_pickle=True`. Raises the first failure in that order; TimeoutError after `timeout` seconds in
    all.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    if isinstance(futures, Iterable) and not isinstance(futures, (Future, Mapping)):
        return [_value_of(one, deadline, of_refs) for one in futures]
    return _value_of(futures, deadline, of_refs)


def _value_of(one: Any, deadline: float | None, of_refs: Mapping[str, Any]) -> Any:
    if isinstance(one, Mapping):
        from flow_core import objects

        return objects.get(one, **of_refs)
    return one.result(time_left(deadline))


results = get


def gather(*futures: Future, timeout: float | None = None) -> list[Any]:
    """Return the values of all of them, in order. Raises the first failure in that order."""
    values: list[Any] = get(list(futures), timeout)
    return values


def wait(
    futures: Sequence[Future] | Iterable[Future], num_returns: int | None = None, timeout: float | None = None
) -> tuple[list[Future], list[Future]]:
    """Wait until `num_returns` of them have ended (all of them, if not given), or `timeout` seconds are over.

    Return (ended, others), both in the order given, the first with at most `num_returns`. A failed one has ended;
    nothing is raised for it.
    """
    every = list(futures)
    wanted = len(every) if num_returns is None else num_returns
    if num_returns is not None and num_returns < 1:
        raise ValidationError(f"num_returns={num_returns} must be at least 1")
    deadline = None if timeout is None else time.monotonic() + timeout
    for count, _ in enumerate(_ended_of(every, deadline), 1):
        if count >= wanted:
            break
    ended = [one for one in every if one.done()][:wanted]
    chosen = {id(one) for one in ended}
    return ended, [one for one in every if id(one) not in chosen]


def as_completed(futures: Iterable[Future], timeout: float | None = None) -> Iterator[Future]:
    """Yield each of them once, as it ends. Raises TimeoutError when some have not ended after `timeout` seconds."""
    every = list(dict.fromkeys(futures))
    deadline = None if timeout is None else time.monotonic() + timeout
    count = 0
    for one in _ended_of(every, deadline):
        count += 1
        yield one
    if count < len(every):
        raise TimeoutError(
            f"waited {timeout:g} s and {len(every) - count} of {len(every)} calls have not ended"
        )


def _ended_of(futures: Sequence[Future], deadline: float | None) -> Iterator[Future]:
    """Yield futures as they end; stop at the deadline."""
    import queue

    ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
    unended = 0
    for one in dict.fromkeys(futures):
        if one.runs_later(ended.put):
            unended += 1
        else:
            yield one
    while unended:
        left = time_left(deadline)
        try:
            one = ended.get(timeout=0.1 if left is None else min(left, 0.1))
        except queue.Empty:
            if left == 0:
                return
            continue
        unended -= 1
        yield one
