"""A PostgreSQL server of a test's own: on a port of the loopback, without a password, gone with its folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.infra import packages
from tests.infra.packages import Unavailable

#: PostgreSQL refuses root, so root runs it as the account that the package brings.
_ACCOUNT = "postgres"
_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


@dataclass(frozen=True)
class Server:
    """An empty database, and how to start the server that holds it."""

    folder: Path
    port: int

    @classmethod
    def prepare(cls, port: int) -> Server:
        """Make the database's files in a new folder of its own. Raises Unavailable."""
        if os.geteuid() == 0:
            packages.install(packages.POSTGRESQL)
        # Not below pytest's folder, which only its owner may enter.
        server = cls(Path(tempfile.mkdtemp(prefix="flow-postgres-")), port)
        if os.geteuid() == 0:
            account = pwd.getpwnam(_ACCOUNT)
            os.chown(server.folder, account.pw_uid, account.pw_gid)
        command = ["initdb", "-D", "data", "-A", "trust", "-U", "airflow", "-E", "UTF8", "--locale=C.UTF-8"]
        made = subprocess.run(
            server._as_account(*command, "--no-sync"),
            cwd=server.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            server.remove()
            raise Unavailable(f"initdb failed: {made.stderr}")
        return server

    @property
    def command(self) -> list[str]:
        """The command that runs the server in the foreground until SIGTERM, when the last client has gone."""
        settings = [part for one in (*_FAST, "max_connections=200") for part in ("-c", one)]
        here = str(self.folder)
        return self._as_account(
            "postgres", "-D", f"{here}/data", "-h", "127.0.0.1", "-p", str(self.port), "-k", here, *settings
        )

    def url(self, driver: str) -> str:
        """SQLAlchemy's URL of the server's own first database."""
        return f"postgresql+{driver}://airflow@127.0.0.1:{self.port}/postgres"

    def ready(self) -> bool:
        """Whether the server takes connections."""
        asked = ["pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run([_program(asked[0]), *asked[1:]], check=False).returncode == 0

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _as_account(self, program: str, *arguments: str) -> list[str]:
        change = ["setpriv", f"--reuid={_ACCOUNT}", f"--regid={_ACCOUNT}", "--init-groups", "--"]
        return [*(change if os.geteuid() == 0 else []), _program(program), *arguments]


def _program(name: str) -> str:
    """Return a program's path: Debian keeps those of a server apart, by version."""
    own = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    found = str(own[-1]) if own else packages.find(name)
    if found is None:
        raise Unavailable(f"{name} is not installed (PostgreSQL)")
    return found
