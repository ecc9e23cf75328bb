"""Runs something beside a task on its machine: in its folder, with its environment, inside its container if it has one.

Started as ``<runner> visit <task folder> <node> tty|pipe [command in hexadecimal]``; without a command it is a shell.
Standard library only, Python 3.8+.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from typing import Any, NamedTuple

from . import proc, task
from .machine import Refused
from .ranks import Container, environment

#: How long a command that nobody listens to any more may take to end (seconds).
_GRACE_S = 3.0


class Plan(NamedTuple):
    """What to start."""

    argv: list[str]
    env: dict[str, str]
    cwd: str


def plan(folder: str, node: int, command: str | None, *, tty: bool) -> Plan:
    """Say what is to be started. Raises Refused: task-not-found, invalid (not running, no such node)."""
    facts = task.probe(folder)
    job = task.read_json(folder, "job.json")
    if facts is None or job is None:
        raise Refused("task-not-found", f"there is no task in {folder} to open a shell for")
    task_id = job["task_id"]
    if facts["started"] is None or facts["exit"] is not None:
        advice = ("Read what it printed with task.logs().",)
        raise Refused("invalid", f"task {task_id!r} is not running", advice)
    total = job["num_instances"]
    if not 0 <= node < total:
        raise Refused("invalid", f"node={node} does not exist: task {task_id!r} has {total}, counted from 0")
    env = environment(
        folder, job, node, _gpus(job, facts["started"], node), job["env"].get("MASTER_PORT", "29500")
    )
    del env[proc.MARKER]  # what is typed beside a task is not part of it
    cwd = os.path.join(folder, "work")
    if job.get("container"):
        return _inside(Container(job, node), node, command, tty=tty)
    shell = os.environ.get("SHELL", "/bin/sh")
    return Plan([shell, "-i"] if command is None else ["/bin/sh", "-c", command], env, cwd)


def _gpus(job: dict[str, Any], started: dict[str, Any], node: int) -> list[str]:
    team = job.get("team")
    here, first = (team["nodes"], team["first"]) if team else (job["num_instances"], 0)
    share = len(started["gpus"]) // here
    return list(started["gpus"][(node - first) * share : (node - first + 1) * share])


def _inside(container: Container, node: int, command: str | None, *, tty: bool) -> Plan:
    if container.daemonless:
        raise Refused(
            "invalid", f"{container.engine} cannot run a second command in the container of node {node}"
        )
    words = ["/bin/sh", "-i"] if command is None else ["/bin/sh", "-c", command]
    how = ["--interactive", *(["--tty"] if tty else [])]
    return Plan(
        [container.engine, "exec", *how, container.name, *words], container.client_environment({}), "/"
    )


def main(argv: list[str]) -> int:
    """Run the command; return its exit code, 128 + n where signal n ended it, 127 where it could not be started."""
    folder, node, tty = argv[0], int(argv[1]), argv[2] == "tty"
    command = bytes.fromhex(argv[3]).decode() if len(argv) > 3 else None
    try:
        argv, env, cwd = plan(folder, node, command, tty=tty)
    except Refused as refused:
        os.write(2, "".join(f"{line}\n" for line in (refused.message, *refused.suggestions)).encode())
        return 125
    env = {**env, **{name: os.environ[name] for name in ("TERM", "COLUMNS", "LINES") if name in os.environ}}
    try:
        if tty:  # the terminal tells it everything: its size, an interrupt, a hang-up
            os.chdir(cwd)
            os.execvpe(argv[0], argv, env)
        return _attended(subprocess.Popen(argv, env=env, cwd=cwd, start_new_session=True))
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        return 127


def _attended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a command; end it when nobody listens to it any more: no terminal would tell it."""
    poller = select.poll()
    poller.register(1, 0)  # errors and hang-ups are always told
    while process.poll() is None:
        if poller.poll(50):
            _end(process)
            break
    code = process.wait()
    return code if code >= 0 else 128 - code


def _end(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _GRACE_S
    for number in (signal.SIGHUP, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
