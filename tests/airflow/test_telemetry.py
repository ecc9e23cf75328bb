"""What is told of the remote work: a closing line, a span, OpenLineage facets, the asset events of outlets.

The operators run here as Airflow's worker runs them, against the local provider; only what they are given of Airflow is
made up.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import Asset
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from flow_airflow.compat import TaskDeferred
from flow_airflow.telemetry import closing_line
from flow_core import Flow
from flow_core.models import Snapshot, TaskStatus
from tests.airflow.one_worker import NOON, node, worker

pytestmark = pytest.mark.usefixtures("home")

# -- the closing line


def snapshot(**facts: Any) -> Snapshot:
    times = {
        "submitted_at": NOON,
        "started_at": NOON + timedelta(seconds=3),
        "ended_at": NOON + timedelta(seconds=44),
    }
    return Snapshot(
        **{"task_id": "fit-1", "name": "fit", "status": TaskStatus.COMPLETED, "instance_type": "1xh100"}
        | times
        | facts
    )


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({}, "Flow task fit-1 completed: 1xh100, waited 3.0 s, ran 41.0 s."),
        (
            {
                "hosts": ("gpu7",),
                "gpu_utilization_percent": 87.4,
                "peak_gpu_memory_bytes": 10 * 2**30,
                "cost_per_hour_usd": 4.0,
                "total_cost_usd": 1.204,
            },
            "Flow task fit-1 completed: 1xh100 on gpu7, waited 3.0 s, ran 41.0 s, GPU 87 % busy, "
            "10.0 GiB of GPU memory at most, $1.20.",
        ),
        (
            {"cost_per_hour_usd": 0.0, "total_cost_usd": 0.0, "hosts": ("me",)},
            "on me, waited 3.0 s, ran 41.0 s.",
        ),
        ({"status": TaskStatus.CANCELLED, "started_at": None}, "fit-1 cancelled: 1xh100, waited 44.0 s."),
        ({"ended_at": NOON + timedelta(hours=2, minutes=3)}, "ran 2 h 02 min."),
        ({"ended_at": NOON + timedelta(seconds=63)}, "ran 1 min 00 s."),
        (
            {"num_instances": 5, "hosts": tuple("abcde"), "preemptions": 2},
            "5 times 1xh100 on a, b, c and 2 more, waited 3.0 s, ran 41.0 s, preempted 2 times.",
        ),
    ],
)
def test_the_closing_line_says_what_is_known_and_nothing_else(facts: dict[str, Any], line: str) -> None:
    assert closing_line(snapshot(**facts)).endswith(line)


def test_a_task_that_fails_is_closed_with_the_same_line_once() -> None:
    with capture_logs() as logs, pytest.raises(Exception, match="exit code 3"):
        worker(node(command="exit 3", gpu="a100"))
    (line,) = [text for one in logs if " failed: a100 on " in (text := str(one))]
    assert "waited" in line and "ran" in line


# -- spans


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(made)
    return made


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


def of_the_work(spans: InMemorySpanExporter) -> ReadableSpan:
    (one,) = [span for span in spans.get_finished_spans() if span.name.startswith("flow ")]
    return one


def traceparent(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{int(span.context.trace_flags):02x}"


def test_the_remote_process_is_inside_the_span_of_its_work(
    provider: TracerProvider, spans: InMemorySpanExporter
) -> None:
    with provider.get_tracer("airflow").start_as_current_span("worker.fit") as around:
        told, _ = worker(node(command='sleep 0.2; echo "$TRACEPARENT"'))
    work = of_the_work(spans)
    assert told == traceparent(work)
    assert work.parent is not None
    assert work.parent.span_id == around.get_span_context().span_id
    assert work.attributes is not None
    assert work.attributes["flow.status"] == "completed"
    assert work.start_time is not None and work.end_time is not None
    assert 0.2 <= (work.end_time - work.start_time) / 1e9 < 60


def test_a_deferred_task_has_one_span_over_all_of_it_with_a_link_to_the_leg_that_took_over(
    provider: TracerProvider, spans: InMemorySpanExporter
) -> None:
    tracer = provider.get_tracer("airflow")
    command = 'sleep 1; echo "$TRACEPARENT"'
    with tracer.start_as_current_span("worker.fit") as first, pytest.raises(TaskDeferred) as deferred:
        worker(node(command=command, deferrable=True, defer_after_s=0))
    assert not [span for span in spans.get_finished_spans() if span.name.startswith("flow ")]
    task_id = deferred.value.trigger.flow_task_id
    Flow("local").wait([task_id], timeout=30)
    with tracer.start_as_current_span("worker.fit") as second:
        event = {"flow_task_id": task_id, "outcome": "ended", "log_offsets": [0]}
        told, _ = worker(node(command=command, deferrable=True), "execute_complete", event=event)
    work = of_the_work(spans)
    assert told == traceparent(work)
    assert work.parent is not None
    assert work.parent.span_id == first.get_span_context().span_id
    assert [link.context.span_id for link in work.links] == [second.get_span_context().span_id]
    assert work.start_time is not None and work.end_time is not None
    assert work.end_time - work.start_time >= 1e9


def test_a_failure_is_an_error_in_the_trace(provider: TracerProvider, spans: InMemorySpanExporter) -> None:
    with (
        provider.get_tracer("airflow").start_as_current_span("worker.fit"),
        pytest.raises(Exception, match="code 3"),
    ):
        worker(node(command="exit 3"))
    assert of_the_work(spans).status.status_code is trace.StatusCode.ERROR


def test_without_a_current_span_the_task_instances_own_context_is_continued(
    provider: TracerProvider, spans: InMemorySpanExporter
) -> None:
    carrier = {"traceparent": f"00-{7:032x}-{9:016x}-01", "tracestate": "vendor=x"}
    told, _ = worker(node(command='echo "$TRACEPARENT $TRACESTATE"'), carrier=carrier)
    work = of_the_work(spans)
    assert told == f"{traceparent(work)} vendor=x"
    assert work.context is not None and work.parent is not None
    assert (work.context.trace_id, work.parent.span_id) == (7, 9)


def test_a_users_own_traceparent_is_left_alone(provider: TracerProvider, spans: InMemorySpanExporter) -> None:
    with provider.get_tracer("airflow").start_as_current_span("worker.fit"):
        told, _ = worker(node(command='echo "$TRACEPARENT"', env={"TRACEPARENT": "mine"}))
    assert told == "mine"
    assert not [span for span in spans.get_finished_spans() if span.name.startswith("flow ")]


def test_a_retry_in_another_span_adopts_the_work_without_a_word_about_other_settings(
    provider: TracerProvider, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = provider.get_tracer("airflow")
    told = []
    for _ in range(2):
        with tracer.start_as_current_span("worker.fit"):
            told.append(worker(node(command='echo "$TRACEPARENT"'))[0])
    assert told[0] == told[1]
    assert "used before for something else" not in caplog.text


WITHOUT_SDK = """
import sys
sys.path[:0] = {path!r}
from tests.airflow.one_worker import node, worker
print(worker(node(command='echo "[$TRACEPARENT]"'), carrier={carrier!r})[0])
"""


@pytest.mark.parametrize(
    ("carrier", "told"),
    [({}, "[]"), ({"traceparent": f"00-{7:032x}-{9:016x}-01"}, f"[00-{7:032x}-{9:016x}-01]")],
)
def test_where_nothing_records_spans_the_remote_process_continues_airflows_context(
    carrier: dict[str, str], told: str
) -> None:
    code = WITHOUT_SDK.format(path=[str(Path(__file__).parents[2])], carrier=carrier)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines()[-1:] == [told], done.stderr


# -- outlets and lineage


def test_an_outlets_event_names_the_task_and_where_its_result_lies(home: Path) -> None:
    (home / "made.py").write_text("def made(): return [0] * 100")
    model = Asset("s3://bucket/model")
    arguments: dict[str, Any] = {"module": str(home / "made.py"), "function": "made", "outlets": [model]}
    ref, context = worker(node(**arguments, result_as="reference"))
    extra = context["outlet_events"][model].extra
    assert extra["flow_object"] == ref.uri
    assert extra["flow_task_id"] in ref.uri


def test_openlineage_hears_what_a_node_reads_and_writes_and_what_its_task_has_used(home: Path) -> None:
    from airflow.providers.openlineage.extractors.manager import ExtractorManager
    from airflow.sdk.api.datamodels._generated import TaskInstanceState

    (home / "made.py").write_text("def made(given=None): return [0] * 100")
    arguments: dict[str, Any] = {
        "module": str(home / "made.py"),
        "function": "made",
        "result_as": "reference",
    }
    ref, _ = worker(node(**arguments, task_id="first"))
    reader = node(
        **arguments, op_args=[{"deep": [ref]}], data_mounts=[{"source": "s3://raw/images", "target": "/d"}]
    )
    manager: Any = ExtractorManager()  # type: ignore[no-untyped-call]
    run = SimpleNamespace(run_id="manual__2030")

    started = manager.extract_metadata(run, reader, TaskInstanceState.RUNNING, None)
    read = [("flow+task://local", f"{ref.place.task_id}/result"), ("s3://raw", "images")]
    assert [(one.namespace, one.name) for one in started.inputs] == read
    assert not started.outputs and not started.run_facets

    reader.data_mounts = None  # which the local provider has not
    written, _ = worker(reader)
    ended = manager.extract_metadata(run, reader, TaskInstanceState.SUCCESS, None)
    assert [(one.namespace, one.name) for one in ended.inputs] == read[:1]
    assert [one.name for one in ended.outputs] == [f"{written.place.task_id}/result"]
    facet = ended.run_facets["flow_task"]
    assert (facet.task["task_id"], facet.task["status"]) == (written.place.task_id, "completed")


def test_nothing_of_openlineage_is_imported_until_it_asks() -> None:
    code = (
        "import sys, flow_airflow.operators\n"
        "print([one for one in ('openlineage', 'airflow.providers.openlineage.extractors') if one in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
