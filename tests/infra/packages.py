"""System packages that a suite needs: what is missing is installed by apt-get, and nothing of it is started."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_POLICY = Path("/usr/sbin/policy-rc.d")  # Debian's way to say that an installed service is not to be started


class Unavailable(Exception):
    """This machine cannot stand the infrastructure up; the text says why."""


@dataclass(frozen=True)
class Needs:
    """Programs, and the packages of Debian and Ubuntu that bring them."""

    programs: tuple[str, ...]
    packages: tuple[str, ...]

    def missing(self) -> list[str]:
        """Name what is not there: packages where the system knows packages, programs elsewhere."""
        if shutil.which("dpkg-query"):
            return [name for name in self.packages if not _installed(name)]
        return [name for name in self.programs if find(name) is None]


SSH = Needs(
    ("sshd", "ssh-keygen", "ip", "iptables", "unshare", "python3"),
    ("openssh-server", "openssh-client", "iproute2", "iptables", "util-linux", "python3"),
)
SLURM = Needs(
    ("slurmctld", "slurmd", "sbatch", "munged"),
    ("slurm-wlm", "slurm-client", "slurm-wlm-basic-plugins", "munge"),
)
ACCOUNTING = Needs(
    ("slurmdbd", "mariadbd", "mariadb-install-db"), ("slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server")
)
PODMAN = Needs(("podman", "runc"), ("podman", "runc"))
BROWSER = Needs(("chromium", "chromedriver"), ("chromium", "chromium-driver"))
POSTGRESQL = Needs(("initdb", "postgres", "pg_isready"), ("postgresql",))
REDIS = Needs(("redis-server",), ("redis-server",))


def find(program: str) -> str | None:
    """Return the path of a program, also of one that only root has on its PATH."""
    return shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", os.defpath), *_SBIN)))


def install(*needs: Needs) -> None:
    """Install what is missing. After return every program is there. Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("it takes root: namespaces are made and system packages are installed")
    if not any(need.missing() for need in needs):
        return
    with _alone(), _nothing_is_started():
        names = [name for need in needs for name in need.missing()]  # another run may have brought them
        if names and shutil.which("apt-get") is None:
            raise Unavailable(f"{', '.join(names)}: not installed, and there is no apt-get")
        if names:
            _apt_get(["update", "-q"], check=False)
            _apt_get(["install", "-qy", "--no-install-recommends", *names], check=True)


def _apt_get(arguments: list[str], *, check: bool) -> None:
    run = subprocess.run(
        ["apt-get", "-o", "DPkg::Lock::Timeout=300", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and run.returncode != 0:
        raise Unavailable(f"apt-get {' '.join(arguments)} failed:\n{run.stdout[-500:]}{run.stderr[-1000:]}")


def _installed(package: str) -> bool:
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout == "installed"


@contextmanager
def _alone() -> Iterator[None]:
    with Path("/run/lock/flow-gpu-packages").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _nothing_is_started() -> Iterator[None]:
    if _POLICY.exists():  # the machine has a policy of its own
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()
