"""Source trees packed, carried and unpacked: what arrives, what stays behind, and what is refused."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flow_core import bundle
from flow_core.errors import ValidationError
from flow_core.runner import unpack
from flow_core.runner.unpack import BadArchive

if TYPE_CHECKING:
    from tests.core.conftest import Machine

NASTY = [
    "'; echo x",
    "a\nb",
    "é😀",
    " lead",
    "-rf",
    "$(x)",
    "\udcff",
    "x" * 200,
    "deep/" + "d" * 120 + "/" + "f" * 120,
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "code's root"
    path.mkdir()
    return path


@pytest.fixture
def carry(tmp_path: Path) -> Callable[[Path], Path]:
    """Pack a tree and unpack it elsewhere."""

    def carried(root: Path) -> Path:
        into = tmp_path / "machine" / "work"
        packed = bundle.pack(root, tmp_path / "out")
        unpack.extract(str(packed.path), str(into))
        return into

    return carried


def fill(root: Path, **files: str) -> None:
    for name, text in files.items():
        put(root, name.replace("__", "/"), text)


def put(root: Path, name: str, text: str = "") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def listed(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# ------------------------------------------------------------ what arrives


def test_files_arrive_with_their_names_content_and_executable_bits(
    root: Path, carry: Callable[[Path], Path]
) -> None:
    for name in NASTY:
        put(root, name, "text of\n" + ascii(name))
    put(root, "run.sh", "#!/bin/sh").chmod(0o750)
    (root / "data.bin").write_bytes(bytes(range(256)) * 5000)
    (root / "empty").mkdir()
    into = carry(root)
    assert listed(into) == listed(root)
    for name in NASTY:
        assert (into / name).read_text() == "text of\n" + ascii(name)
    assert (into / "data.bin").read_bytes() == (root / "data.bin").read_bytes()
    assert os.access(into / "run.sh", os.X_OK)
    assert not (into / "data.bin").stat().st_mode & 0o111


def test_caches_repositories_and_environments_stay_behind(root: Path, carry: Callable[[Path], Path]) -> None:
    left_out = (
        ".git/config",
        "a/__pycache__/x.pyc",
        "a/x.pyc",
        ".venv/bin/python",
        "js/node_modules/x",
        ".DS_Store",
    )
    for name in (*left_out, "my env/pyvenv.cfg", "my env/lib/x.py", "train.py", "git/x", "env/x.py"):
        put(root, name)
    assert listed(carry(root)) == ["a", "env", "env/x.py", "git", "git/x", "js", "train.py"]


def test_what_the_caller_excludes_stays_behind_whatever_an_ignore_file_says(
    root: Path, tmp_path: Path
) -> None:
    put(root, ".flowignore", "!*.log\n!sub/data/\n")
    put(root, "sub/.flowignore", "!keep.log")
    for name in ("train.py", "a.log", "data/x", "sub/keep.log", "sub/data/x", "sub/model.py"):
        put(root, name)
    packed = bundle.pack(root, tmp_path / "out", excludes=["*.log", "data/", "# a comment", ""])
    assert packed.files == (".flowignore", "sub/.flowignore", "sub/model.py", "train.py")


def test_an_ignore_file_has_the_last_word_also_over_the_defaults(
    root: Path, carry: Callable[[Path], Path]
) -> None:
    put(root, ".flowignore", "!node_modules/\n*.bin\n/data/*\n!/data/small\n")
    put(root, "sub/.flowignore", "!keep.bin\n/only_here")
    for name in (
        "node_modules/x",
        "a.bin",
        "data/big",
        "data/small",
        "sub/keep.bin",
        "sub/only_here",
        "only_here",
    ):
        put(root, name)
    expected = [".flowignore", "data/small", "node_modules/x", "only_here", "sub/.flowignore", "sub/keep.bin"]
    assert [name for name in listed(carry(root)) if not (root / name).is_dir()] == expected


def test_links_that_stay_inside_arrive_as_links(root: Path, carry: Callable[[Path], Path]) -> None:
    put(root, "pkg/real.py", "real")
    (root / "pkg/near.py").symlink_to("real.py")
    (root / "far.py").symlink_to(root / "pkg/real.py")  # absolute
    (root / "around.py").symlink_to(f"../{root.name}/pkg/real.py")  # out and in again
    (root / "folder").symlink_to("pkg")
    (root / "dangling").symlink_to("nothing")
    into = carry(root)
    shutil.rmtree(root)
    for name in ("pkg/near.py", "far.py", "around.py", "folder/real.py"):
        assert (into / name).read_text() == "real"
    assert [path.is_symlink() for path in (into / "far.py", into / "folder", into / "dangling")] == [True] * 3


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "../..", "pkg/../../outside"])
def test_a_link_that_leads_out_is_refused_by_name(root: Path, target: str) -> None:
    put(root.parent, "outside")
    put(root, "pkg/x")
    (root / "leads out").symlink_to(target)
    with pytest.raises(ValidationError, match="the link 'leads out' leads out of code_root") as caught:
        bundle.pack(root, root.parent / "out")
    assert target in str(caught.value)
    put(root, ".flowignore", "/leads out")
    assert bundle.pack(root, root.parent / "out").files == (".flowignore", "pkg/x")


def test_pipes_and_sockets_stay_behind(root: Path, carry: Callable[[Path], Path]) -> None:
    os.mkfifo(root / "pipe")
    put(root, "x")
    assert listed(carry(root)) == ["x"]


# ------------------------------------------------------------ one name for one tree


def test_the_same_tree_has_the_same_bytes_whoever_wrote_it_and_when(tmp_path: Path) -> None:
    packed = []
    names = [f"d{i % 7}/f{i}" for i in range(50)]
    for copy in range(2):
        root = tmp_path / f"copy{copy}"
        random.Random(copy).shuffle(names)
        for name in names:
            os.utime(put(root, name, name), (copy * 10**9, copy * 10**9))
        (root / "d1/f1").chmod(0o744 if copy else 0o711)
        os.umask(os.umask(0o022))
        if os.getuid() == 0:
            os.chown(root / "d2/f2", 1000 + copy, 1000)
        packed.append(bundle.pack(root, tmp_path / f"out{copy}"))
    assert packed[0].sha256 == packed[1].sha256
    assert packed[0].path.name == packed[1].path.name == f"{packed[0].sha256}.tar.gz"
    assert packed[0].path.read_bytes() == packed[1].path.read_bytes()
    assert packed[0].files == tuple(sorted(names))
    assert packed[0].size_bytes == sum(len(name) for name in names)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: put(root, "a", "other"),
        lambda root: (root / "a").rename(root / "b"),
        lambda root: (root / "a").chmod(0o755),
        lambda root: put(root, "new"),
        lambda root: (root / "folder").mkdir(),
    ],
    ids=["content", "name", "executable", "file", "folder"],
)
def test_another_tree_has_another_name(root: Path, change: Callable[[Path], object]) -> None:
    put(root, "a", "text")
    before = bundle.pack(root, root.parent / "out").sha256
    change(root)
    assert bundle.pack(root, root.parent / "out").sha256 != before


def test_archives_are_kept_in_a_private_folder_for_a_day(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    put(root, "x")
    first = bundle.pack(root).path
    folder = first.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    os.utime(first, (0, 0))
    put(root, "y")
    second = bundle.pack(root).path
    assert [path for path in folder.iterdir() if path.suffix == ".gz"] == [second]
    folder.chmod(0o777)
    with pytest.raises(ValidationError, match="only you can use"):
        bundle.pack(root)


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_root_that_is_no_folder_is_refused(root: Path, name: str) -> None:
    put(root, "file")
    with pytest.raises(ValidationError, match="is no folder"):
        bundle.pack(root / name)


def test_too_much_is_refused_with_the_largest_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_BYTES", 1_000_000)
    for i in range(5):
        put(root, f"data/images/train/{i}/x", "x" * 300_000)
    put(root, "src/a", "x" * 1000)
    put(root, "models/big", "x" * 400_000)
    with pytest.raises(ValidationError) as caught:
        bundle.pack(root, root.parent / "out")
    text = str(caught.value)
    assert "7 files of 1.8 MB together" in text
    assert (
        "The largest folders: data/images/train/ (5 files, 1.4 MB), models/ (1 files, 0.4 MB), src/" in text
    )
    assert ".flowignore" in text
    put(root, ".flowignore", "data/")
    assert len(bundle.pack(root, root.parent / "out").files) == 3


def test_too_many_files_are_refused_before_all_are_looked_at(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_FILES", 10)
    for i in range(11):
        put(root, f"many/{i}")
    with pytest.raises(ValidationError, match=r"many/ \(11 files"):
        bundle.pack(root, root.parent / "out")


@pytest.mark.parametrize("kind", ["file", "folder", "ignore file"])
def test_what_cannot_be_read_is_named(kind: str) -> None:
    name = {"file": "secret", "folder": "secret", "ignore file": ".flowignore"}[kind]
    script = """
