"""A short soak with every test run; the long one is `make soak`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = os.environ.get("FLOW_SOAK_SECONDS", "20")


@pytest.mark.timeout(600)
def test_no_kill_of_a_worker_a_session_or_a_client_loses_doubles_or_leaves_anything(home: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.soak", "--seconds", SECONDS, "--home", str(home)]
    soak = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert soak.stdout, soak.stderr
    told = json.loads(soak.stdout)
    assert (told["violations"], told["run twice"], told["left"]) == ([], [], []), soak.stdout
    assert told["outcomes"]["right"] > 100, told
