"""The guides that users know from other projects: their examples as scripts, which print what they say they print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GUIDES = Path(__file__).parent / "guides"
REPOSITORY = Path(__file__).parents[2]


def promised(script: Path) -> list[str]:
    """What the comments behind its prints say."""
    lines = re.findall(r"^ *(?:print\(.*)?\)  # ?(.*)$", script.read_text(), re.MULTILINE)
    return [part for line in lines for part in line.split(" / ")]


@pytest.mark.parametrize("name", ["remote_functions.py", "flow_api.py"])
def test_the_examples_of_a_guide_print_what_they_promise(home: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "project"
    shutil.copytree(GUIDES, folder)
    done = subprocess.run(
        [sys.executable, name],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == promised(folder / name)
    assert done.stderr == ""