import os, sys, tempfile
sys.path[:] = eval(sys.argv[1])
from flow_core import bundle, errors
if os.getuid() == 0: os.setegid(65534); os.seteuid(65534)  # root reads everything
with tempfile.TemporaryDirectory() as root:
    path = os.path.join(root, sys.argv[2])
    os.mkdir(path) if sys.argv[3] == "folder" else open(path, "w").close()
    os.chmod(path, 0)
    try: bundle.pack(root, root)
    except errors.ValidationError as error: print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, repr(sys.path), name, kind],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{name!r} in code_root cannot be read: Permission denied" in done.stdout, done.stderr
    assert f"write /{name} into .flowignore" in done.stdout


# ------------------------------------------------------------ what a hostile archive cannot do


def archive(path: Path, *members: tuple[str, bytes | str], kind: bytes = tarfile.REGTYPE) -> str:
    with tarfile.open(path, "w:gz") as packed:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = (tarfile.SYMTYPE if kind == tarfile.REGTYPE else kind), content
                packed.addfile(info)
            else:
                info.type, info.size = kind, len(content)
                packed.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize(
    "members",
    [
        [("/tmp/flow-evil", b"x")],
        [("../evil", b"x")],
        [("a/../../evil", b"x")],
        [("a/..", b"x")],
        [("", b"x")],
        [("link", "/etc/passwd")],
        [("link", "..")],
        [("a/link", "../../x")],
        [("up", ".."), ("up/evil", b"x")],
        [("d/e/up", "../.."), ("out", "d/e/up/..")],
        [("self", "self/../..")],
    ],
)
def test_no_member_leads_out(tmp_path: Path, members: list[tuple[str, bytes | str]]) -> None:
    into = tmp_path / "box" / "work"
    with pytest.raises(BadArchive, match="does not stay|leads out|no name"):
        unpack.extract(archive(tmp_path / "x.tar.gz", *members), str(into))
    assert [path.name for path in (tmp_path / "box").iterdir()] == ["work"]
    for path in into.rglob("*"):
        assert os.path.realpath(path).startswith(str(into))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_hard_links_devices_and_pipes_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = archive(tmp_path / "x.tar.gz", ("evil", "/etc/passwd"), kind=kind)
    with pytest.raises(BadArchive, match="'evil' is neither a file, a folder nor a symbolic link"):
        unpack.extract(path, str(tmp_path / "work"))


