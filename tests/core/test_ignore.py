"""Ignore files mean what they mean to git: each rule as documented, and generated trees compared with git itself."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_core import bundle
from flow_core.ignore import IgnoreFile


@pytest.mark.parametrize(
    ("text", "path", "is_folder", "verdict"),
    [
        ("*.log", "a/b/x.log", False, True),
        ("*.log", "x.log.txt", False, None),
        ("# *.log", "x.log", False, None),
        ("\\#x", "#x", False, True),
        ("\\!x", "!x", False, True),
        ("", "x", False, None),
        ("build/", "a/build", True, True),
        ("build/", "a/build", False, None),
        ("/build", "build", False, True),
        ("/build", "a/build", False, None),
        ("a/b", "a/b", False, True),
        ("a/b", "c/a/b", False, None),
        ("**/b", "c/a/b", False, True),
        ("**/b", "b", False, True),
        ("a/**", "a/b/c", False, True),
        ("a/**", "a", True, None),
        ("a/**/b", "a/b", False, True),
        ("a/**/b", "a/x/y/b", False, True),
        ("a/**/**/b", "a/b", False, True),
        ("a**b", "a/b", False, None),
        ("/a*", "a/b", False, None),
        ("*", "a/b", False, True),
        ("?", "é", False, None),
        ("??", "é", False, True),
        ("[a-c]x", "bx", False, True),
        ("[!a-c]x", "bx", False, None),
        ("[^a-c]x", "dx", False, True),
        ("[]-]x", "]x", False, True),
        ("[[:digit:]_]x", "7x", False, True),
        ("[[:nope:]]x", "7x", False, None),
        ("[a", "[a", False, None),
        ("x\\", "x\\", False, None),
        ("a\\*", "a*", False, True),
        ("a\\*", "ab", False, None),
        ("x  ", "x", False, True),
        ("x\\ ", "x ", False, True),
        ("x\r\n", "x", False, True),
        ("\ufeffx", "x", False, True),
        ("*.log\n!keep.log", "keep.log", False, False),
        ("!keep.log\n*.log", "keep.log", False, True),
        ("*/\n!foo/", "foo", True, False),
        ("*/\n!foo/", "foo/sub", True, True),
        ("a\nb", "a\nb", False, None),
    ],
)
def test_each_rule(text: str, path: str, is_folder: bool, verdict: bool | None) -> None:
    assert IgnoreFile(text.encode()).verdict(os.fsencode(path), is_folder=is_folder) is verdict


@given(st.binary(max_size=60), st.binary(min_size=1, max_size=20))
def test_no_text_is_an_error(text: bytes, path: bytes) -> None:
    IgnoreFile(text).verdict(path, is_folder=False)


# ------------------------------------------------------------ against git

NAMES = ("a", "b", "ab", "a.log", "b.txt", "é", "#a", " b", "[a]", "c-d", "A", "a b")
PARTS = (
    *NAMES,
    "*",
    "?",
    "*.log",
    "a*",
    "*b",
    "**",
    "[ab]",
    "[!a]",
    "[a-c]*",
    "\\*",
    "\\a",
    "[[:alpha:]]",
    "[",
    "a?",
)


def pattern(random: random.Random) -> str:
    parts = [random.choice(PARTS) for _ in range(random.choice((1, 1, 1, 2, 2, 3)))]
    text = random.choice(("", "", "", "/")) + "/".join(parts) + random.choice(("", "", "/"))
    return random.choice(("", "", "!")) + text + random.choice(("", "", "", " ", "\r"))


def tree(random: random.Random, folder: Path, depth: int) -> None:
    folder.mkdir()
    if depth == 3 or random.random() < 0.3:
        (folder / bundle.IGNORE_FILE).write_text(
            "\n".join(pattern(random) for _ in range(random.randint(1, 4)))
        )
    for name in random.sample(NAMES, random.randint(1, 5)):
        if depth and random.random() < 0.5:
            tree(random, folder / name, depth - 1)
        elif random.random() < 0.1:
            (folder / name).symlink_to("a")
        else:
            (folder / name).touch()


def kept_by_git(root: Path) -> list[str]:
    """The files that git would add. It reads .flowignore in place of .gitignore."""
    git = ["git", f"--git-dir={root.parent}/repository", f"--work-tree={root}"]
    subprocess.run([*git, "init", "-q"], check=True, capture_output=True)
    listed = subprocess.run(
        [*git, "ls-files", "-z", "--others", f"--exclude-per-directory={bundle.IGNORE_FILE}"],
        cwd=root,
        check=True,
        capture_output=True,
    )
    return sorted(os.fsdecode(name) for name in listed.stdout.split(b"\0") if name)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
@pytest.mark.parametrize("seed", range(80))
def test_the_same_files_are_kept_as_by_git(seed: int, tmp_path: Path) -> None:
    root = tmp_path / "root"
    tree(random.Random(seed), root, 3)
    rules = {str(path.relative_to(root)): path.read_text() for path in root.rglob(bundle.IGNORE_FILE)}
    assert sorted(bundle.pack(root, tmp_path / "out").files) == kept_by_git(root), rules
