"""Slurm's own tools: each is given a deadline, since they hang when the controller is gone. Stdlib, Python 3.8+."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from . import slurm_text
from .inventory import base_environment
from .machine import Refused
from .slurm_text import Job

#: What a cluster's users set so that the tools find it. Other variables of Slurm's would change what the tools do:
#: those of a job that we may be inside of, and the options that a user has put there for interactive work.
_OWN = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")

#: What means something on this machine alone; sbatch takes its environment to the nodes.
_HERE = ("TMPDIR", "XDG_RUNTIME_DIR")


def environment() -> dict[str, str]:
    """Return the variables for Slurm's tools; sbatch takes them to the nodes."""
    own = {name: os.environ[name] for name in _OWN if name in os.environ}
    base = {**base_environment(sys.executable), **own, "PATH": os.environ.get("PATH", os.defpath)}
    return {name: value for name, value in base.items() if name not in _HERE}


def tool(argv: list[str], *, deadline_s: float, cwd: str | None = None) -> tuple[int, str, str]:
    """Run one of Slurm's tools: (exit code, stdout, stderr). Raises Refused (deadline, no-tool)."""
    try:
        done = subprocess.run(
            argv,
            env=environment(),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=deadline_s,
            start_new_session=True,
            check=False,
        )
    except FileNotFoundError as error:
        if error.filename != argv[0]:  # the folder to run it in
            raise Refused("unavailable", str(error)) from error
        raise Refused(
            "no-tool",
            f"there is no {argv[0]!r} on this machine",
            ("Install Slurm's client tools here, or set slurm.host to a login node that has them.",),
        ) from error
    except subprocess.TimeoutExpired:
        raise Refused("deadline", f"{argv[0]} did not answer within {deadline_s:g} s") from None
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def ask(argv: list[str], *, deadline_s: float) -> str:
    """Return what a tool prints. Raises Refused (unavailable) with its own words where it fails."""
    try:
        code, out, err = tool(argv, deadline_s=deadline_s)
    except Refused as refused:
        if refused.kind != "deadline":
            raise
        raise Refused("unavailable", refused.message, ("Is Slurm's controller up?",)) from refused
    if code != 0:
        raise Refused("unavailable", f"{argv[0]}: {slurm_text.words(err) or f'exit code {code}'}")
    return out


def queue(names: list[str], deadline_s: float, user: str = "--me") -> list[Job]:
    """Return the jobs that Slurm knows (`slurm_text.queue_command`). Raises Refused (unavailable, no-tool)."""
    return slurm_text.parse_queue(ask(slurm_text.queue_command(names, user), deadline_s=deadline_s))


def accounted(forgotten: dict[str, str], deadline_s: float) -> dict[str, Job | None]:
    """Ask the accounting for jobs that the queue has forgotten; a cluster that has none says so with an error."""
    try:
        code, out, _err = tool(slurm_text.accounting_command(sorted(forgotten)), deadline_s=deadline_s)
    except Refused:
        return {}
    jobs = slurm_text.parse_accounting(out) if code == 0 else []
    return {forgotten[job.id]: job for job in jobs if job.id in forgotten}


def cluster_name(deadline_s: float) -> str | None:
    """Return the name of the cluster that the tools speak with, None where it does not tell. Asked once."""
    conf = os.environ.get("SLURM_CONF", "")
    if conf not in _clusters:
        try:
            named = setting("ClusterName", deadline_s=deadline_s)
        except Refused:
            return None
        if named is None:
            return None
        _clusters[conf] = named
    return _clusters[conf]


#: Names of clusters by the configuration that leads to them.
_clusters: dict[str, str] = {}


def nodes(*, deadline_s: float) -> list[dict[str, Any]]:
    """Return every node in every partition (`slurm_text.Node`)."""
    listed = slurm_text.parse_nodes(ask(slurm_text.nodes_command(), deadline_s=deadline_s))
    return [node._asdict() for node in listed]


def setting(name: str, *, deadline_s: float) -> str | None:
    """Return one value of the cluster's own configuration."""
    return slurm_text.parse_setting(ask(["scontrol", "show", "config"], deadline_s=deadline_s), name)
