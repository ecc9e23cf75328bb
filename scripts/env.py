#!/usr/bin/env python3
"""Makes the project's virtual environments and their version pins. Standard library only, Python 3.10+.

    python3 scripts/env.py core airflow      # make or refresh .venvs/core and .venvs/airflow
    python3 scripts/env.py --lock            # resolve constraints/*.txt anew
    python3 scripts/env.py --lock prefect    # … one of them

One environment per host, because Airflow and Prefect need different versions of FastAPI. An environment is left
alone while its stamp says that it was made from the same pyproject.toml, pins, Python and script. Two runs at
once wait for each other. It needs pip only to fetch uv where there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
TOOLS = VENVS / ".tools"
UV_VERSION = "0.13.8"  # the one fetched
UV_OLDEST = (0, 8)  # the oldest accepted when the machine has its own: it knows --group and --exact
LOWEST_PYTHON = "3.10"


@dataclass(frozen=True)
class Environment:
    """What goes into `.venvs/<name>`: a dependency group, and our project (with an extra) unless `ours` is false."""

    name: str
    extra: str | None = None
    ours: bool = True
    limits: tuple[str, ...] = ()  # what a resolution must respect beyond what the packages say of themselves

    @property
    def constraints(self) -> Path:
        """The file of its pins."""
        return ROOT / "constraints" / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return VENVS / self.name


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("core"),
        Environment("airflow", extra="airflow"),
        Environment("airflow-3.1", extra="airflow"),
        # Airflow 3.2.2 allows every FastAPI, but its API server does not start with 0.137 and later.
        Environment("airflow-3.2", extra="airflow", limits=("fastapi<0.137",)),
        # Prefect 3.8.8 allows every FastAPI below 1.0, but its server does not start with 0.151 and later.
        Environment("prefect", extra="prefect", limits=("fastapi<0.140",)),
        Environment("dagster", extra="dagster"),
        Environment("demo", ours=False),
        Environment("bench"),
        Environment("screens", ours=False),
        Environment("bench-airflow", extra="airflow"),
    )
}


def main() -> int:
    """Do what the command line asks; return the exit code."""
    if sys.version_info < (3, 10):  # noqa: UP036  # the interpreter that runs this file is the user's
        this = f"this is {sys.version.split()[0]} ({sys.executable})"
        return fail(f"Python 3.10 or later is needed; {this}. Name another one: make PYTHON=python3.11 …")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lock", action="store_true", help="resolve the constraints files anew")
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(ENVIRONMENTS))
    arguments = parser.parse_args()
    names: list[str] = arguments.names or list(ENVIRONMENTS)
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        return fail(f"No environment {', '.join(unknown)}. There are: {', '.join(ENVIRONMENTS)}.")
    try:
        for name in names:
            lock(ENVIRONMENTS[name]) if arguments.lock else sync(ENVIRONMENTS[name])
    except subprocess.CalledProcessError as error:
        return fail(f"This failed with exit code {error.returncode}:\n  {shlex.join(map(str, error.cmd))}")
    return 0


def fail(message: str) -> int:
    """Say why nothing came of it; return the exit code."""
    print(f"env.py: {message}", file=sys.stderr)
    return 1


# --- environments -------------------------------------------------------------------------------------------


def sync(environment: Environment) -> None:
    """Make `environment` as its files say; return at once when it already is."""
    stamp, wanted = environment.folder / ".stamp", stamp_text(environment)
    with exclusive(environment.name):
        if stamp.is_file() and stamp.read_text() == wanted and interpreter(environment).exists():
            return
        started = time.monotonic()
        print(f"==> .venvs/{environment.name}", flush=True)
        stamp.unlink(missing_ok=True)
        uv = find_uv()
        if not same_python(environment):
            uv("venv", "--quiet", "--no-project", "--clear", "--python", sys.executable, environment.folder)
        uv("pip", "install", "--quiet", "--exact", "--compile-bytecode", *install_arguments(environment))
        stamp.write_text(wanted)
        print(f"    ready in {time.monotonic() - started:.1f} s", flush=True)


def install_arguments(environment: Environment) -> list[str | Path]:
    """What `uv pip install` is told for `environment`."""
    arguments: list[str | Path] = ["--python", interpreter(environment)]
    if environment.constraints.exists():
        arguments += ["--constraints", environment.constraints, "--build-constraints", core_constraints()]
    arguments += ["--group", f"{ROOT / 'pyproject.toml'}:{environment.name}"]
    if environment.ours:
        extra = f"[{environment.extra}]" if environment.extra else ""
        arguments += ["--editable", f"{ROOT}{extra}"]
    return arguments


def core_constraints() -> Path:
    """The pins that also hold for the build back end."""
    return ENVIRONMENTS["core"].constraints


def interpreter(environment: Environment) -> Path:
    """The environment's Python."""
    return environment.folder / "bin" / "python"


def same_python(environment: Environment) -> bool:
    """Whether the environment exists and runs the Python that runs this script."""
    if not interpreter(environment).exists():
        return False
    answer = subprocess.run(
        [interpreter(environment), "-c", "import sys; print(sys.version)"], capture_output=True, check=False
    )
    return answer.returncode == 0 and answer.stdout.decode().strip() == sys.version.strip()