def test_an_archive_that_is_cut_or_is_none_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "x").write_bytes(os.urandom(100_000))
    whole = bundle.pack(root, tmp_path / "out").path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"noise", gzip.compress(b"noise"), whole[:-20] + bytes(20)):
        path = tmp_path / "cut.tar.gz"
        path.write_bytes(data)
        with pytest.raises(BadArchive, match="damaged|is cut"):
            unpack.extract(str(path), str(tmp_path / "work"))


def test_unpacking_again_restores_what_an_earlier_run_has_changed(root: Path, tmp_path: Path) -> None:
    put(root, "pkg/a.py", "new")
    put(root, "b.py", "new")
    (root / "link").symlink_to("b.py")
    packed, into, outside = (
        str(bundle.pack(root, tmp_path / "out").path),
        tmp_path / "work",
        tmp_path / "outside",
    )
    unpack.extract(packed, str(into))
    shutil.rmtree(into / "pkg")
    outside.mkdir()
    (into / "pkg").symlink_to(outside)
    (into / "b.py").unlink()
    put(into, "b.py/in_the_way")
    put(into, "own_file", "kept")
    unpack.extract(packed, str(into))
    assert (
        (into / "pkg/a.py").read_text() == (into / "b.py").read_text() == (into / "link").read_text() == "new"
    )
    assert (into / "own_file").read_text() == "kept"
    assert not list(outside.iterdir())


def test_every_python_unpacks(each: Machine, root: Path, tmp_path: Path) -> None:
    for name in NASTY:
        put(root, name, "text")
    put(root, "run.sh").chmod(0o755)
    (root / "link").symlink_to("run.sh")
    packed = bundle.pack(root, tmp_path / "out").path
    script = "import sys; sys.path.insert(0, sys.argv[1])\n"
    script += "from flow_runner import unpack; unpack.extract(*sys.argv[2:])"
    argv = [
        each.python,
        "-I",
        "-W",
        "error",
        "-c",
        script,
        str(each.runner.parent),
        str(packed),
        str(each.work),
    ]
    subprocess.run(argv, env={"LC_ALL": "C.UTF-8"}, check=True)
    assert listed(each.work) == listed(root)
