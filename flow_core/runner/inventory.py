"""What a machine has: GPUs, a container engine, the environment that a task starts from. Stdlib only, Python 3.8+."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Any

from . import proc
from .ranks import ENGINE_VARIABLES

#: A log that is followed must not wait for a full buffer.
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}

#: Variables that a task inherits from whoever submits it: what describes the machine, nothing that belongs to the host
#: (an orchestrator's process is full of its own settings and secrets).
_KEPT = frozenset(
    (
        *("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR"),
        *("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
        *ENGINE_VARIABLES,
    )
)

#: In order of preference: the daemonless one first.
ENGINES = ("podman", "docker", "apptainer")

_CAP_SYS_ADMIN = 21  # linux/capability.h


def base_environment(python: str) -> dict[str, str]:
    """Return the variables that every task starts from; `python` is the one found first on PATH."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith("LC_")}
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    own = os.path.dirname(os.path.abspath(python))
    kept["PATH"] = os.pathsep.join([own, *(entry for entry in path if entry != own)])
    return {**kept, **UNBUFFERED}


def container_engine() -> str | None:
    """Return the path of the engine that runs images here, None where there is none."""
    return next((path for path in map(shutil.which, ENGINES) if path is not None), None)


def can_mount() -> bool:
    """Whether this user may show a folder under another path, in a mount namespace of the task's own."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    try:
        with open("/proc/self/status") as file:
            held = next((line.split()[1] for line in file if line.startswith("CapEff:")), "0")
    except OSError:
        return False
    return bool(int(held, 16) >> _CAP_SYS_ADMIN & 1)  # root of a container often lacks it


#: How long what the driver's tool says is believed: it takes seconds where no process keeps the driver loaded.
_BELIEVED_S = 600.0


def remembered_gpus(home: str, declared: int | None) -> dict[str, Any]:
    """Return `gpus`, and ask the driver's tool at most once in ten minutes and boot for all who use a home."""
    from . import task

    known = task.read_json(home, "gpus.json") or {}
    boot, now = proc.boot_id(), time.time()
    if (
        known.get("boot") != boot
        or not 0 <= now - known.get("at", 0.0) < _BELIEVED_S
        or not known["found"]["real"]
    ):
        known = {"boot": boot, "at": now, "found": gpus(None)}
        try:
            task.write_json(home, "gpus.json", known)
        except OSError:  # a full disk, which others will tell of
            pass
    found: dict[str, Any] = known["found"]
    return found if declared is None else _limited(found if found["real"] else None, declared)


def gpus(declared: int | None) -> dict[str, Any]:
    """Find the GPUs, or take the declared number; with both, the declared number of the real ones.

    Returns names (as CUDA_VISIBLE_DEVICES takes them), model, memory_gb (of the smallest, None if unknown), and
    whether they are real.
    """
    return _limited(_nvidia_smi(), declared)


def _limited(found: dict[str, Any] | None, declared: int | None) -> dict[str, Any]:
    if found is not None:
        return found if declared is None else {**found, "names": found["names"][:declared]}
    # A declared GPU answers to any name; this is the one it is listed under.
    names = [str(index) for index in range(declared or 0)]
    return {"names": names, "model": "a100", "memory_gb": None, "real": False}


def _nvidia_smi() -> dict[str, Any] | None:
    """Ask the driver's own tool; None where there is no driver or it does not answer."""
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.count(",") == 2]
    if not rows:
        return None
    return {
        "names": [row[0] for row in rows],
        "model": _short_model(rows[0][1]),
        "memory_gb": _gigabytes([row[2] for row in rows]),
        "real": True,
    }


def _short_model(name: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'h100': the word with a digit in it, as the GPU names are written elsewhere."""
    words = name.replace("-", " ").lower().split()
    return next(
        (word for word in words if any(c.isdigit() for c in word) and not word.endswith("gb")), name.lower()
    )


def _gigabytes(mebibytes: list[str]) -> int | None:
    try:
        return min(int(value) for value in mebibytes) // 1000  # 81559 MiB is sold as 80 GB
    except ValueError:
        return None
