"""The examples of docs/functions.md run as they stand, each as a program in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "functions.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE, re.M | re.S))


def test_every_section_has_its_example() -> None:
    assert len(EXAMPLES) == len(re.findall("^## ", PAGE, re.M)) == PAGE.count("```python")


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_prints_what_it_says(home: Path, tmp_path: Path, title: str) -> None:
    program = tmp_path / "example.py"
    program.write_text(EXAMPLES[title])
    done = subprocess.run(
        [sys.executable, program.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == re.findall(r"^ *print\(.*\)  # (.*)$", EXAMPLES[title], re.M)
