"""Commands beside a task of a cluster: in its allocation, on the node that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flow_core.errors import TaskNotFoundError, ValidationError
from flow_core.providers import folder as folders
from flow_core.providers.slurm_site import Site, is_terminal


class SlurmShell:
    """The `shell` capability."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def run(self, task_id: str, command: str | None, *, node: int = 0) -> int:
        facts = self._facts(task_id)
        job, nodes = facts["job"], int(facts["spec"]["spec"]["num_instances"])
        if facts["started"] is None or facts["exit"] is not None or job is None:
            raise ValidationError(
                f"task {task_id!r} is not running", suggestions=["Read what it printed with task.logs()."]
            )
        if not 0 <= node < nodes:
            raise ValidationError(f"node={node} does not exist: task {task_id!r} has {nodes}, counted from 0")
        terminal = command is None and is_terminal()
        return self.site.terminal(self._srun(task_id, job, node, command, terminal=terminal), pty=terminal)

    def step(self, task_id: str, command: str) -> list[str] | None:
        """Return the argument list that runs a command on the task's first node; None where it does not run."""
        facts = self._facts(task_id)
        if facts["started"] is None or facts["exit"] is not None or facts["job"] is None:
            return None
        return self._srun(task_id, facts["job"], 0, command, terminal=False)

    def _srun(self, task_id: str, job: str, node: int, command: str | None, *, terminal: bool) -> list[str]:
        """Return the command that runs on a node of the job, beside the task and with all that it has."""
        step = ["--nodes=1", "--ntasks=1", f"--relative={node}", "--overlap", "--mem=0", "--cpu-bind=none"]
        folder = str(folders.place(self.site.tasks, task_id))
        program = [self.site.python, "-I", "-S", self.site.runner, "beside", folder, str(node)]
        how = ["--pty"] if terminal else ["--unbuffered"]
        words = [] if command is None else [command.encode().hex()]
        return ["srun", f"--jobid={job}", *step, "--mpi=none", "--quiet", *how, "--", *program, *words]

    def _facts(self, task_id: str) -> Mapping[str, Any]:
        answer = self.site.slurm("slurm_look", tools=1, home=self.site.home, task_ids=[task_id], unheard=[])
        facts: Mapping[str, Any] | None = answer["tasks"][task_id]
        if facts is None:
            raise TaskNotFoundError(f"there is no task {task_id!r} to open a shell for")
        return facts
