"""Beside a task on a host: commands with its environment on our terminal, and streams to its supervisor of calls."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable

from flow_core.errors import ValidationError
from flow_core.ids import TaskId
from flow_core.providers.ssh_hosts import Host
from flow_core.providers.ssh_terminal import attach, is_terminal
from flow_core.runner.door import DOOR


class SSHShell:
    """The `shell` capability."""

    def __init__(self, host_of: Callable[[str, int], Host]) -> None:
        self._host_of = host_of

    def run(self, task_id: str, command: str | None, *, node: int = 0) -> int:
        """See Shell. A shell needs a terminal; where there is none, its commands are read from what we read."""
        if node < 0:
            raise ValidationError(f"node={node} does not exist: nodes are counted from 0")
        host = self._host_of(task_id, node)
        terminal = command is None and is_terminal()
        folder = _folder(host, task_id)
        # What is typed goes as hexadecimal: it means something to the shell beside the task, not to that of the login.
        words = [] if command is None else [command.encode().hex()]
        mode = "tty" if terminal else "pipe"
        python, runner = host.hello["facts"]["python"], host.hello["runner"]
        argv = [python, "-I", "-S", runner, "visit", folder, str(node), mode, *words]
        return attach(host.transport.session(), "exec " + shlex.join(argv), terminal=terminal)


class SSHSessions:
    """The `sessions` capability: all streams to a host share its one connection."""

    shares_memory = False

    def __init__(self, host_of: Callable[[str, int], Host]) -> None:
        self._host_of = host_of

    def connect(self, task_id: str) -> socket.socket:
        """See Sessions."""
        host = self._host_of(task_id, 0)
        return host.transport.open_stream(f"{_folder(host, task_id)}/{DOOR}")


def _folder(host: Host, task_id: str) -> str:
    parsed = TaskId.parse(task_id)
    return f"{host.home}/tasks/{parsed.digest}/{parsed.attempt}"
