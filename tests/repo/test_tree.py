"""What may not get into git."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FORBIDDEN = {
    "the path of somebody's checkout": r"(?<![\w.~})>*-])/(?:work|root)/",
    "credentials in a URL": r"\b[a-z+]+://[^\s/@:'\"`<>{}]+:[^\s/@'\"`<>{}]+@",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


def tracked() -> list[Path]:
    """The files that git knows, without those deleted in the working tree."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT).decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    this = Path(__file__)
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in tracked()
        if file != this
        for match in re.finditer(FORBIDDEN[what], file.read_text(errors="replace"))
    ]
    assert found == []


def test_no_lock_file_and_no_virtual_environment_is_in_git() -> None:
    names = {file.name for file in tracked()}
    assert names & {"uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "pyvenv.cfg"} == set()


def test_no_folder_of_ours_can_be_taken_for_a_host() -> None:
    """pytest and build back ends would import `integrations/airflow` in place of Airflow."""
    assert not (ROOT / "integrations" / "__init__.py").exists()
    for host in ("airflow", "prefect", "dagster"):
        assert not (ROOT / host).exists()
        assert not (ROOT / "integrations" / host).exists()
