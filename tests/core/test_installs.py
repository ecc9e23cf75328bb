"""Packages installed once per set and Python, by whatever installer the machine has."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from flow_core.runner import installs
from tests.core.conftest import VERSIONS, interpreter

FLOW = Path(installs.__file__).parents[2]

PROGRAM = f"""
import sys
sys.path.insert(0, {str(FLOW)!r})
from flow_core.runner import installs
folder, lock = installs.provide(sys.argv[2:], sys.argv[1])
installs.activate(folder)
print(folder)
"""

# A build back end that needs nothing and notes that it was asked.
BACKEND = """
import os, zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    with open({note!r}, "a") as file:
        file.write("built\\n")
    while os.path.exists({hold!r}):
        pass
    with zipfile.ZipFile(os.path.join(folder, "built-1-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("built.py", "VALUE = 'from source'")
        wheel.writestr("built-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: built\\nVersion: 1\\n")
        wheel.writestr("built-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("built-1.dist-info/RECORD", "")
    return "built-1-py3-none-any.whl"
"""


def wheel(folder: Path, name: str, version: str = "1", **modules: str) -> Path:
    """Write a wheel with these modules."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as packed:
        for module, text in modules.items():
            packed.writestr(f"{module}.py", text)
        packed.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    return path


def offline(wheels: Path, *requirements: str) -> list[str]:
    return ["--no-index", f"--find-links {wheels}", *requirements]


def program(
    envs: Path, requirements: list[str], after: str = "", python: str = sys.executable, **env: str
) -> subprocess.Popen[str]:
    """Start a process that wants the packages and then runs `after`."""
    kept = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return subprocess.Popen(
        [python, "-c", PROGRAM + textwrap.dedent(after), str(envs), *requirements],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, **env},
        start_new_session=True,
    )


def output(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


def drafts(envs: Path) -> list[str]:
    return [path.name for path in envs.iterdir() if path.suffix != ".lock"]


@pytest.fixture
def envs(tmp_path: Path) -> Path:
    return tmp_path / "a'; echo home" / "envs"


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    wheel(tmp_path / "wheels", "tool", tool="VALUE = 'installed'\nimport sys, os")
    return tmp_path / "wheels"


def test_packages_are_importable_by_the_process_and_by_the_pythons_that_it_starts(
    envs: Path, wheels: Path
) -> None:
    after = """
        import subprocess, tool
        print(tool.VALUE, flush=True)
        subprocess.run([sys.executable, "-c", "import tool; print(tool.VALUE)"], check=True)
    """
    assert output(program(envs, offline(wheels, "tool"), after))[1:] == ["installed", "installed"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_python_gets_a_folder_of_its_own(version: str, envs: Path, wheels: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    ours, lock = installs.provide(offline(wheels, "tool"), str(envs))
    os.close(lock)
    theirs, value = output(
        program(envs, offline(wheels, "tool"), "import tool; print(tool.VALUE)", python=python)
    )
    same = version == "{}.{}".format(*sys.version_info)
    assert (value, theirs == ours) == ("installed", same)


def test_what_is_asked_for_wins_over_what_the_machine_has_and_never_over_the_standard_library(
    envs: Path, tmp_path: Path
) -> None:
    found = wheel(tmp_path, "newer", packaging="VERSION = 'asked for'", json="VERSION = 'asked for'")
    after = "import json, packaging; print(packaging.VERSION, hasattr(json, 'VERSION'))"
    assert output(program(envs, offline(tmp_path, str(found)), after))[1:] == ["asked for False"]


def test_a_set_is_installed_once_however_its_lines_are_ordered(envs: Path, wheels: Path) -> None:
    wheel(wheels, "other", other="")
    first, lock = installs.provide(offline(wheels, "tool", "other"), str(envs))
    os.close(lock)
    (Path(first) / "here").touch()
    second, lock = installs.provide(offline(wheels, "other ", "tool"), str(envs))
    os.close(lock)
    assert second == first and (Path(second) / "here").exists()
    assert installs._digest(["tool==1"]) != installs._digest(["tool==2"])


def test_of_two_processes_one_installs_and_the_other_waits(envs: Path, tmp_path: Path) -> None:
    source, note, hold = tmp_path / "source", tmp_path / "note", tmp_path / "hold"
    sdist(source, note, hold)
    hold.touch()
    both = [program(envs, [f"--find-links {source}", "--no-index", "built"]) for _ in range(2)]
    until(note.exists)
    hold.unlink()
    assert output(both[0]) == output(both[1])
    assert note.read_text() == "built\n"
    assert len(drafts(envs)) == 1


def test_a_killed_install_leaves_nothing_that_counts_and_the_next_one_cleans_up(
    envs: Path, tmp_path: Path
) -> None:
    source, note, hold = tmp_path / "source", tmp_path / "note", tmp_path / "hold"
    sdist(source, note, hold)
    hold.touch()
    requirements = [f"--find-links {source}", "--no-index", "built"]
    killed = program(envs, requirements)
    until(note.exists)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert [name[:5] for name in drafts(envs)] == [".new-"]
    hold.unlink()
    after = "import built; print(built.VALUE)"
    assert output(program(envs, requirements, after))[1] == "from source"
    assert len(drafts(envs)) == 1


def test_a_failed_install_leaves_nothing_and_says_what_the_installer_said(envs: Path, wheels: Path) -> None:
    with pytest.raises(installs.InstallFailed, match="no-such-package-here") as caught:
        installs.provide(offline(wheels, "tool", "no-such-package-here"), str(envs))
    assert "the dependencies could not be installed: python ended with exit code 1" in str(caught.value)
    assert drafts(envs) == []
    _, lock = installs.provide(offline(wheels, "tool"), str(envs))
    os.close(lock)


def test_a_changed_wheel_is_another_set(envs: Path, tmp_path: Path) -> None:
    path = wheel(tmp_path, "tool", tool="VALUE = 1")
    for spelling in (str(path), f"tool @ file://{path}"):
        first = installs._digest([spelling])
        wheel(tmp_path, "tool", tool="VALUE = 2")
        assert installs._digest([spelling]) != first
        wheel(tmp_path, "tool", tool="VALUE = 1")
    with pytest.raises(installs.InstallFailed, match="is a folder"):
        installs.provide([str(tmp_path)], str(envs))
    with pytest.raises(installs.InstallFailed, match="cannot be read on this machine"):
        installs.provide([str(tmp_path / "gone.whl")], str(envs))


def test_what_nobody_has_used_for_long_is_removed_and_what_is_in_use_stays(envs: Path, wheels: Path) -> None:
    for name in ("old", "used", "new"):
        wheel(wheels, name, **{name: ""})
    old, lock = installs.provide(offline(wheels, "old"), str(envs))
    os.close(lock)
    used, holder = installs.provide(offline(wheels, "used"), str(envs))
    long_ago = time.time() - installs.KEPT_S - 60
    for folder in (old, used):
        os.utime(folder + ".lock", (long_ago, long_ago))
    new, lock = installs.provide(offline(wheels, "new"), str(envs))
    os.close(lock)
    assert sorted(drafts(envs)) == sorted([Path(used).name, Path(new).name])
    os.close(holder)


def test_without_any_installer_the_error_says_what_to_install(
    envs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installs, "_bundled_pip", lambda: None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(installs.InstallFailed, match="has no pip, and there is no uv on the PATH"):
        installs.provide(["tool"], str(envs))
    assert drafts(envs) == []


def test_uv_serves_where_there_is_no_pip(envs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text('#!/bin/sh\necho "$@" > "$UV_SAID"\n')
    uv.chmod(0o755)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", f"{uv.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("UV_SAID", str(tmp_path / "said"))
    _, lock = installs.provide(["tool"], str(envs))
    os.close(lock)
    said = (tmp_path / "said").read_text().split("--requirement")[0]
    assert said.startswith(f"pip install --python {python} --target {envs}/.new-")


def test_the_configured_index_serves_a_real_package(envs: Path) -> None:
    [_, name] = output(program(envs, ["iniconfig>=2"], "import iniconfig; print(iniconfig.__file__)"))
    assert name.startswith(str(envs))


def test_a_user_of_a_set_keeps_its_lock(envs: Path, wheels: Path) -> None:
    folder, lock = installs.provide(offline(wheels, "tool"), str(envs))
    with open(folder + ".lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


def sdist(folder: Path, note: Path, hold: Path) -> None:
    """Write a source distribution that is built by a back end of its own, without any other package."""
    import io
    import tarfile

    folder.mkdir()
    members = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.format(note=str(note), hold=str(hold)),
        "PKG-INFO": "Metadata-Version: 2.1\nName: built\nVersion: 1\n",
    }
    with tarfile.open(folder / "built-1.tar.gz", "w:gz") as packed:
        for name, text in members.items():
            info = tarfile.TarInfo(f"built-1/{name}")
            info.size = len(text)
            packed.addfile(info, io.BytesIO(text.encode()))


def until(happened: object, limit_s: float = 60.0) -> None:
    assert callable(happened)
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
