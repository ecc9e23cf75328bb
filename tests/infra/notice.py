"""How long it took until a fault was noticed: collected for the documentation, asserted nowhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

#: A file to which each measurement is appended as a JSON line; unset: nothing is kept.
VARIABLE = "FLOW_FAULT_TIMES"


def record(provider: str, fault: str, what: str, seconds: float, outcome: str) -> None:
    """Keep one measurement, if anybody wants it."""
    target = os.environ.get(VARIABLE)
    if target:
        row = {
            "provider": provider,
            "fault": fault,
            "what": what,
            "seconds": round(seconds, 2),
            "outcome": outcome,
        }
        with Path(target).open("a") as file:
            file.write(json.dumps(row) + "\n")
