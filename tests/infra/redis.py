"""A Redis server of a test's own, which keeps nothing."""

from __future__ import annotations

import os
from pathlib import Path

from tests.infra import packages
from tests.infra.packages import Unavailable


def broker_command(port: int, folder: Path) -> list[str]:
    """Return the command that runs the server in the foreground, on a port of the loopback. Raises Unavailable."""
    if os.geteuid() == 0:
        packages.install(packages.REDIS)
    server = packages.find("redis-server")
    if server is None:
        raise Unavailable("redis-server is not installed")
    quiet = ["--save", "", "--appendonly", "no", "--dir", str(folder)]
    return [server, "--bind", "127.0.0.1", "--port", str(port), *quiet]
