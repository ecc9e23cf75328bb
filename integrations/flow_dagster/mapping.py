"""Many calls in one step: at most so many at once, all of them to their end, and at last what failed."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg

from flow_core import Flow
from flow_core.errors import FlowError
from flow_core.models import Snapshot
from flow_dagster.call import Call
from flow_dagster.failures import as_map_failure
from flow_dagster.metadata import describe, plain
from flow_dagster.step import Step
from flow_dagster.watch import interruptible, wait

#: So many are started before the ends and the output of the others are looked at again.
_BATCH = 16


def fingerprint(item: Any) -> str:
    """Return what makes an item the same item when the step runs again: its value, not its place."""
    try:
        text = json.dumps(item, sort_keys=True)
    except (TypeError, ValueError):
        text = repr(item)  # it cannot travel either: submitting it says so
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def run_map(
    flow: Flow,
    step: Step,
    items: Sequence[Any],
    start: Callable[[int, Any], Call],
    *,
    max_parallel: int | None,
    return_errors: bool,
) -> list[Any]:
    """Run every item to its end and return the values in the items' order; see `FlowResource.map`."""
    waiting = deque(enumerate(items))
    live: dict[str, Call] = {}
    outcomes: dict[int, Any] = {}
    with interruptible(flow, step, lambda: list(live)):
        while waiting or live:
            room = _BATCH if max_parallel is None else max_parallel - len(live)
            for item, value in [waiting.popleft() for _ in range(min(_BATCH, room, len(waiting)))]:
                try:
                    call = start(item, value)
                except dg.Failure as failure:
                    if not isinstance(failure.__cause__, FlowError):
                        raise
                    outcomes[item] = failure.__cause__  # this item cannot start; others may
                else:
                    live[call.task.task_id] = call
            more = bool(waiting) and (max_parallel is None or len(live) < max_parallel)
            ended = _wait(flow, live, 0 if more else None) if live else {}
            for task_id, snapshot in ended.items():
                call = live.pop(task_id)
                outcomes[call.item or 0] = _outcome(call, snapshot)
    metadata = describe(step.ends())
    step.attach(metadata)
    step.log.info("All %d tasks of the map have ended: %s", len(items), plain(metadata))
    errors = {item: outcome for item, outcome in sorted(outcomes.items()) if isinstance(outcome, FlowError)}
    if errors and not return_errors:
        raise as_map_failure(errors, len(items), metadata) from next(iter(errors.values()))
    return [outcomes[item] for item in range(len(items))]


def _wait(flow: Flow, live: Mapping[str, Call], timeout: float | None) -> dict[str, Snapshot]:
    return wait(flow, {task_id: call.echo for task_id, call in live.items()}, timeout=timeout)


def _outcome(call: Call, snapshot: Snapshot) -> Any:
    """The value, or the error in its place."""
    seen = call.end(snapshot)
    if seen.error is not None:
        return seen.error
    try:
        return call.value()
    except FlowError as error:
        return error