def stamp_text(environment: Environment) -> str:
    """Everything an environment is made from, as one line."""
    digest = hashlib.sha256()
    for file in (ROOT / "pyproject.toml", Path(__file__), environment.constraints, core_constraints()):
        digest.update(file.read_bytes() if file.exists() else b"none")
    return f"{digest.hexdigest()} {sys.version.split()[0]} {ROOT}\n"


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Hold the environment's lock file: a second run waits here and then finds the work done."""
    VENVS.mkdir(exist_ok=True)
    with (VENVS / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- pins ---------------------------------------------------------------------------------------------------


def lock(environment: Environment) -> None:
    """Write the environment's constraints file: for every package one version that serves Python 3.10 and later."""
    print(f"==> {environment.constraints.relative_to(ROOT)}", flush=True)
    arguments = ["--group", f"pyproject.toml:{environment.name}"]
    if environment.ours:
        arguments = ["pyproject.toml", *arguments]
    if environment.extra:
        arguments += ["--extra", environment.extra]
    VENVS.mkdir(exist_ok=True)
    limits = VENVS / f".{environment.name}.limits"
    limits.write_text("".join(f"{limit}\n" for limit in environment.limits))
    resolved = find_uv()(
        *("pip", "compile", "--quiet", "--universal", "--python-version", LOWEST_PYTHON),
        *("--fork-strategy", "fewest", "--no-annotate", "--no-header", "--constraints", limits),
        *arguments,
    )
    environment.constraints.parent.mkdir(exist_ok=True)
    environment.constraints.write_text(pins(resolved))


def pins(resolved: str) -> str:
    """Reduce a resolution to `name==version` lines.

    A constraint holds only where the package is wanted at all, so the markers can go, unless a package needs
    different versions on different Pythons: then its markers stay.
    """
    lines = [line for line in resolved.splitlines() if re.match(r"[A-Za-z0-9]", line)]
    names = [line.partition("==")[0] for line in lines]
    plain = {name for name in names if names.count(name) == 1}
    kept = [
        line.partition(" ;")[0] if name in plain else line for name, line in zip(names, lines, strict=True)
    ]
    return "".join(f"{line.strip()}\n" for line in kept)


# --- uv -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uv:
    """Calls uv with the settings of this machine's pip; returns what it printed."""

    program: Path
    environ: dict[str, str]

    def __call__(self, *arguments: str | Path) -> str:
        """Run uv in the project's root and return what it printed; its complaints go to the terminal."""
        command = [str(self.program), *map(str, arguments)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=self.environ
        )
        return done.stdout


def find_uv() -> Uv:
    """The machine's uv, or one fetched with pip into `.venvs/.tools`."""
    environ = {**os.environ, "UV_PYTHON_DOWNLOADS": "never", **uv_settings(pip_settings(), os.environ)}
    environ.pop("VIRTUAL_ENV", None)
    own = TOOLS / "bin" / "uv"
    found = shutil.which("uv")
    if found and uv_version(Path(found)) >= UV_OLDEST:
        return Uv(Path(found), environ)
    with exclusive("tools"):
        if uv_version(own) < UV_OLDEST:
            print(f"==> uv {UV_VERSION}", flush=True)
            # With --target, pip also works where the system's Python is managed by somebody else, or has no venv.
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--upgrade", "--target", str(TOOLS)]
            quiet = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
            subprocess.run([*pip, f"uv=={UV_VERSION}"], check=True, env=quiet)
    return Uv(own, environ)


def uv_version(program: Path) -> tuple[int, ...]:
    """The version of a uv, or () where it is missing or does not run."""
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    found = re.search(r"(\d+)\.(\d+)", answer)
    return tuple(map(int, found.groups())) if found else ()


def pip_settings() -> dict[str, str]:
    """This machine's pip configuration, files and environment together: {'index-url': …}."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    settings = {}
    for line in answer.stdout.splitlines():  # "global.index-url='…'", then ":env:.index-url='…'"
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in {"global", "install", ":env:"} and len(value) > 2:
            settings[name] = value[1:-1].replace("\\n", " ").strip()
    return settings


def uv_settings(pip: dict[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Pip's settings under uv's names, since uv does not read them; what the user has set for uv stays."""
    wanted = {
        "UV_DEFAULT_INDEX": pip.get("index-url"),
        "UV_INDEX": pip.get("extra-index-url"),
        "UV_INDEX_STRATEGY": "unsafe-best-match" if "extra-index-url" in pip else None,  # as pip does
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()) or None,
        "UV_INSECURE_HOST": pip.get("trusted-host"),
        "UV_HTTP_TIMEOUT": pip.get("timeout") or pip.get("default-timeout"),
        "SSL_CERT_FILE": pip.get("cert"),
        "ALL_PROXY": pip.get("proxy"),
    }
    return {name: value for name, value in wanted.items() if value and name not in environ}


if __name__ == "__main__":
    sys.exit(main())
