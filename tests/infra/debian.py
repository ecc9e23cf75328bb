"""Run a command with the programs of another release of Debian, whose Slurm is a newer one.

python -m tests.infra.debian trixie .venvs/core/bin/python -m pytest tests/slurm

The release's root is made once, by debootstrap from the mirror that apt uses here; what the tests need beyond that they
install there themselves. This repository and this Python are seen in it under their own paths, and nothing else is.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.infra import packages
from tests.infra.packages import Needs, Unavailable

ROOTS = Path("/var/tmp/flow-debian")  # device files are made in it
_REPOSITORY = Path(__file__).resolve().parents[2]
_DEBOOTSTRAP = Needs(("debootstrap", "unshare", "pivot_root"), ("debootstrap", "util-linux"))

# A mirror may have stopped following a release that still changes: what it has is signed all the same.
_APT = 'Acquire::Check-Valid-Until "false";\nAPT::Install-Recommends "false";\n'


def main(release: str, command: list[str]) -> int:
    """Run the command there; return its exit code."""
    base = Path(sys.base_prefix)
    if base.is_relative_to("/usr"):
        raise Unavailable(
            f"this Python ({base}) would hide the release's own programs: use one of another place"
        )
    packages.install(_DEBOOTSTRAP)
    root = ROOTS / release
    if not root.exists():
        _make(root, release)
    for name in ("resolv.conf", "hosts"):  # this machine's own name among them: srun looks it up
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    shared = [_REPOSITORY, base, *(Path(place) for place in ("/dev", "/proc", "/sys"))]
    for place in shared:
        (root / place.relative_to("/")).mkdir(parents=True, exist_ok=True)
    # nsenter goes to the root of a namespace of mounts, and not to that of a process: chroot would not do.
    lines = [f"mount --rbind {shlex.quote(str(path))} {shlex.quote(f'{root}{path}')}" for path in shared]
    lines = [
        "set -e",
        f"mount --bind {root} {root}",
        *lines,
        f"cd {root}",
        "pivot_root . mnt",
        "umount -l /mnt",
    ]
    lines += [f"cd {shlex.quote(str(_REPOSITORY))}", 'exec "$@"']
    enter = ["unshare", "--mount", "sh", "-c", "\n".join(lines), "sh", *command]
    return subprocess.run(enter, check=False).returncode


def _make(root: Path, release: str) -> None:
    """Install a release's smallest system. Raises Unavailable."""
    draft = root.with_name(f"{release}.{os.getpid()}")
    draft.parent.mkdir(exist_ok=True)
    # Releases that are newer than debootstrap have no script there: the one of unstable serves all of them.
    script = Path("/usr/share/debootstrap/scripts") / release
    more = [] if script.exists() else [str(script.with_name("sid"))]
    # The release's own Python brings the libraries that ours needs.
    options = ["--variant=minbase", "--include=python3"]
    run = subprocess.run(["debootstrap", *options, release, str(draft), _mirror(), *more], check=False)
    if run.returncode != 0:
        shutil.rmtree(draft, ignore_errors=True)
        raise Unavailable(f"debootstrap could not make {release}")
    (draft / "etc" / "apt" / "apt.conf.d" / "99-tests").write_text(_APT)
    draft.rename(root)


def _mirror() -> str:
    """The mirror of Debian that apt uses here."""
    ask = ["apt-get", "indextargets", "--format", "$(SITE)", "Label: Debian"]
    sites = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    if not sites:
        raise Unavailable("apt has no mirror of Debian here")
    return sites[0]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except Unavailable as reason:
        sys.exit(str(reason))
