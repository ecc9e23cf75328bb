"""A container image made of this machine's own shell and Python, since a test may not pull one from a registry."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

NAME = "localhost/flow-gpu-test/python:1"
_SKIPPED = ("site-packages", "test", "tests", "__pycache__", "idlelib", "ensurepip", "lib2to3", "tkinter")


def build(folder: Path) -> str:
    """Import the image unless podman has it; return its name."""
    if subprocess.run(["podman", "image", "exists", NAME], check=False).returncode == 0:
        return NAME
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(sys.base_prefix)
    programs = {"/bin/sh": "/bin/sh", "/bin/bash": "/bin/bash", "/bin/cat": "/bin/cat"}
    python = Path(sys.executable).resolve()
    archive = folder / "rootfs.tar"
    with tarfile.open(archive, "w") as tar:
        for target, source in programs.items():
            tar.add(Path(source).resolve(), target)
        tar.add(python, f"{base}/bin/{version}")
        for name in ("python", "python3"):
            _link(tar, f"/usr/bin/{name}", f"{base}/bin/{version}")
        tar.add(base / "lib" / version, f"{base}/lib/{version}", filter=_wanted)
        modules = [str(path) for path in (base / "lib" / version / "lib-dynload").glob("*.so")]
        for library in _libraries([*programs.values(), str(python), *modules]):
            tar.add(Path(library).resolve(), library)
    environment = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    subprocess.run(
        ["podman", "import", "-q", "-c", environment, str(archive), NAME], check=True, capture_output=True
    )
    archive.unlink()
    return NAME


def _wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(entry.name).name in _SKIPPED else entry


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    tar.addfile(entry)


def _libraries(programs: list[str]) -> set[str]:
    """Paths of the shared libraries that some programs load, as `ldd` has them."""
    out = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    words = [word for line in out.splitlines() if line.startswith(("\t", " ")) for word in line.split()]
    return {word for word in words if word.startswith("/") and Path(word).exists()}
