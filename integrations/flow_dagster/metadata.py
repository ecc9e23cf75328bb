"""What is known of tasks, as Dagster metadata. Pure: snapshots in, `flow/*` keys out.

A value that nobody knows has no key: Dagster plots numbers, and a zero would be a lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import dagster as dg

from flow_core import gpus
from flow_core.errors import FlowError
from flow_core.models import Snapshot

_MOST_ROWS = 200  # of a table that a browser still shows


@dataclass(frozen=True)
class Seen:
    """One task as metadata sees it; `item` is its place in a `map`, `reattached` None where that cannot matter."""

    snapshot: Snapshot
    provider: str
    reattached: bool | None = None
    item: int | None = None
    error: FlowError | None = None


def describe(tasks: Sequence[Seen]) -> dict[str, Any]:
    """Return the metadata of a step that ran these tasks: the values of one, or the totals of many and a table."""
    if len(tasks) == 1:
        return _one(tasks[0])
    return _many(tasks) if tasks else {}


def _one(task: Seen) -> dict[str, Any]:
    seen = task.snapshot
    return _known(
        {
            "flow/task_id": seen.task_id,
            "flow/provider": task.provider,
            "flow/status": seen.status.value,
            **_machine(seen),
            "flow/queue_seconds": _seconds(seen.submitted_at, seen.started_at),
            "flow/duration_seconds": _seconds(seen.started_at, seen.ended_at),
            "flow/exit_code": seen.exit_code,
            "flow/signal": seen.signal,
            "flow/reason": seen.reason if seen.reason != "exit" else None,
            "flow/attempts": _attempt(seen.task_id),
            "flow/preemptions": seen.preemptions,
            "flow/peak_memory_bytes": seen.peak_memory_bytes,
            "flow/price_per_hour_usd": seen.cost_per_hour_usd,
            "flow/cost_usd": seen.total_cost_usd,
            "flow/reattached": task.reattached,
            "flow/error": _error(task.error),
        }
    )


def _many(tasks: Sequence[Seen]) -> dict[str, Any]:
    seen = [task.snapshot for task in tasks]
    same = [_machine(one) for one in seen]
    return _known(
        {
            "flow/tasks": len(tasks),
            "flow/failed_tasks": sum(1 for task in tasks if task.error is not None),
            "flow/provider": _only({task.provider for task in tasks}),
            **{
                key: _only({machine.get(key) for machine in same})
                for key in ("flow/instance_type", "flow/gpu", "flow/gpu_count")
            },
            "flow/longest_queue_seconds": max(
                _all(_seconds(one.submitted_at, one.started_at) for one in seen), default=None
            ),
            "flow/duration_seconds": _total(_seconds(one.started_at, one.ended_at) for one in seen),
            "flow/preemptions": sum(one.preemptions for one in seen),
            "flow/peak_memory_bytes": max(_all(one.peak_memory_bytes for one in seen), default=None),
            "flow/cost_usd": _total(one.total_cost_usd for one in seen),
            "flow/task_table": _table(tasks[:_MOST_ROWS]),
        }
    )


def _machine(seen: Snapshot) -> dict[str, Any]:
    if not seen.instance_type:
        return {}
    wanted = gpus.parse(seen.instance_type)
    count = None if wanted.instance_id else wanted.count * seen.num_instances
    return _known(
        {
            "flow/instance_type": seen.instance_type,
            "flow/gpu": wanted.gpu,
            "flow/gpu_count": count,
            "flow/nodes": seen.num_instances if seen.num_instances > 1 else None,
            "flow/region": seen.region or None,
        }
    )


def _table(tasks: Sequence[Seen]) -> dg.TableMetadataValue:
    columns = ("item", "task_id", "status", "exit_code", "queue_seconds", "duration_seconds", "error")
    return dg.MetadataValue.table(
        records=[dg.TableRecord(dict(zip(columns, _row(task), strict=True))) for task in tasks],
        schema=dg.TableSchema(columns=[dg.TableColumn(name, type="string") for name in columns]),
    )


def _row(task: Seen) -> tuple[str, ...]:
    seen = task.snapshot
    queue, duration = _seconds(seen.submitted_at, seen.started_at), _seconds(seen.started_at, seen.ended_at)
    values = (task.item, seen.task_id, seen.status.value, seen.exit_code, queue, duration, _error(task.error))
    return tuple("" if value is None else str(value) for value in values)


def _error(error: FlowError | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error.message}"


def _attempt(task_id: str) -> int | None:
    """The attempt is the last part of a task id."""
    last = task_id.rpartition("-")[2]
    return int(last) if last.isdecimal() else None


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else round(max(0.0, (end - start).total_seconds()), 3)


def _all(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _total(values: Iterable[float | None]) -> float | None:
    known = _all(values)
    return round(sum(known), 6) if known else None


def _only(values: set[Any]) -> Any:
    """The value that all share, None where they differ."""
    return values.pop() if len(values) == 1 else None


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def plain(metadata: Mapping[str, Any]) -> str:
    """Return one line for a log: `task_id=… status=…`, without tables."""
    shown = {
        name.removeprefix("flow/"): value
        for name, value in metadata.items()
        if isinstance(value, str | int | float)
    }
    return " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in shown.items()
    )
