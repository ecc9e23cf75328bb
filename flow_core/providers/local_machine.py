"""What this machine has: its GPUs, its container engine, the environment that a task starts from."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from flow_core.errors import SpecRejected
from flow_core.models import Instance, TaskSpec
from flow_core.runner.ranks import ENGINE_VARIABLES

#: A log that is followed must not wait for a full buffer.
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}

#: Variables that a task inherits from whoever submits it: what describes the machine, nothing that belongs to the host
#: (an orchestrator's process is full of its own settings and secrets).
_KEPT = frozenset(
    (
        *("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR"),
        *("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
        *ENGINE_VARIABLES,
    )
)

#: In order of preference: the daemonless one first.
_ENGINES = ("podman", "docker", "apptainer")


def base_environment(python: str) -> dict[str, str]:
    """Return the variables that every task starts from; `python` is the one found first on PATH."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith("LC_")}
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    own = os.path.dirname(os.path.abspath(python))
    kept["PATH"] = os.pathsep.join([own, *(entry for entry in path if entry != own)])
    return {**kept, **UNBUFFERED}


def container_engine(image: str) -> str:
    """Return the path of the engine that will run `image`. Raises SpecRejected where there is none."""
    for name in _ENGINES:
        path = shutil.which(name)
        if path is not None:
            return path
    raise SpecRejected(
        f"image={image!r} needs a container engine, and this machine has none of {', '.join(_ENGINES)}",
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
        found = _nvidia_smi()
        if found is not None:
            return (
                found
                if declared is None
                else cls(found.names[:declared], found.model, found.memory_gb, real=True)
            )
        # A declared GPU answers to any name; this is the one it is listed under.
        return cls(tuple(str(index) for index in range(declared or 0)), "a100", None, real=False)

    def check(self, spec: TaskSpec) -> None:
        """Raise SpecRejected when this machine can never give `spec` its GPUs."""
        wanted = spec.gpu_count * spec.num_instances
        nodes = "" if spec.num_instances == 1 else f" on each of {spec.num_instances} nodes, {wanted} in all"
        if wanted > len(self.names):
            gpus = f"{spec.gpu_count} GPU{'s' * (spec.gpu_count > 1)}"
            has = f"this machine has {len(self.names)}" if self.names else "this machine has none"
            raise SpecRejected(
                f"instance_type {spec.instance_type!r} asks for {gpus}{nodes}, and {has}",
                suggestions=[
                    f"Ask for fewer GPUs, or declare simulated ones to try things out: FLOW_LOCAL_GPUS={wanted}."
                    if not self.real
                    else f"Ask for at most {len(self.names)}, or use a provider with larger machines.",
                ],
            )
        if (
            spec.min_gpu_memory_gb is not None
            and self.memory_gb is not None
            and spec.min_gpu_memory_gb > self.memory_gb
        ):
            raise SpecRejected(
                f"min_gpu_memory_gb={spec.min_gpu_memory_gb} is more than this machine's {self.model} has "
                f"({self.memory_gb} GB)",
                suggestions=["Lower it, or use a provider with larger GPUs."],
            )

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


def _nvidia_smi() -> Devices | None:
    """Ask the driver's own tool; None where there is no driver or it does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.count(",") == 2]
    if not rows:
        return None
    return Devices(
        tuple(row[0] for row in rows),
        _short_model(rows[0][1]),
        _gigabytes([row[2] for row in rows]),
        real=True,
    )


def _short_model(name: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'h100': the word with a digit in it, as the GPU names are written elsewhere."""
    words = name.replace("-", " ").lower().split()
    return next(
        (word for word in words if any(c.isdigit() for c in word) and not word.endswith("gb")), name.lower()
    )


def _gigabytes(mebibytes: Sequence[str]) -> int | None:
    try:
        return min(int(value) for value in mebibytes) // 1000  # 81559 MiB is sold as 80 GB
    except ValueError:
        return None
