"""What has become of a session's task, as the error that its calls end with. Asks the provider; decides nothing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from flow_core import payload
from flow_core.deaths import death_with_session
from flow_core.errors import ResourceNotFoundError, SessionClosedError, WorkerDiedError

if TYPE_CHECKING:
    from flow_core.dispatch import Pool
    from flow_core.errors import FlowError, TaskExecutionError
    from flow_core.models import Snapshot

_REASONS = {
    "idle": "it was idle for too long",
    "lease": "its owner was silent for too long",
    "closed": "it was closed by another of its clients",
}


def ended(reason: str) -> SessionClosedError:
    """Return the error for a session that has ended in good order, for this reason."""
    return SessionClosedError(_REASONS.get(reason, f"it has ended: {reason}"), error_code=f"session-{reason}")


def raise_end(pool: Pool, seen: Snapshot) -> None:
    """Raise the error that tells how the session's task has ended, if it has."""
    if seen.status.succeeded:  # it ended in good order, and we were not there to hear why
        data = pool.flow.engine.collect(seen.task_id, "result")
        raise ended(payload.decode_result(data, task_id=seen.task_id)["ended"])
    if seen.status.final:
        raise _failure(pool, seen)


def _failure(pool: Pool, seen: Snapshot) -> FlowError:
    """Return what ended the session's task: its own account, where it could leave one."""
    engine, task_id = pool.flow.engine, pool.task_id
    with contextlib.suppress(ResourceNotFoundError):
        told = payload.decode_error(engine.collect(task_id, "result"), task_id=task_id)
        if told is not None:
            return told
    return death_with_session(engine.failure(seen), _state_in(pool))


def cut_off(pool: Pool) -> TaskExecutionError:
    """Return the error for a session that cannot be reached any more."""
    advice = f"What runs there ends within {pool.spec.lease_s:g} s, unless others use the session too."
    text = "the connection to it was lost, though its task runs"
    lost = WorkerDiedError(text, suggestions=[advice], task_id=pool.task_id, reason="unreachable")
    return death_with_session(lost, _state_in(pool))


def taken_away(pool: Pool, seen: Snapshot) -> TaskExecutionError:
    """Return the error for a session whose task the provider starts again by itself."""
    detail = f": {seen.message}" if seen.message else ""
    text = f"its machine was taken away, and task {seen.task_id} is {seen.status.value}{detail}"
    lost = WorkerDiedError(text, task_id=seen.task_id, reason=seen.reason or "preempted")
    return death_with_session(lost, _state_in(pool))


def _state_in(pool: Pool) -> str:
    """Return what held state there, if anything did."""
    return pool.spec.name if pool.ordered else ""
