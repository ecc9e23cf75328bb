"""What workers say, worked into the books of their pool: outcomes, values of generators, calls that come back.

Only the thread that leads reads (`flow_core.leader`).
"""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flow_core import losses, payload
from flow_core.chunks import Chunk
from flow_core.errors import FlowError
from flow_core.futures import DONE, FAILED, Future, call_back, ending, wake
from flow_core.links import Line, logged
from flow_core.runner import parcels, wire
from flow_core.staying import Stayed
from flow_core.streamed import Stream

if TYPE_CHECKING:
    from flow_core.dispatch import Pool
    from flow_core.errors import TaskErrorFields

Due = list[tuple[Callable[[Any], object], Future]]


def hear(pool: Pool, line: Line) -> None:
    """Work in what a worker has sent. Only in the thread that leads."""
    _flush(pool, line)
    due: Due = []
    future: Future | None = None
    try:
        frames = line.read()
        if frames is None:
            lose(pool, line)
            return
        with pool.lock:
            inflight = line.inflight
            for frame in frames:
                if frame[0] != wire.RESULT:
                    due += _take_in(pool, line, frame)
                    continue
                _, codec, micros, number, body = frame
                future = inflight.pop(number, None)
                if future is not None:
                    future.parcel = line.parcel(codec, body)
                    _settle(pool, line, future, micros)
                    for function in ending(future, DONE):
                        due.append((function, future))
            if line.returned:
                line.give_back()
            pool.fill(line)
    except BaseException:
        # By Ctrl-C, or for want of a descriptor: what was read is lost, and with it the place in the stream.
        _tear(pool, line, future)
        call_back(due)
        raise
    if due:
        call_back(due)


def _flush(pool: Pool, line: Line) -> None:
    if line.crowded:
        with pool.lock:
            if line.flush():
                pool.leader.expect(line.fd, room=False)


def _tear(pool: Pool, line: Line, future: Future | None) -> None:
    """Give up a connection in the middle; nobody knows how its calls have ended, `future` the last of them."""
    with pool.lock:
        if future is not None and future.state < DONE:
            pool.open_calls += future.body is None  # it is off the books already
            line.inflight.setdefault(future.number, future)
    if pool.lines.get(line.index) is line:
        lose(pool, line)
        losses.bury(pool, line, {})


def hear_out(pool: Pool, line: Line) -> None:
    """Read the last words of a worker that is gone, whoever else may hold its end of the connection."""
    poll = select.poll()
    poll.register(line.fd, select.POLLIN)
    while pool.lines.get(line.index) is line:
        if poll.poll(0):
            hear(pool, line)
        else:
            lose(pool, line)


def _settle(pool: Pool, line: Line, future: Future, micros: int) -> None:
    """Take a call that has ended off the books. Under the lock."""
    future.definition.took(micros / future.count)
    line.load = line.load - future.load if line.inflight else 0.0
    if line.forwarded:
        line.forwarded.pop(future.number, None)
    future.worker = future.body = None
    pool.open_calls -= 1
    if future.kept:
        pool.keeper.store(future)


def _take_in(pool: Pool, line: Line, frame: wire.Frame) -> Due:
    """Work in a frame that is not a plain result. Under the lock. Return the callbacks that are due."""
    kind, number = frame[0], frame[3]
    if kind == wire.RELEASE:
        _released(pool, line, number)
    elif kind == wire.SEGMENT:
        line.mapped[number] = parcels.Mapped(number, line.descriptors.popleft())
    elif kind == wire.RETIRE:
        line.mapped.pop(number, None)
    elif number in line.inflight:
        return _take_in_news(pool, line, line.inflight[number], frame)
    return []


def _take_in_news(pool: Pool, line: Line, future: Future, frame: wire.Frame) -> Due:
    """Work in what is said of one call. Under the lock."""
    kind, codec, more, _, body = frame
    if kind == wire.LOGGED:
        future.log_range = (pool.task_id, line.worker, *logged(body))
    elif kind == wire.ITEM and isinstance(future, Stream):
        future.arrive(line.parcel(codec, body))
        return [(wake, future)]
    elif kind == wire.RETURNED and more and isinstance(future, Chunk):
        rest = future.cut(more, pool.arena)
        rest.number = pool.next_number()
        pool.open_calls += 1
        pool.requeue(line, [rest])
    elif kind == wire.RETURNED:
        del line.inflight[future.number]
        pool.requeue(line, [future])
    elif kind == wire.STAYED:
        del line.inflight[future.number]
        future.parcel = Stayed(body, pool.task_id, pool.keeper.unneeded)
        _settle(pool, line, future, more)
        return [(function, future) for function in ending(future, DONE)]
    elif kind == wire.ERROR:
        del line.inflight[future.number]
        return _failed(pool, line, future, more, json.loads(body))
    return []


def _released(pool: Pool, line: Line, number: int) -> None:
    if number >> 63:
        line.foreign.pop(number, None)
    elif pool.arena is not None:
        line.lent.discard(number)
        pool.arena.give_back(number)
        for retired in pool.arena.retired:
            for one in pool.lines.values():
                if retired in one.told:
                    one.told.discard(retired)
                    one.write(wire.frame(wire.RETIRE, retired))
        pool.arena.retired.clear()


def _failed(pool: Pool, line: Line, future: Future, micros: int, message: dict[str, Any]) -> Due:
    body, kept = future.body, future.kept
    future.kept = False
    _settle(pool, line, future, micros)
    future.kept = kept
    error = _error_of(pool, message)
    retries = future.options.retries
    if isinstance(error, retries.on) and losses.may_fail(future) and not future.cancelled:
        future.body = body
        pool.open_calls += 1
        pool.again(future)
        return []
    future.error = error
    if kept:
        pool.keeper.store(future)
    return [(function, future) for function in ending(future, FAILED)]


def _error_of(pool: Pool, message: dict[str, Any]) -> FlowError:
    record = message["record"]
    fields: TaskErrorFields = {"task_id": pool.task_id, "log_tail": str(message.get("tail", ""))}
    kind = payload.ENDINGS.get(message.get("why", ""))
    return payload.error_of(record, **fields) if kind is None else kind(str(record["message"]), **fields)


def lose(pool: Pool, line: Line) -> None:
    """A connection has ended: what was sent over it waits for the supervisor's word about the worker."""
    with pool.lock:
        if pool.lines.get(line.index) is not line:
            return  # its session was lost meanwhile, and its descriptor is another's
        pool.leader.forget(line.fd)
        line.close()
        del pool.lines[line.index]
        pool.limbo[line.stream] = line
        line.ended_at = time.monotonic()
        line.foreign.clear()
    if line.report is not None:
        losses.bury(pool, line, line.report)
    pool.keeper.stir()
