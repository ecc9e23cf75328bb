"""What becomes of calls when their worker is lost, or their whole session: ended with an error, or made again.

A call is made again only where that was asked for, and as often; what had not been begun by a worker that died goes to
another. Decides; the pool and its keeper carry it out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flow_core.deaths import death, timed_out
from flow_core.errors import CallCancelledError, FlowError
from flow_core.futures import Future
from flow_core.streamed import Stream

if TYPE_CHECKING:
    from flow_core.dispatch import Pool
    from flow_core.errors import TaskExecutionError
    from flow_core.links import Line


def bury(pool: Pool, line: Line, report: Mapping[str, Any]) -> None:
    """Decide what becomes of the calls of a worker that is gone; `report` is the supervisor's word, or empty."""
    with pool.lock:
        if pool.limbo.pop(line.stream, None) is None:
            return
        calls = list(line.inflight.values())
        line.inflight.clear()
        lost = [one for one in calls if pool.ordered or _was_running(one, line, report)]
        rest = [one for one in calls if one not in lost]
        pool.requeue(line, rest)
        _take_back_memory(pool, line, calls)
    for future in lost:
        _lose(pool, future, line, report)
    if pool.ordered:
        pool.end(death(f"the worker that held the state of {pool.spec.name!r} died", report, pool.task_id))


def _lose(pool: Pool, future: Future, line: Line, report: Mapping[str, Any]) -> None:
    """A worker died in the middle of this call, or, where calls keep their order, before it."""
    fields: Any = {"task_id": pool.task_id, "log_tail": str(report.get("tail", ""))}
    running = _was_running(future, line, report)
    if future.cancelled or (running and report.get("reason") == "cancelled"):
        text = f"the call {future.name!r} was cancelled while it ran; its worker had to be killed"
        pool.finish(future, CallCancelledError(text, **fields))
    elif running and report.get("reason") == "timeout":
        pool.finish(future, timed_out(future.name, future.options.timeout_s, **fields))
    else:
        with pool.lock:
            if _goes_on(future) and not pool.ordered and pool.over is None:
                pool.again(future)
                return
        when = "while it ran" if running else "before it ran"
        pool.finish(future, death(f"the worker died {when} {future.name!r}", report, pool.task_id))


def outlive(pool: Pool, error: TaskExecutionError) -> bool:
    """Part the calls of a session that is lost; return whether any of them asks for the session to begin anew.

    If one does, those that do are to be made again, and the others have ended with the error. If none does, nothing has
    changed.
    """
    with pool.lock:
        lines = [*pool.lines.values(), *pool.limbo.values()]
        calls = pool.unended()
        kept = [] if pool.ordered or pool.over is not None else [one for one in calls if _goes_on(one)]
        if not kept:
            return False
        for line in lines:
            pool.leader.forget(line.fd)
            line.close()
            line.inflight.clear()  # somebody may just be reading it
            _take_back_memory(pool, line, calls)
        pool.forget_lines()
        for future in kept:
            future.worker = None
            if pool.waits(future):  # for its inputs, and then its turn comes
                future.attempts += 1
            else:
                pool.again(future)
    for future in [one for one in calls if one not in kept]:
        text = f"the call {future.name!r} was cancelled, and then its session was lost"
        cancelled = CallCancelledError(text, task_id=pool.task_id)
        pool.finish(future, cancelled if future.cancelled else copy_of(error))
    return True


def _take_back_memory(pool: Pool, line: Line, calls: list[Future]) -> None:
    """Take back what was lent to a worker that is gone, but for what is to be sent again. Under the lock."""
    kept = {segment.number for one in calls if one.body for segment in one.body.segments}
    if pool.arena is not None:
        for number in line.lent - kept:
            pool.arena.give_back(number)
    line.lent.clear()


def may_fail(future: Future) -> bool:
    """Whether an exception is not the end of the call. Its worker is then not asked to keep what comes of it."""
    return future.attempts < future.options.retries.exceptions and not _has_yielded(future)


def _goes_on(future: Future) -> bool:
    """Whether the loss of its worker is not the end of the call."""
    asked: bool = future.attempts < future.options.retries.lost
    return asked and not future.cancelled and not _has_yielded(future)


def _has_yielded(future: Future) -> bool:
    """Whether values of a generator have come: to begin it again would bring them twice."""
    return isinstance(future, Stream) and future.yielded


def _was_running(future: Future, line: Line, report: Mapping[str, Any]) -> bool:
    """Whether a call had begun when its worker died; to be feared where nobody can tell."""
    if not report:
        return True
    return bool(report["busy"] and (report["stream"], report["number"]) == (line.stream, future.number))


def copy_of(error: BaseException) -> BaseException:
    """Return an error of one's own for each call: a traceback grows where the same one is raised twice."""
    return copy.copy(error) if isinstance(error, FlowError) else error
