"""What a machine has, against what a task asks for: GPUs and a container engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flow_core import gpus
from flow_core.errors import SpecRejected
from flow_core.models import Instance, TaskSpec
from flow_core.runner import inventory


def container_engine(image: str) -> str:
    """Return the path of the engine that will run `image`. Raises SpecRejected where there is none."""
    path = inventory.container_engine()
    if path is None:
        raise no_engine(image, "this machine")
    return path


def no_engine(image: str, where: str) -> SpecRejected:
    """Say that images cannot be run there."""
    return SpecRejected(
        f"image={image!r} needs a container engine, and {where} has none of {', '.join(inventory.ENGINES)}",
        suggestions=[
            "Install podman, docker or apptainer.",
            "Leave image out: the task then runs on the machine itself.",
        ],
    )


@dataclass(frozen=True)
class Devices:
    """The GPUs that are shared out on this machine: `names` as CUDA_VISIBLE_DEVICES takes them."""

    names: tuple[str, ...]
    model: str
    memory_gb: int | None
    real: bool

    @classmethod
    def of_this_machine(cls, declared: int | None) -> Devices:
        """Find the GPUs, or take the declared number; with both, the declared number of the real ones."""
        return cls.from_facts(inventory.gpus(declared))

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Devices:
        """Take what a machine says of its GPUs (`flow_core.runner.inventory.gpus`)."""
        return cls(tuple(facts["names"]), facts["model"], facts["memory_gb"], facts["real"])

    def check(self, spec: TaskSpec, *, where: str = "this machine", strict: bool = False) -> None:
        """Raise SpecRejected when the machine can never give `spec` its GPUs; with `strict`, of the model asked for."""
        wanted = spec.gpu_count * spec.num_instances
        nodes = "" if spec.num_instances == 1 else f" on each of {spec.num_instances} nodes, {wanted} in all"
        if wanted > len(self.names):
            asked = f"{spec.gpu_count} GPU{'s' * (spec.gpu_count > 1)}"
            has = f"{where} has {len(self.names)}" if self.names else f"{where} has none"
            raise SpecRejected(
                f"instance_type {spec.instance_type!r} asks for {asked}{nodes}, and {has}",
                suggestions=[self._way_out(wanted, where)],
            )
        if strict and self.real and not self._is(spec):
            raise SpecRejected(
                f"instance_type {spec.instance_type!r} is not what {where} has: {self.model}",
                suggestions=[f"Ask for {spec.gpu_count}x{self.model}, or for any by min_gpu_memory_gb."],
            )
        if (
            spec.min_gpu_memory_gb is not None
            and self.memory_gb is not None
            and spec.min_gpu_memory_gb > self.memory_gb
        ):
            raise SpecRejected(
                f"min_gpu_memory_gb={spec.min_gpu_memory_gb} is more than {where}'s {self.model} has "
                f"({self.memory_gb} GB)",
                suggestions=["Lower it, or use a provider with larger GPUs."],
            )

    def _way_out(self, wanted: int, where: str) -> str:
        if self.real:
            return f"Ask for at most {len(self.names)}, or use a provider with larger machines."
        if where == "this machine":
            return (
                f"Ask for fewer GPUs, or declare simulated ones to try things out: FLOW_LOCAL_GPUS={wanted}."
            )
        return "Ask for fewer GPUs, or declare them: gpus of the host in ssh.hosts."

    def _is(self, spec: TaskSpec) -> bool:
        """Whether these are the GPUs that are asked for by name; nvidia-smi's "4090" is our "rtx4090"."""
        wanted = gpus.parse(spec.instance_type).gpu if spec.instance_type else None
        return wanted is None or self.model in (wanted, wanted.removeprefix("rtx"))

    def instances(self, busy: int) -> list[Instance]:
        """Describe the shares of this machine that can be asked for: none, one, two, four … and all of its GPUs."""
        total = len(self.names)
        counts = sorted({count for count in (1, 2, 4, 8, total) if 0 < count <= total})
        cpu = Instance(instance_type="cpu", price_per_hour=0.0, region="local", available=1)
        return [cpu] + [
            Instance(
                instance_type=f"{count}x{self.model}",
                gpu_type=self.model,
                gpu_count=count,
                gpu_memory_gb=self.memory_gb,
                available=(total - busy) // count,
                instance_id=None if self.real else "simulated",
                price_per_hour=0.0,
                region="local",
            )
            for count in counts
        ]
