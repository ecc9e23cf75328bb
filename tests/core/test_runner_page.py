"""The examples of docs/services.md run as they stand, each as a program in a folder of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import processes_under
from tests.core.test_services import until

PAGE = Path(__file__).parents[2] / "docs" / "services.md"
EXAMPLES = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
)


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("title", EXAMPLES)
@pytest.mark.parametrize("storage", [None, "file"])
def test_the_example_prints_what_it_says(title: str, storage: str | None, home: Path, tmp_path: Path) -> None:
    folder, shared = tmp_path / "project", tmp_path / "packages"
    folder.mkdir()
    shared.mkdir()
    if storage is not None:
        settings = f"package: {{storage: 'file://{shared}', excludes: ['*.log', data/]}}"
        (tmp_path / "config.yaml").write_text(settings)
    (folder / "app.py").write_text(EXAMPLES[title])
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", EXAMPLES[title], re.M)
    assert (done.stdout.splitlines(), done.returncode) == (expected, 0), done.stderr
    assert expected and done.stderr == ""
    assert [path.name for path in folder.iterdir()] == ["app.py"]
    assert len(list(shared.iterdir())) == (storage is not None)
    until(lambda: processes_under(home) == [])
