"""Archives are made of parts: what has not changed is neither packed nor sent again."""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flow_core import archive, bundle


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree of 200 files that were written a while ago."""
    folder = tmp_path / "tree"
    for number in range(200):
        path = folder / f"package_{number % 7}" / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(2000))
    return folder


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an hour later than the files say, so that what was written has settled."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)


def backwards_in_time(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, (1, 1))


def parts(packed: bundle.Bundle) -> list[str]:
    listed = archive.parts_of(packed.path)
    assert listed is not None
    return [sha for sha, _ in listed]


def test_the_list_says_what_the_archive_is_made_of(root: Path, tmp_path: Path) -> None:
    packed = bundle.pack(root, tmp_path / "out")
    listed = archive.parts_of(packed.path)
    assert listed is not None and 5 < len(listed) < 50
    assert sum(size for _, size in listed) == packed.path.stat().st_size


def test_three_changed_files_change_three_parts_at_most(root: Path, tmp_path: Path) -> None:
    before = parts(bundle.pack(root, tmp_path / "out"))
    for number in (3, 70, 150):
        (root / f"package_{number % 7}" / f"module_{number}.py").write_bytes(os.urandom(5000))
    after = parts(bundle.pack(root, tmp_path / "out"))
    assert 1 <= len(set(after) - set(before)) <= 3


def test_a_new_file_does_not_move_the_others_into_other_parts(root: Path, tmp_path: Path) -> None:
    before = parts(bundle.pack(root, tmp_path / "out"))
    (root / "a_new_one.py").write_text("x = 1\n")
    (root / "package_3" / "another.py").write_text("x = 1\n")
    after = parts(bundle.pack(root, tmp_path / "out"))
    assert len(set(after) - set(before)) <= 4


def test_what_has_not_changed_is_not_read_again(
    root: Path, tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bundle.pack(root, tmp_path / "out")
    read: list[str] = []
    content = bundle._content

    def counted(top: str, name: str) -> bytes:
        read.append(name)
        return content(top, name)

    monkeypatch.setattr(bundle, "_content", counted)
    os.utime(first.path, (0, 0))
    again = bundle.pack(root, tmp_path / "out")
    assert (read, again.path, again.sha256) == ([], first.path, first.sha256)
    assert again.path.stat().st_mtime > 0, "it is kept for another day"
    (root / "package_0" / "module_7.py").write_text("changed")
    changed = bundle.pack(root, tmp_path / "out")
    assert 0 < len(read) < 60
    with tarfile.open(changed.path) as packed:
        member = packed.extractfile("package_0/module_7.py")
        assert member is not None and member.read() == b"changed"
        assert len(packed.getnames()) == 207


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[::-1]),  # the same size, and maybe the same instant
        backwards_in_time,
        lambda path: path.chmod(0o755),
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_name("other.py")),
    ],
    ids=["content", "content with an old time", "mode", "gone", "renamed"],
)
def test_every_change_makes_another_archive(
    root: Path, tmp_path: Path, later: None, change: Callable[[Path], object]
) -> None:
    first = bundle.pack(root, tmp_path / "out")
    change(root / "package_1" / "module_1.py")
    assert bundle.pack(root, tmp_path / "out").sha256 != first.sha256


def test_a_change_in_the_same_instant_as_the_pack_is_seen(root: Path, tmp_path: Path) -> None:
    path = root / "package_1" / "module_1.py"
    for number in range(30):
        path.write_text(f"x = {number:03}")
        with tarfile.open(bundle.pack(root, tmp_path / "out").path) as packed:
            member = packed.extractfile("package_1/module_1.py")
            assert member is not None and member.read() == f"x = {number:03}".encode()


@pytest.mark.parametrize("harm", ["gone", "cut", "other", "garbled"])
def test_an_earlier_archive_that_was_harmed_does_no_harm(
    root: Path, tmp_path: Path, later: None, harm: str
) -> None:
    first = bundle.pack(root, tmp_path / "out")
    expected = first.path.read_bytes()
    for path in (tmp_path / "out").iterdir():
        if path.suffix == ".gz":
            data = {"cut": expected[:1000], "other": bytes(len(expected)), "garbled": b""}.get(harm)
            path.unlink() if data is None else path.write_bytes(data)
        elif harm == "garbled":
            path.write_text("{nonsense")
    (root / "package_1" / "new.py").write_text("x")
    with tarfile.open(bundle.pack(root, tmp_path / "out").path) as packed:
        assert len(packed.getnames()) == 208


def test_the_same_tree_elsewhere_has_the_same_name_and_parts(root: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    for path in root.rglob("*.py"):
        target = twin / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    ours, theirs = bundle.pack(root, tmp_path / "out"), bundle.pack(twin, tmp_path / "out-2")
    assert (ours.sha256, parts(ours)) == (theirs.sha256, parts(theirs))
