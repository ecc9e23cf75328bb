"""What a demo run tells the demo. Standard library only: it is imported by the Pythons of all hosts."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROGRESS = "==> "  # begins the lines of a script's output that are for the person who waits
DAGS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Outcome:
    """One host's run: the sweep's results, the report, and when the run began and ended (seconds since 1970)."""

    version: str
    results: list[dict[str, Any]]
    report: dict[str, Any]
    started: float
    ended: float

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Outcome:
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Order:
    """What the demo asks of a host's script: a folder to work in, where the picture and the outcome go."""

    home: Path
    picture: Path
    out: Path

    @classmethod
    def from_command_line(cls) -> Order:
        """Read the script's arguments; from now on SIGTERM unwinds the script, so that it stops what it has started."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        parser = argparse.ArgumentParser()
        for name in ("home", "picture", "out"):
            parser.add_argument(name, type=Path)
        return cls(**vars(parser.parse_args()))


def say(text: str) -> None:
    """Tell a person who waits what happens now."""
    print(f"{PROGRESS}{text}", flush=True)
