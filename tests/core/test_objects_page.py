"""The examples of docs/objects.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "objects.md"


def test_the_examples_run(home: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    invokes, functions, session, puts = blocks
    (tmp_path / "train.py").write_text(functions)
    for program in (invokes, session, puts):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        expected = re.findall(r"^ *print\(.*\)  # (.*)$", program, re.MULTILINE)
        assert (done.stdout.splitlines(), done.returncode) == (expected, 0), done.stderr
