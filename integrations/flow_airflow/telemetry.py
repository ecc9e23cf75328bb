"""What an ended task has used, as one line for people, and what it has made, on the asset events of its outlets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset

from flow_core import ObjectRef

if TYPE_CHECKING:
    from datetime import datetime

    from flow_core.models import Snapshot


def closing_line(seen: Snapshot) -> str:
    """Return a sentence such as "Flow task t-1 completed: 1xh100 on gpu7, waited 3.0 s, ran 41 s, GPU 87 % busy"."""
    return f"Flow task {seen.task_id} {seen.status.value}: {', '.join(_facts(seen))}."


def mark_outlets(context: Mapping[str, Any], task_id: str, value: Any) -> None:
    """Write the task's id, and where a result by reference lies, on the asset events of the node's outlets."""
    extra = {"flow_task_id": task_id}
    if isinstance(value, ObjectRef):
        extra["flow_object"] = value.uri
    for outlet in getattr(context["task"], "outlets", None) or ():
        if isinstance(outlet, Asset):
            context["outlet_events"][outlet].extra.update(extra)


def _facts(seen: Snapshot) -> Iterator[str]:
    machine = (
        f"{seen.num_instances} times {seen.instance_type}" if seen.num_instances > 1 else seen.instance_type
    )
    hosts = list(dict.fromkeys(seen.hosts))
    shown = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
    yield " on ".join(part for part in (machine, shown) if part) or "no machine"
    waited = _seconds(seen.submitted_at, seen.started_at or seen.ended_at)
    if waited is not None:
        yield f"waited {_duration(waited)}"
    ran = _seconds(seen.started_at, seen.ended_at)
    if ran is not None:
        yield f"ran {_duration(ran)}"
    if seen.preemptions:
        yield f"preempted {seen.preemptions} time{'s' * (seen.preemptions > 1)}"
    if seen.gpu_utilization_percent is not None:
        yield f"GPU {seen.gpu_utilization_percent:.0f} % busy"
    if seen.peak_gpu_memory_bytes:
        yield f"{seen.peak_gpu_memory_bytes / 2**30:.1f} GiB of GPU memory at most"
    if seen.total_cost_usd and seen.cost_per_hour_usd:  # what costs nothing needs no word
        yield f"${seen.total_cost_usd:.2f}"


def _seconds(begin: datetime | None, end: datetime | None) -> float | None:
    return None if begin is None or end is None else max(0.0, (end - begin).total_seconds())


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
