"""Many calls in one step: at most so many at once, all of them to their end, and at last what failed."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import dagster as dg

from flow_core import Flow
from flow_core.errors import FlowError
from flow_dagster.call import Call
from flow_dagster.failures import as_map_failure
from flow_dagster.metadata import describe
from flow_dagster.step import Step
from flow_dagster.watch import interruptible, wait


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
            while waiting and (max_parallel is None or len(live) < max_parallel):
                item, value = waiting.popleft()
                try:
                    call = start(item, value)
                except dg.Failure as failure:  # this item cannot start; others may
                    outcomes[item] = failure.__cause__
                else:
                    live[call.task.task_id] = call
            ended = wait(flow, {task_id: call.echo for task_id, call in live.items()}) if live else {}
            for task_id, snapshot in ended.items():
                call = live.pop(task_id)
                outcomes[call.item or 0] = _outcome(call, snapshot)
    metadata = describe(step.ends())
    step.attach(metadata)
    errors = {item: outcome for item, outcome in sorted(outcomes.items()) if isinstance(outcome, FlowError)}
    if errors and not return_errors:
        raise as_map_failure(errors, len(items), metadata) from next(iter(errors.values()))
    return [outcomes[item] for item in range(len(items))]


def _outcome(call: Call, snapshot: Any) -> Any:
    """The value, or the error in its place."""
    seen = call.end(snapshot)
    if seen.error is not None:
        return seen.error
    try:
        return call.value()
    except FlowError as error:
        return error
