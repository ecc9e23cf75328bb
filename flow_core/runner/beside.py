"""Runs something beside a task on a node that a scheduler has given it: where the task runs, with its environment.

Started as ``<runner> beside <task folder> <node> [command in hexadecimal]``; without a command it is a shell.
Standard library only, Python 3.8+.
"""

from __future__ import annotations

import os
from typing import Any

from . import proc, task
from .batch import inherited
from .ranks import environment


def main(argv: list[str]) -> int:
    """Become the command. Returns only when that cannot be: 127."""
    folder, node, command = argv[0], int(argv[1]), bytes.fromhex(argv[2]).decode() if len(argv) > 2 else None
    job: dict[str, Any] = task.read_json(folder, "job.json") or {}
    started = task.read_json(folder, "started.json") or {}
    gpus, nodes = started.get("gpus", []), job["num_instances"]
    share = len(gpus) // nodes
    job["env"] = {**inherited(job["python"]), **job["env"]}
    port = job["env"].get("MASTER_PORT", "29500")
    env = environment(folder, job, node, gpus[node * share : (node + 1) * share], port)
    del env[proc.MARKER]  # what is typed beside a task is not part of it
    os.chdir(os.path.join(folder, "work", job["working_dir"] or "."))
    shell = [os.environ.get("SHELL", "/bin/sh"), "-i"] if command is None else ["/bin/sh", "-c", command]
    try:
        os.execvpe(shell[0], shell, env)
    except OSError as error:
        os.write(2, f"{shell[0]}: {error.strerror}\n".encode())
    return 127
