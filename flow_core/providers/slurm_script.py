"""The batch script: what is asked of Slurm, and how our runner is started. Pure.

Nothing of the user's stands in it but options of sbatch, quoted, and the set-up that the settings hold. Commands,
arguments and variables travel as files.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flow_core.config import SlurmSettings
from flow_core.errors import ConfigError
from flow_core.models import TaskSpec


@dataclass(frozen=True)
class Batch:
    """A batch script in its parts. `directives` are options of sbatch; None stands for an option without a value.

    `runner` is the command that starts our runner on `subject` (a task's folder, or an array's list of folders).
    """

    name: str
    folder: str
    directives: Mapping[str, str | None]
    runner: tuple[str, ...]
    subject: tuple[str, ...]
    modules: tuple[str, ...] = ()
    setup: str | None = None
    elements: int | None = None
    max_running: int | None = None


def wishes(
    spec: TaskSpec, settings: SlurmSettings, machine: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Return what a task asks Slurm for: options of sbatch. `machine` are those that its instance_type stands for.

    Later ones win: the settings' own fields, the instance type's, the settings' further directives, the task's.
    """
    fields: dict[str, Any] = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "reservation": settings.reservation,
        "mem": settings.memory,
        "cpus-per-task": settings.cpus,
    }
    options: dict[str, str | None] = {name: str(value) for name, value in fields.items() if value is not None}
    if settings.exclusive:
        options["exclusive"] = None
    if settings.requeue is not None:
        options["requeue" if settings.requeue else "no-requeue"] = None
    options |= machine
    options |= settings.directives
    if spec.region is not None:
        options["partition"] = spec.region
    if spec.memory_mb is not None:
        options["mem"] = f"{spec.memory_mb}M"
    options |= {"nodes": str(spec.num_instances), "ntasks-per-node": "1"}
    if spec.max_run_time_s is not None:
        options["time"] = str(minutes(spec.max_run_time_s, settings))
    return options


def minutes(max_run_time_s: float, settings: SlurmSettings) -> int:
    """Return the limit that Slurm is given. Our runner keeps the exact one; Slurm's must never come first."""
    return math.ceil((max_run_time_s + settings.kill_grace_s) / 60) + settings.time_margin_min


def render(batch: Batch) -> str:
    """Return the batch script. Raises ConfigError for a path that Slurm would read as something else."""
    if "\\" in batch.folder or any(ord(sign) < 32 for sign in batch.folder):
        raise ConfigError(
            f"slurm.home leads to {batch.folder!r}, which Slurm cannot write its output to",
            suggestions=["Choose a home without a backslash or a control character in its path."],
        )
    output = "slurm.out" if batch.elements is None else "slurm-%a.out"
    options: dict[str, str | None] = {
        "job-name": batch.name,
        "output": f"{batch.folder.replace('%', '%%')}/{output}",
        "open-mode": "append",  # a requeue would empty it
        "chdir": batch.folder,
        "kill-on-invalid-dep": "yes",  # else such a job waits for ever
        **batch.directives,
    }
    if batch.elements is not None:
        throttle = "" if batch.max_running is None else f"%{batch.max_running}"
        options["array"] = f"0-{batch.elements - 1}{throttle}"
    shell = "#!/bin/bash -l" if batch.modules else "#!/bin/sh"  # a login shell knows `module`
    lines = [shell, *(_directive(name, value) for name, value in options.items()), ""]
    lines += [f"module load {shlex.quote(name)} || exit" for name in batch.modules]
    if batch.setup is not None:
        lines += batch.setup.splitlines()
    lines.append(f"exec {shlex.join([*batch.runner, 'batch', *batch.subject])}")
    return "\n".join(lines) + "\n"


def _directive(name: str, value: str | None) -> str:
    if value is None:
        return f"#SBATCH --{name}"
    return f"#SBATCH --{name}={quoted(value)}"


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./:,@%&|*[](){}!<>?~^")


def quoted(value: str) -> str:
    """Write a value as sbatch reads it in a script: it knows double quotes and backslashes; no shell looks at it."""
    if value and set(value) <= _PLAIN:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
