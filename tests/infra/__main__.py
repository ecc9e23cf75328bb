"""Try the lab by hand: `python -m tests.infra ssh|slurm|accounting [COMMAND …]` runs a command, or a shell, in it.

python -m tests.infra ssh ssh h1 nvidia-smi --query-gpu=name --format=csv,noheader
python -m tests.infra slurm sbatch --wait --gres=gpu:2 --wrap hostname
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack, closing

from tests.infra import packages
from tests.infra.lab import Lab
from tests.infra.slurm import AccountedCluster, Cluster
from tests.infra.ssh import Client, Machines, Sshd

_NEEDS = {"ssh": (), "slurm": (packages.SLURM,), "accounting": (packages.SLURM, packages.ACCOUNTING)}


def main(kind: str, command: list[str]) -> int:
    packages.install(packages.SSH, *_NEEDS[kind])
    with ExitStack() as stack:
        lab = stack.enter_context(closing(Lab()))
        stack.enter_context(lab.entered())
        client = Client(lab.folder / "client")
        env = {**os.environ, "HOME": str(client.home), "PATH": f"{_programs(client)}:{os.environ['PATH']}"}
        Sshd(lab, client)
        if kind == "ssh":
            stack.enter_context(closing(Machines(lab, client)))
        else:
            env |= (Cluster if kind == "slurm" else AccountedCluster)(lab).env
        return subprocess.run(command or ["bash"], env=env, check=False).returncode


def _programs(client: Client) -> str:
    """Wrap the ssh programs: they look for their files in the home that /etc/passwd names, not in $HOME."""
    folder = client.home / "bin"
    folder.mkdir()
    for name in ("ssh", "scp", "sftp"):
        (folder / name).write_text(f'#!/bin/sh\nexec /usr/bin/{name} -F {client.config} "$@"\n')
        (folder / name).chmod(0o755)
    return str(folder)


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] not in _NEEDS:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
