"""Packages that a session asks for, installed once per set and Python. Standard library only, Python 3.8+.

A set is a folder `<envs>/<digest>` that pip or uv fills and nobody changes afterwards: the digest is of what is asked
for and of what decides which files that means here (the Python, the machine's architecture, its C library). Beside it
lies `<digest>.lock`: whoever installs holds it alone, whoever uses the folder shares it, and its time is that
of the last use. What nobody has used for `KEPT_S` is removed by the next install.
"""

from __future__ import annotations

import collections
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

from . import proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

KEPT_S = 30 * 86400.0
_SHOWN_LINES = 30


class InstallFailed(Exception):
    """The packages could not be installed; the text holds the installer's own words."""


def provide(requirements: Sequence[str], envs: str) -> tuple[str, int]:
    """Return (the folder to put on sys.path, a descriptor to keep open for as long as the folder is used).

    `requirements` are lines of a requirements file. Installs them unless somebody has: of several processes one does,
    and the others wait. Raises InstallFailed, and then nothing is left.
    """
    digest = _digest(requirements)
    folder = os.path.join(envs, digest)
    os.makedirs(envs, mode=0o700, exist_ok=True)
    lock = os.open(folder + ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.path.isdir(folder):
                os.utime(lock)
                return folder, lock
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.utime(lock)
            if not os.path.isdir(folder):
                _sweep(envs, digest)
                _install(requirements, envs, digest)
    except BaseException:
        proc.unlock(lock)
        raise


def activate(folder: str) -> None:
    """Let this process and the Pythons that it starts import from `folder`, before what the machine has installed."""
    import site

    installed = [
        place for place, path in enumerate(sys.path) if path.endswith(("site-packages", "dist-packages"))
    ]
    sys.path.insert(installed[0] if installed else len(sys.path), folder)
    site.addsitedir(folder)  # for its .pth files
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = folder + (os.pathsep + inherited if inherited else "")


def _digest(requirements: Sequence[str]) -> str:
    import hashlib

    known = hashlib.sha256()
    for line in sorted(line.strip() for line in requirements):
        known.update(line.encode("utf-8", "surrogateescape") + b"\n")
        known.update(_content(line))
    abi = (sys.implementation.cache_tag, sysconfig.get_config_var("SOABI"), sysconfig.get_platform(), _libc())
    known.update(repr(abi).encode())
    return known.hexdigest()[:32]


def _libc() -> str:
    """Name the C library, which decides about wheels as well; machines that differ in it may share their files."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return ""


def _content(line: str) -> bytes:
    """Return the hash of a file that a requirement names, so that a changed file is another set."""
    import hashlib

    path = line.rpartition("@")[2].strip() if " @ " in line else line
    path = path[len("file://") :] if path.startswith("file://") else path
    if not path.startswith("/"):
        return b""
    if os.path.isdir(path):
        raise InstallFailed(
            f"{line!r} is a folder, whose files may change: build a wheel of it and name that"
        )
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    except OSError as error:
        raise InstallFailed(f"{line!r} cannot be read on this machine: {error.strerror}") from error


def _install(requirements: Sequence[str], envs: str, digest: str) -> None:
    draft = tempfile.mkdtemp(prefix=f".new-{digest}-", dir=envs)
    try:
        asked = os.path.join(draft, "requirements.txt")
        packages = os.path.join(draft, "packages")
        with open(asked, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in ("# coding: utf-8", *requirements))
        os.mkdir(packages)
        _run([*_installer(), "--target", packages, "--requirement", asked], cwd=draft)
        os.rename(packages, os.path.join(envs, digest))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _run(command: list[str], *, cwd: str) -> None:
    """Run an installer; its words go to the log as they come. Raises InstallFailed with the last of them."""
    said: collections.deque[str] = collections.deque(maxlen=_SHOWN_LINES)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        command,
        cwd=cwd,  # an empty folder: `python -m pip` would import from the current one
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            sys.stderr.write(line)
    if process.returncode != 0:
        raise InstallFailed(
            "the dependencies could not be installed: {} ended with exit code {}\n{}".format(
                os.path.basename(command[0]), process.returncode, "".join(said).rstrip()
            )
        )


def _installer() -> list[str]:
    """Return how to install: by this Python's pip, whose configuration the machine's owner wrote, by uv, or by the pip
    that comes with Python for new virtual environments.
    """
    options = ["install", "--no-input", "--disable-pip-version-check"]
    probe = [sys.executable, "-c", "import pip"]
    if (
        subprocess.run(probe, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode
        == 0
    ):
        return [sys.executable, "-m", "pip", *options]
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--python", sys.executable]
    wheel = _bundled_pip()
    if wheel is not None:
        return [sys.executable, os.path.join(wheel, "pip"), *options]
    raise InstallFailed(
        f"the dependencies cannot be installed: {sys.executable} has no pip, and there is no uv on the PATH. Install "
        "one of them on the machine, or use an image that has the packages"
    )


def _bundled_pip() -> str | None:
    try:
        import ensurepip
    except ImportError:  # some distributions take it out
        return None
    folder = sysconfig.get_config_var("WHEEL_PKG_DIR") or os.path.join(
        os.path.dirname(ensurepip.__file__), "_bundled"
    )
    try:
        wheels = [name for name in os.listdir(folder) if name.startswith("pip-") and name.endswith(".whl")]
    except OSError:
        return None
    newest = max(wheels, key=lambda name: [int(part) for part in name.split("-")[1].split(".")], default=None)
    return None if newest is None else os.path.join(folder, newest)


def _sweep(envs: str, digest: str) -> None:
    """Remove what killed installs of this set have left, and sets that nobody uses and nobody has used for long."""
    for name in os.listdir(envs):
        if name.startswith((f".new-{digest}-", ".old-")):
            shutil.rmtree(os.path.join(envs, name), ignore_errors=True)
        elif name.endswith(".lock") and name != digest + ".lock":
            _remove_unused(os.path.join(envs, name[: -len(".lock")]))


def _remove_unused(folder: str) -> None:
    try:
        lock = os.open(folder + ".lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.fstat(lock).st_mtime > KEPT_S and os.path.isdir(folder):
            trash = os.path.join(os.path.dirname(folder), ".old-" + os.urandom(8).hex())
            os.rename(folder, trash)  # gone at once for everybody, then removed at leisure
            shutil.rmtree(trash, ignore_errors=True)
    except BlockingIOError:  # in use
        pass
    finally:
        proc.unlock(lock)
