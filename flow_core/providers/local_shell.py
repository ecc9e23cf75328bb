"""Commands beside a local task: in its working directory, with its environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from flow_core.errors import TaskNotFoundError, ValidationError
from flow_core.providers import folder as folders
from flow_core.runner import task as records
from flow_core.runner.ranks import environment


class LocalShell:
    """The `shell` capability."""

    def __init__(self, tasks: Path) -> None:
        self.tasks = tasks

    def run(self, task_id: str, command: str | None, *, node: int = 0) -> int:
        folder = folders.place(self.tasks, task_id)
        facts = records.probe(str(folder))
        job = records.read_json(str(folder), "job.json")
        if facts is None or job is None:
            raise TaskNotFoundError(f"there is no task {task_id!r} to open a shell for")
        if facts["started"] is None or facts["exit"] is not None:
            raise ValidationError(
                f"task {task_id!r} is not running", suggestions=["Read what it printed with task.logs()."]
            )
        if not 0 <= node < job["num_instances"]:
            raise ValidationError(
                f"node={node} does not exist: task {task_id!r} has {job['num_instances']}, counted from 0"
            )
        gpus = facts["started"]["gpus"]
        share = len(gpus) // job["num_instances"]
        env = environment(
            str(folder),
            job,
            node,
            gpus[node * share : (node + 1) * share],
            job["env"].get("MASTER_PORT", "29500"),
        )
        del env["FLOW_TASK_DIR"]  # what is typed beside a task is not part of it
        shell = os.environ.get("SHELL", "/bin/sh")
        argv = [shell, "-i"] if command is None else ["/bin/sh", "-c", command]
        return subprocess.run(argv, cwd=folder / "work", env=env, check=False).returncode
