"""Runs Airflow's processes for the tests and takes all of them away when its standard input closes.

    python keeper.py HOME

That happens also when pytest is killed, since the pipe then closes by itself. `HOME/components.json` holds the command
of each component by its name. Reads lines `start NAME`, `stop NAME`, `shut NAME` and `kill NAME`; answers each with a
line `done`. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

#: Others need them until they have ended.
LAST = ("database", "broker")


class Keeper:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.commands: dict[str, list[str]] = json.loads((home / "components.json").read_text())
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        with (self.home / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                self.commands[name],
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def signal(self, name: str, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running[name].pid, number)

    def kill(self, name: str) -> None:
        """Take it away with what it has started, as a machine does that loses its power."""
        self.signal(name, signal.SIGKILL)
        self.running.pop(name).wait()

    def stop(self, name: str) -> None:
        """Ask the process to end."""
        self.running[name].terminate()
        self._wait(name, 20)
        self.kill(name)

    def shut(self, name: str) -> None:
        """Ask the process and what it has started to end, as systemd does with a service, or a machine that halts."""
        self.signal(name, signal.SIGTERM)
        self._wait(name, 20)
        self.kill(name)

    def _wait(self, name: str, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.running[name].wait(seconds)

    def stop_all(self) -> None:
        first = [name for name in self.running if name not in LAST]
        for name in first:
            self.signal(name, signal.SIGTERM)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(self.running[name].poll() is None for name in first):
            time.sleep(0.1)
        for name in first:
            self.kill(name)
        for name in list(self.running):
            self.stop(name)
        for _ in range(3):  # what a dying process started meanwhile
            self.sweep()
            time.sleep(0.2)

    def sweep(self) -> None:
        """Kill what left its process group, Flow's tasks too: all of it carries the environment of this test run."""
        airflow = os.fsencode(f"AIRFLOW_HOME={os.environ['AIRFLOW_HOME']}")
        work = os.fsencode(f"FLOW_TASK_DIR={Path(os.environ['FLOW_LOCAL_HOME']).resolve()}/")
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                carried = (entry / "environ").read_bytes().split(b"\0")
                if airflow in carried or any(one.startswith(work) for one in carried):
                    os.kill(int(entry.name), signal.SIGKILL)


def main() -> None:
    keeper = Keeper(Path(sys.argv[1]))
    verbs = {"start": keeper.start, "stop": keeper.stop, "shut": keeper.shut, "kill": keeper.kill}
    try:
        for line in sys.stdin:
            verb, name = line.split()
            verbs[verb](name)
            print("done", flush=True)
    finally:
        keeper.stop_all()


if __name__ == "__main__":
    main()
