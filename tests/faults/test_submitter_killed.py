"""kill -9 of the submitting process at every step of submit and collect."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults import crash_loop

RUNS = int(os.environ.get("FLOW_CRASH_RUNS", "240"))


@pytest.mark.timeout(600)
def test_no_crash_of_the_submitter_loses_doubles_or_leaves_a_task(home: Path) -> None:
    home.mkdir(parents=True)
    crash_loop.check(home.resolve(), RUNS)
