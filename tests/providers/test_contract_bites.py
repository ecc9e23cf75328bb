"""The contract is strict: a provider with one planted defect does not pass it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.providers.defects import DEFECTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_fails_the_contract(name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.providers.defects",
    ]
    chosen = ["tests/providers/test_local_contract.py", "-k", DEFECTS[name].caught_by]
    env = {**os.environ, "FLOW_DEFECT": name, "FLOW_CONTRACT_PATIENCE_S": "6"}
    run = subprocess.run([*command, *chosen], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1, (
        f"{name} ({DEFECTS[name].sentence}) was not caught:\n{run.stdout}\n{run.stderr}"
    )
    assert "FAILED" in run.stdout
    assert DEFECTS[name].caught_by in run.stdout
