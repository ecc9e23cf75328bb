"""Runs Airflow's processes for the tests and takes all of them away when its standard input closes.

    python keeper.py HOME airflow-program name…

That happens also when pytest is killed, since the pipe then closes by itself. Reads lines `kill NAME`, `stop NAME` and
`start NAME`; answers each with a line `done`. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Keeper:
    def __init__(self, home: Path, program: str) -> None:
        self.home = home
        self.program = program
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        with (self.home / f"{name}.out").open("ab") as out:
            self.running[name] = subprocess.Popen(
                [self.program, name], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def signal(self, name: str, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running[name].pid, number)

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        self.running.pop(name).wait()

    def stop(self, name: str) -> None:
        """Ask the process to end, as a deployment does."""
        self.running[name].terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.running[name].wait(20)
        self.kill(name)

    def stop_all(self) -> None:
        for name in self.running:
            self.signal(name, signal.SIGTERM)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(one.poll() is None for one in self.running.values()):
            time.sleep(0.1)
        for name in list(self.running):
            self.kill(name)
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
    home, program, *names = sys.argv[1:]
    keeper = Keeper(Path(home), program)
    try:
        for name in names:
            keeper.start(name)
        for line in sys.stdin:
            verb, name = line.split()
            {"kill": keeper.kill, "stop": keeper.stop, "start": keeper.start}[verb](name)
            print("done", flush=True)
    finally:
        keeper.stop_all()


if __name__ == "__main__":
    main()
