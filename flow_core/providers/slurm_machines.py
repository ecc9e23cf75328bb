"""What an instance_type means on a Slurm cluster, and what can be asked for. Pure: the table in the settings, then the
cluster's own GPU types and features as sinfo tells them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flow_core import gpus
from flow_core.config import SlurmSettings
from flow_core.errors import SpecRejected
from flow_core.gpus import GPURequest
from flow_core.models import Instance, TaskSpec

#: A node as `flow_core.runner.slurm_text.Node` describes it.
Node = Mapping[str, Any]

#: Options by which a table's entry asks for GPUs itself.
_GPU_OPTIONS = frozenset({"gres", "gpus", "gpus-per-node", "gpus-per-task", "tres-per-node", "tres-per-task"})

_USABLE = ("idle", "mixed", "allocated", "planned", "completing")


def choose(
    spec: TaskSpec, settings: SlurmSettings, nodes: Callable[[], Sequence[Node]]
) -> dict[str, str | None]:
    """Return the options of sbatch for what a task's nodes must have. `nodes` is called only if the table has nothing.

    Raises SpecRejected: the cluster has no such thing.
    """
    if not spec.instance_type:
        return _with_memory(spec, settings, nodes())
    request = gpus.parse(spec.instance_type)
    entry = _entry(request, settings)
    if entry is not None:
        options = {name: _count(value, request.count) for name, value in entry.items()}
        if request.count and not _GPU_OPTIONS & set(options):
            options[settings.gpu_directive] = _spelling(settings, "", request.count)
        return options
    if request.count == 0:
        return {}
    listed = nodes()
    kind = _kind(request, listed)
    if kind is not None:
        return _of_kind(settings, spec, kind, request.count, listed)
    feature = next((word for node in listed for word in node["features"] if _means(word, request)), None)
    if feature is not None and any("" in node["gpus"] for node in listed):
        return _add_constraint(
            {settings.gpu_directive: _spelling(settings, "", request.count)}, settings, feature
        )
    raise _unknown(spec, listed)


def _entry(request: GPURequest, settings: SlurmSettings) -> Mapping[str, str | None] | None:
    """Return what the table says: of this very type, or else of its GPU in any number."""
    table = {str(gpus.parse(name)): entry for name, entry in settings.instance_types.items()}
    table |= {name.lower(): entry for name, entry in settings.instance_types.items()}
    for name in (request.text.lower(), str(request).lower(), request.gpu or ""):
        if name and name in table:
            return table[name]
    return None


def _count(value: str | None, count: int) -> str | None:
    return None if value is None else value.replace("{count}", str(count))


def _spelling(settings: SlurmSettings, kind: str, count: int) -> str:
    """Return the value of the cluster's own option for GPUs: 'gpu:a100:2' for --gres, 'a100:2' for --gpus-per-node."""
    typed = f"{kind}:{count}" if kind else str(count)
    return f"gpu:{typed}" if settings.gpu_directive == "gres" else typed


def _of_kind(
    settings: SlurmSettings, spec: TaskSpec, kind: str, count: int, nodes: Sequence[Node]
) -> dict[str, str | None]:
    options: dict[str, str | None] = {settings.gpu_directive: _spelling(settings, kind, count)}
    if settings.partition is None and spec.region is None and "partition" not in settings.directives:
        partition = _partition(kind, nodes)
        if partition is not None:
            options["partition"] = partition
    return options


def _partition(kind: str, nodes: Sequence[Node]) -> str | None:
    """Return the partition with most nodes of this kind, None where the default one has some."""
    having: dict[str, int] = {}
    for node in nodes:
        if kind in node["gpus"]:
            if node["default"]:
                return None
            having[node["partition"]] = having.get(node["partition"], 0) + 1
    return max(sorted(having), key=having.__getitem__, default=None)


def _add_constraint(
    options: dict[str, str | None], settings: SlurmSettings, feature: str
) -> dict[str, str | None]:
    return {**options, "constraint": f"{settings.constraint}&{feature}" if settings.constraint else feature}


def _kinds(nodes: Sequence[Node]) -> list[str]:
    return sorted({kind for node in nodes for kind in node["gpus"]})


def _kind(request: GPURequest, nodes: Sequence[Node]) -> str | None:
    """Return the cluster's own name of a GPU, the plainest of several."""
    return min((kind for kind in _kinds(nodes) if _means(kind, request)), key=len, default=None)


