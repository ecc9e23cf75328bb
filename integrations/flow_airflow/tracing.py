"""A span around the remote work, whose context the remote process gets as TRACEPARENT. OpenTelemetry is optional.

No span can stay open from the submit to the end: while a task is deferred, no process of ours runs. So its id is made
up at the submit, where the remote process gets it and the task's labels keep it, and the span is emitted at the end,
with the times that the provider tells. It is one and the same in both modes, and after a retry has adopted the work.
Where nothing records spans here, the remote process continues Airflow's own context.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datetime import datetime

    from opentelemetry.trace import SpanContext

    from flow_core.models import Snapshot

TRACEPARENT = "TRACEPARENT"

#: The label that keeps, until the end, what the remote process was given, and whose child its span is.
_LABEL = "airflow/span"
_KEPT = re.compile(
    r"(?P<trace>[0-9a-f]{32}) (?P<span>[0-9a-f]{16}) (?P<parent>[0-9a-f]{16}) (?P<flags>[0-9a-f]{2})"
)


class HandedOn(NamedTuple):
    """What a task gets so that its work is part of the trace: variables, and labels."""

    env: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}


def handed_on(context: Mapping[str, Any]) -> HandedOn:
    """Return what puts the work under the current span, or else under the task instance's own context."""
    try:
        from opentelemetry import trace
    except ImportError:
        return HandedOn()
    parent = _parent(context)
    if parent is None:
        return HandedOn()
    generator = getattr(_tracer(), "id_generator", None)  # only the SDK's tracers have one, and record
    flags = int(parent.trace_flags)
    span = parent.span_id if generator is None else generator.generate_span_id()
    ids = (trace.format_trace_id(parent.trace_id), trace.format_span_id(span))
    env = {TRACEPARENT: f"00-{ids[0]}-{ids[1]}-{flags:02x}"}
    if parent.trace_state:
        env["TRACESTATE"] = parent.trace_state.to_header()
    if generator is None:
        return HandedOn(env)
    return HandedOn(env, {_LABEL: f"{ids[0]} {ids[1]} {trace.format_span_id(parent.span_id)} {flags:02x}"})


def emit_span(seen: Snapshot) -> None:
    """Emit the span of an ended task, from its submit to its end. Does nothing where its submitter made up no id."""
    kept = _KEPT.fullmatch(seen.labels.get(_LABEL, ""))
    if kept is None or seen.submitted_at is None or seen.ended_at is None:
        return
    from opentelemetry import trace

    tracer: Any = copy.copy(_tracer())  # ours alone: the provider hands out the same one to all
    if not hasattr(tracer, "id_generator"):
        return
    tracer.id_generator = _Given(int(kept["span"], 16))
    parent = trace.SpanContext(
        int(kept["trace"], 16), int(kept["parent"], 16), True, trace.TraceFlags(int(kept["flags"], 16))
    )
    now = trace.get_current_span().get_span_context()
    span = tracer.start_span(
        f"flow {seen.name}",
        context=trace.set_span_in_context(trace.NonRecordingSpan(parent)),
        kind=trace.SpanKind.CLIENT,
        attributes=_attributes(seen),
        links=[trace.Link(now)] if now.is_valid and now.span_id != parent.span_id else (),
        start_time=_nanoseconds(seen.submitted_at),
    )
    if seen.started_at is not None:
        span.add_event("started", timestamp=_nanoseconds(seen.started_at))
    if not seen.status.succeeded:
        span.set_status(trace.StatusCode.ERROR, seen.message or seen.reason)
    span.end(_nanoseconds(seen.ended_at))


def _tracer() -> Any:
    from opentelemetry import trace

    return trace.get_tracer_provider().get_tracer("flow_airflow")


def _parent(context: Mapping[str, Any]) -> SpanContext | None:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    span = trace.get_current_span()
    if not span.get_span_context().is_valid:
        carrier = getattr(context["ti"], "context_carrier", None) or {}
        span = trace.get_current_span(TraceContextTextMapPropagator().extract(carrier))
    found = span.get_span_context()
    return found if found.is_valid else None


def _attributes(seen: Snapshot) -> dict[str, str | int | float]:
    facts: dict[str, str | int | float | None] = {
        "flow.task_id": seen.task_id,
        "flow.status": seen.status.value,
        "flow.reason": seen.reason,
        "flow.exit_code": seen.exit_code,
        "flow.instance_type": seen.instance_type,
        "flow.hosts": ",".join(seen.hosts),
        "flow.gpu_utilization_percent": seen.gpu_utilization_percent,
        "flow.cost_usd": seen.total_cost_usd,
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1000


class _Given:
    """Gives a span the id that was made up for it when its task was submitted."""

    def __init__(self, span_id: int) -> None:
        self._span_id = span_id

    def generate_span_id(self) -> int:
        return self._span_id

    def generate_trace_id(self) -> int:
        raise AssertionError("the span has a parent")

    def is_trace_id_random(self) -> bool:
        return False
