"""What all suites share: a home of their own for every test, and nothing left running after it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tests.infra.fixtures"]

# A shell without job control starts what it runs in the background with SIGINT ignored, and that is inherited down to
# the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A local provider's home with two simulated GPUs; at the end of the test none of its processes may be left."""
    path = tmp_path / "a'; echo home"  # every path here meets a shell sooner or later
    for name in [
        name
        for name in os.environ
        if name.startswith(("FLOW_LOCAL", "FLOW_OBJECTS", "FLOW_PACKAGE", "FLOW_PROVIDER", "MITHRIL_"))
    ]:
        monkeypatch.delenv(name)
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    monkeypatch.setenv("FLOW_CONFIG", str(config))
    monkeypatch.setenv("FLOW_LOCAL_HOME", str(path))
    monkeypatch.setenv("FLOW_OBJECTS_HOME", str(tmp_path / "an object's; home"))
    monkeypatch.setenv("FLOW_LOCAL_GPUS", "2")
    yield path
    left = processes_under(path)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL)


def processes_under(home: Path) -> list[int]:
    """The living processes that belong to any task under a home."""
    needle = b"FLOW_TASK_DIR=" + os.fsencode(os.path.realpath(home)) + b"/"
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (
                    needle in (entry / "environ").read_bytes()
                    and (entry / "stat").read_text().rsplit(") ", 1)[1][0] != "Z"
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
