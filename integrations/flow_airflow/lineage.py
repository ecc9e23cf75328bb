"""What OpenLineage is told of a node: the data it reads and writes by reference or mount, and what its task has used.

Duck-typed, as Airflow's OpenLineage provider asks for it: nothing of that is imported before it asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flow_core import ObjectRef

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

    from flow_core.models import Snapshot

_PRODUCER = "https://pypi.org/project/flow-gpu/"
_SCHEMA = _PRODUCER + "#FlowTaskRunFacet"


class TellsLineage:
    """What Airflow's OpenLineage provider asks an operator for."""

    #: The last snapshot of the task that this try stood for, once it has ended.
    ended: Snapshot | None = None

    #: What was handed on.
    written: Any = None

    def get_openlineage_facets_on_start(self) -> OperatorLineage[Any, Any]:
        """Return what the node reads."""
        return lineage(*self._reads())

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:  # noqa: ARG002  # theirs
        """Return what the node has read and written, and what its task has used."""
        return lineage(*self._reads(), self.written, self.ended)

    def get_openlineage_facets_on_failure(self, task_instance: Any) -> OperatorLineage[Any, Any]:
        """Return what is known of a node that has failed."""
        return self.get_openlineage_facets_on_complete(task_instance)

    def _reads(self) -> tuple[list[Any], list[Any]]:
        given = [getattr(self, name, None) for name in ("op_args", "op_kwargs")]
        return given, list(getattr(self, "data_mounts", None) or ())


def lineage(
    reads: Any, mounts: Sequence[Any], written: Any = None, seen: Snapshot | None = None
) -> OperatorLineage[Any, Any]:
    """Return what a node reads (references in `reads`, sources of `mounts`) and writes, and its task as a run facet."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    inputs = dict.fromkeys([*(ref.uri for ref in _refs(reads)), *_sources(mounts)])
    outputs = dict.fromkeys(ref.uri for ref in _refs(written))
    return OperatorLineage(
        inputs=[_dataset(uri) for uri in inputs],
        outputs=[_dataset(uri) for uri in outputs],
        run_facets={} if seen is None else {"flow_task": _facet(seen)},
    )


def _refs(value: Any) -> Iterator[ObjectRef]:
    if ObjectRef.stands_in(value):
        yield ObjectRef.of(value)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _refs(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _refs(part)


def _sources(mounts: Sequence[Any]) -> Iterator[str]:
    for mount in mounts:
        source = mount.get("source") if isinstance(mount, Mapping) else getattr(mount, "source", None)
        if isinstance(source, str):
            yield source if "://" in source else f"file://{source}"


def _dataset(uri: str) -> Any:
    """Name a dataset as OpenLineage does: where it lies as the namespace, its path as the name."""
    from openlineage.client.event_v2 import Dataset

    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Dataset(namespace="file", name=parts.path)
    return Dataset(namespace=f"{parts.scheme}://{parts.netloc}", name=parts.path.strip("/") or "/")


def _facet(seen: Snapshot) -> Any:
    import attr
    from openlineage.client.generated.base import RunFacet

    @attr.define
    class FlowTaskRunFacet(RunFacet):
        task: dict[str, Any]

        @staticmethod
        def _get_schema() -> str:
            return _SCHEMA

    facts = asdict(seen)
    shown = ("task_id", "status", "reason", "exit_code", "instance_type", "num_instances", "region", "hosts")
    used = ("gpus", "preemptions", "gpu_utilization_percent", "peak_gpu_memory_bytes", "peak_memory_bytes")
    task = {name: facts[name] for name in (*shown, *used, "total_cost_usd")}
    moments = {
        name: facts[name] and facts[name].isoformat() for name in ("submitted_at", "started_at", "ended_at")
    }
    return FlowTaskRunFacet(task={**task, "status": seen.status.value, **moments}, producer=_PRODUCER)
