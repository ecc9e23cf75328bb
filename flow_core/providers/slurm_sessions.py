"""Warm sessions inside an allocation: each stream is a step of the job that speaks with the supervisor on its node.

The stream goes through `srun`, and through the login node where there is one: no port is opened anywhere, and who may
not run steps in the job cannot connect.
"""

from __future__ import annotations

import shlex
import socket

from flow_core.errors import ProviderUnavailable
from flow_core.providers import folder as folders
from flow_core.providers.slurm_shell import SlurmShell
from flow_core.providers.slurm_site import Site


class SlurmSessions:
    """The `sessions` capability."""

    shares_memory = False

    def __init__(self, site: Site) -> None:
        self.site = site

    def connect(self, task_id: str) -> socket.socket:
        """See Sessions."""
        folder = str(folders.place(self.site.tasks, task_id))
        relay = [self.site.python, "-I", "-S", self.site.runner, "relay", folder]
        step = SlurmShell(self.site).step(task_id, "exec " + shlex.join(relay))
        if step is None:
            raise ProviderUnavailable(f"session {task_id} does not listen: its job does not run")
        return self.site.transport.open_stream(step)
