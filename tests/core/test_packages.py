"""A Runner's folder on its way to the workers: packed, stored by its content, checked, unpacked."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flow_core import packages
from flow_core.errors import ConfigError, ValidationError
from flow_core.packages import Package
from flow_core.runner import provision
from flow_core.runner.provision import PackageNotFound


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "my project's; echo folder"
    path.mkdir()
    (path / "model.py").write_text("VALUE = 1")
    return path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "shared; echo x"
    path.mkdir()
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task"
    path.mkdir()
    return path


def make(root: Path, storage: str | None) -> Package:
    return packages.make(root, name="my-app", storage=storage, excludes=[])


def arrive(package: Package, task: Path) -> list[str]:
    """The files that a worker has in its working directory."""
    provision.provide(str(task), dependencies=(), package=package.source)
    return sorted(str(path.relative_to(task)) for path in task.rglob("*") if path.is_file())


# ------------------------------------------------------------ what is packed


def test_environments_caches_and_excluded_files_stay_behind_and_nothing_is_written_into_the_folder(
    root: Path, shared: Path, task: Path
) -> None:
    left_out = [
        ".venv/x",
        "venv/x",
        "__pycache__/m.pyc",
        "m.pyc",
        ".gitignore",
        ".git/config",
        "a.log",
        "data/x",
    ]
    for name in [*left_out, "sub/.gitignore", "sub/keep.txt", "secret"]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    (root / ".flowignore").write_text("/secret\n")
    before = sorted(root.rglob("*"))
    package = packages.make(root, name="a", storage=f"file://{shared}", excludes=["*.log", "data/"])
    assert sorted(root.rglob("*")) == before
    assert arrive(package, task) == ["work/.flowignore", "work/model.py", "work/sub/keep.txt"]


def test_without_a_storage_the_folder_travels_with_the_task(root: Path) -> None:
    package = make(root, None)
    assert package.source is None
    assert [file.name for file in package.files] == ["code.tar.gz"]


# ------------------------------------------------------------ a shared file system


def test_the_name_is_that_of_the_content_so_that_changed_code_is_another_package(
    root: Path, shared: Path
) -> None:
    first, again = (make(root, f"file://{shared}") for _ in range(2))
    assert first == again and len(list(shared.iterdir())) == 1
    (root / "model.py").write_text("VALUE = 2")
    second = make(root, f"file://{shared}")
    assert second.source != first.source
    assert {path.name for path in shared.iterdir()} == {
        f"my-app-{package.sha256}.tar.gz" for package in (first, second)
    }


def test_a_package_that_is_there_is_not_written_again_and_counts_as_used(root: Path, shared: Path) -> None:
    make(root, f"file://{shared}")
    [path] = shared.iterdir()
    os.utime(path, (1, 1))
    inode = path.stat().st_ino
    make(root, f"file://{shared}")
    assert path.stat().st_ino == inode and path.stat().st_mtime > 1


def test_what_only_has_the_right_name_is_replaced(root: Path, shared: Path, task: Path) -> None:
    make(root, f"file://{shared}")
    [path] = shared.iterdir()
    path.write_bytes(b"something else")
    assert arrive(make(root, f"file://{shared}"), task) == ["work/model.py"]


def test_two_racing_uploads_leave_one_whole_package(root: Path, shared: Path, task: Path) -> None:
    (root / "weights").write_bytes(os.urandom(2_000_000))
    program = (
        "import sys; from pathlib import Path; from flow_core import packages;"
        "packages.make(Path(sys.argv[1]), name='my-app', storage=sys.argv[2], excludes=[])"
    )
    command = [sys.executable, "-c", program, str(root), f"file://{shared}"]
    racers = [subprocess.Popen(command, cwd=Path(packages.__file__).parents[1]) for _ in range(4)]
    assert [racer.wait(60) for racer in racers] == [0] * 4
    assert len(list(shared.iterdir())) == 1
    assert arrive(make(root, f"file://{shared}"), task) == ["work/model.py", "work/weights"]


def test_workers_of_another_user_can_read_it(root: Path, shared: Path) -> None:
    make(root, f"file://{shared}")
    [path] = shared.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def test_old_packages_and_the_rests_of_killed_uploads_are_removed(root: Path, shared: Path) -> None:
    make(root, f"file://{shared}")
    [old] = shared.iterdir()
    rest, foreign = shared / ".new-x", shared / "notes.tar.gz"
    for path in (rest, foreign):
        path.touch()
    long_ago = time.time() - packages.KEPT_S - 60
    for path in (old, rest, foreign):
        os.utime(path, (long_ago, long_ago))
    (root / "model.py").write_text("VALUE = 2")
    package = make(root, f"file://{shared}")
    assert {path.name for path in shared.iterdir()} == {f"my-app-{package.sha256}.tar.gz", "notes.tar.gz"}


def test_a_storage_that_is_not_there_or_cannot_be_written_is_named_with_what_to_do(
    root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="Storage directory does not exist") as caught:
        make(root, f"file://{tmp_path}/missing")
    assert f"mkdir -p {tmp_path}/missing" in str(caught.value)
    with pytest.raises(ConfigError, match="Storage directory is not writable"):
        make(root, "file:///proc/self")


def test_a_worker_that_does_not_share_the_storage_says_so(root: Path, shared: Path, task: Path) -> None:
    package = make(root, f"file://{shared}")
    [path] = shared.iterdir()
    path.unlink()
    with pytest.raises(PackageNotFound, match="Package path not found") as caught:
        arrive(package, task)
    assert str(path) in str(caught.value) and "shares with the one that uploads" in str(caught.value)


def test_a_damaged_package_is_not_unpacked(root: Path, shared: Path, task: Path) -> None:
    package = make(root, f"file://{shared}")
    [path] = shared.iterdir()
    path.write_bytes(gzip.compress(b"other code"))
    with pytest.raises(PackageNotFound, match="is damaged"):
        arrive(package, task)
    assert list(task.iterdir()) == []


def test_a_folder_that_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="is no folder"):
        make(tmp_path / "missing", None)


# ------------------------------------------------------------ any other storage


def test_another_storage_is_written_and_read_through_fsspec(root: Path, shared: Path, task: Path) -> None:
    packages_made = [make(root, f"local://{shared}") for _ in range(2)]
    assert len(list(shared.iterdir())) == 1
    assert packages_made[0].source == {
        "url": f"local://{shared}/my-app-{packages_made[0].sha256}.tar.gz",
        "sha256": packages_made[0].sha256,
    }
    assert arrive(packages_made[1], task) == ["work/model.py"]


def test_a_storage_that_fsspec_does_not_know_or_cannot_write_is_named(
    root: Path, shared: Path, task: Path
) -> None:
    with pytest.raises(ConfigError, match="package storage nosuch://x cannot be used"):
        make(root, "nosuch://x")
    package = make(root, f"local://{shared}")
    [path] = shared.iterdir()
    path.unlink()
    with pytest.raises(PackageNotFound, match="Package path not found: local://.* FileNotFoundError"):
        arrive(package, task)


def test_without_fsspec_the_error_says_what_to_install(
    root: Path, shared: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make(root, f"local://{shared}")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"pip install 'flow-gpu\[fsspec\]'"):
        make(root, f"local://{shared}")
    with pytest.raises(PackageNotFound, match="its Python has no fsspec. Name it among the dependencies"):
        arrive(package, task)
