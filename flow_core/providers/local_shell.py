"""Commands beside a local task: in its folder, with its environment, on our terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from flow_core.providers import folder as folders
from flow_core.runner import visit


class LocalShell:
    """The `shell` capability."""

    def __init__(self, tasks: Path) -> None:
        self.tasks = tasks

    def run(self, task_id: str, command: str | None, *, node: int = 0) -> int:
        folder = folders.place(self.tasks, task_id)
        with folders.told():
            plan = visit.plan(str(folder), node, command, tty=command is None and sys.stdin.isatty())
        code = subprocess.run(plan.argv, cwd=plan.cwd, env=plan.env, check=False).returncode
        return code if code >= 0 else 128 - code
