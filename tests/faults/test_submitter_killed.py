"""kill -9 of the submitting process at every step of submit and collect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = int(os.environ.get("FLOW_CRASH_RUNS", "240"))


@pytest.mark.timeout(600)
def test_no_crash_of_the_submitter_loses_doubles_or_leaves_a_task(home: Path) -> None:
    home.mkdir(parents=True)
    script = Path(__file__).with_name("crash_loop.py")
    loop = subprocess.run(
        [sys.executable, str(script), str(home.resolve()), str(RUNS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert loop.returncode == 0, loop.stderr
    told = json.loads(loop.stdout)
    assert told["steps"] >= 40, told
    assert told["killed"] >= min(RUNS, 200) * 0.9, (
        told
    )  # how often it looks while it waits differs from run to run
    assert (told["doubled"], told["lost"], told["left"]) == ([], [], []), told