def _means(word: str, request: GPURequest) -> bool:
    """Whether a cluster's word ('nvidia_a100_80gb_pcie', 'A100') names this GPU."""
    if request.gpu is None:
        return False
    model = re.search(rf"(?<![a-z0-9]){re.escape(request.gpu)}(?![a-z0-9])", word.lower().replace("_", " "))
    memory = re.search(r"(?<![0-9])([0-9]+)gb?(?![a-z0-9])", word.lower().replace("_", " "))
    same = memory is None or request.memory_gb is None or int(memory[1]) == request.memory_gb
    return model is not None and same


def _with_memory(spec: TaskSpec, settings: SlurmSettings, nodes: Sequence[Node]) -> dict[str, str | None]:
    """Choose the smallest GPU that has the memory that is asked for."""
    wanted = spec.min_gpu_memory_gb or 0
    fitting = []
    for kind in _kinds(nodes):
        memory = _memory_gb(kind)
        if memory is not None and memory >= wanted:
            fitting.append((memory, kind))
    if not fitting:
        raise _unknown(spec, nodes)
    return _of_kind(settings, spec, min(fitting)[1], spec.gpu_count, nodes)


def _memory_gb(kind: str) -> int | None:
    """Return the memory of a GPU by the cluster's name of it, None where that says nothing."""
    said = re.search(r"(?<![0-9])([0-9]+)gb?(?![a-z0-9])", kind.lower().replace("_", " "))
    if said is not None:
        return int(said[1])
    model = _model(kind)
    return None if model is None else gpus.parse(model).usual_memory_gb


def _model(kind: str) -> str | None:
    """Return our name of a GPU that the cluster calls `kind`."""
    known = (name for name in gpus.known_gpus() if _means(kind, GPURequest(count=1, gpu=name)))
    return max(known, key=len, default=None)


def _unknown(spec: TaskSpec, nodes: Sequence[Node]) -> SpecRejected:
    kinds = [kind or "GPUs without a type" for kind in _kinds(nodes)]
    what = (
        f"instance_type {spec.instance_type!r}"
        if spec.instance_type
        else f"min_gpu_memory_gb={spec.min_gpu_memory_gb}"
    )
    return SpecRejected(
        f"{what} is not to be found on this cluster, whose nodes have "
        f"{', '.join(kinds) if kinds else 'no GPUs that Slurm knows of'}",
        suggestions=[
            f"Say in the settings what it means here: slurm.instance_types: {{{spec.instance_type or 'a100'}: "
            '{gres: "gpu:{count}"}}.',
            "List what there is with flow.find_instances().",
        ],
    )


def instances(settings: SlurmSettings, nodes: Sequence[Node]) -> list[Instance]:
    """Describe what can be asked for: per partition, nodes without a GPU and shares of those with; `region` is the
    partition.
    """
    found = []
    for partition in sorted({node["partition"] for node in nodes}):
        mine = [node for node in nodes if node["partition"] == partition and node["state"] in _USABLE]
        free = sum(node["cpus_idle"] > 0 for node in mine)
        found.append(Instance(instance_type="cpu", region=partition, available=free))
        for kind in _kinds(mine):
            found += _shares(partition, kind, [node for node in mine if kind in node["gpus"]])
    known = {one.instance_type for one in found}
    for name, entry in settings.instance_types.items():
        if name not in known:
            request = gpus.parse(name)
            found.append(
                Instance(
                    instance_type=name,
                    gpu_type=request.gpu,
                    gpu_count=request.count,
                    gpu_memory_gb=request.usual_memory_gb,
                    region=entry.get("partition") or settings.partition or "",
                )
            )
    return found


def _shares(partition: str, kind: str, nodes: Sequence[Node]) -> list[Instance]:
    """One, two, four, eight and all GPUs of a node, as far as we have a name for them."""
    model = _model(kind)
    if model is None:
        return []
    most = max(node["gpus"][kind] for node in nodes)
    counts = sorted({count for count in (1, 2, 4, 8, most) if 0 < count <= most})
    return [
        Instance(
            instance_type=f"{count}x{model}",
            gpu_type=model,
            gpu_count=count,
            gpu_memory_gb=_memory_gb(kind),
            region=partition,
            available=sum((node["gpus"][kind] - node["gpus_used"].get(kind, 0)) // count for node in nodes),
        )
        for count in counts
    ]
