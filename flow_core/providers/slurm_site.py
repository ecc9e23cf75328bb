"""The machine from which a cluster is used: this one, or a login node. Its home, its Python, how files get there."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_core.config import Settings
from flow_core.models import TaskSpec
from flow_core.providers import folder as folders
from flow_core.providers.transfers import send_blob
from flow_core.providers.transport import DEADLINE_S, BlobsMissing, LocalTransport, Transport
from flow_core.runner import machine
from flow_core.runner.agent import Answer
from flow_core.runner.slurm_tools import environment

if TYPE_CHECKING:
    from flow_core.providers.ssh_connection import HostTransport


def is_terminal() -> bool:
    """Whether somebody sits in front of us."""
    try:
        return os.isatty(0) and os.isatty(1)
    except OSError:  # we have no such streams
        return False


class Site:
    """Where Slurm's tools are. Thread-safe; connects when it is first asked."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings.slurm
        self._ssh = settings.ssh

    @cached_property
    def transport(self) -> Transport:
        """The way there."""
        return LocalTransport() if self.local else self._host

    @cached_property
    def _host(self) -> HostTransport:
        from flow_core.providers.ssh_connection import host_transport

        host = self.settings.host
        assert host is not None
        there = {"home": self.settings.home, "python": host.python or "python3"}
        return host_transport(host.model_copy(update=there), self._ssh, per_node=False)

    @property
    def local(self) -> bool:
        """Whether the tools and the home are on this machine."""
        return self.settings.host is None

    @cached_property
    def _places(self) -> tuple[str, str]:
        if self.local:
            home = os.path.abspath(os.path.expanduser(self.settings.home))
            return home, machine.install(home, folders.runner_sources())
        hello = self._host.client.hello
        return hello["home"], hello["runner"]

    @property
    def home(self) -> str:
        """The folder of all tasks, which the nodes see under the same path."""
        return self._places[0]

    @property
    def tasks(self) -> Path:
        """The folder of the tasks' folders."""
        return Path(self.home) / "tasks"

    @property
    def runner(self) -> str:
        """The folder of the runner's files."""
        return self._places[1]

    @property
    def python(self) -> str:
        """The interpreter that runs tasks on the nodes."""
        return self.settings.python or (sys.executable if self.local else "python3")

    def ask(self, verb: str, *, data: bytes = b"", patience_s: float = DEADLINE_S, **args: Any) -> Answer:
        """Do a verb there, on our home. Raises what `Transport.call` raises."""
        return self.transport.call(verb, {"home": self.home, **args}, data=data, deadline_s=patience_s)

    def slurm(self, verb: str, *, tools: int, data: bytes = b"", **args: Any) -> Any:
        """Do a verb that runs up to so many of Slurm's tools, one after the other; each has its deadline."""
        limit = self.settings.command_timeout_s
        args = {**args, "deadline_s": limit}
        return self.transport.call(verb, args, data=data, deadline_s=limit * tools + DEADLINE_S).value

    def terminal(self, argv: Sequence[str], *, pty: bool) -> int:
        """Run one of Slurm's tools on our standard streams; return its exit code."""
        if self.local:
            return subprocess.run(argv, env=environment(), check=False).returncode
        from flow_core.providers.ssh_terminal import attach

        return attach(self._host.session(), "exec " + shlex.join(argv), terminal=pty)

    # -- files

    def pack(self, spec: TaskSpec) -> tuple[list[dict[str, Any]], bytes]:
        """Return a task's files as `machine.create` takes them, and the bytes that go with them."""
        listed = folders.files(spec)
        if self.local:
            return listed, b""
        packed, data = [], []
        for file in listed:
            if "data" in file:
                content = file.pop("data")
                packed.append({**file, "size": len(content)})
                data.append(content)
            else:
                packed.append({"name": file["name"], "blob": _sha256(file["path"]), "link": file["link"]})
        return packed, b"".join(data)

    def send(self, specs: Sequence[TaskSpec]) -> None:
        """Store the large files of these tasks there, those that are missing."""
        paths = {_sha256(str(file.path)): file.path for spec in specs for file in spec.files if file.path}
        if self.local or not paths:
            return
        for sha in self.ask("missing_blobs", shas=[*paths]).value:
            send_blob(self.transport, self.home, sha, Path(str(paths[sha])))

    def submit(self, specs: Sequence[TaskSpec], tasks: Sequence[Mapping[str, Any]], **how: Any) -> None:
        """Do `cluster.submit`, with whatever files it needs."""
        data = b"".join(one["data"] for one in tasks)
        bare = [{name: value for name, value in one.items() if name != "data"} for one in tasks]
        how = {**how, "home": self.home, "retention_s": self.settings.retention_days * 86400, "tasks": bare}
        for last in (False, True):
            self.send(specs)
            try:
                self.slurm("slurm_submit", tools=3, data=data, **how)
                return
            except BlobsMissing:  # swept between the two
                if last:
                    raise


def _sha256(path: str) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            sha.update(piece)
    return sha.hexdigest()
