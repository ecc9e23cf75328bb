"""Runs Airflow's processes for the tests and takes all of them away when its standard input closes.

    python keeper.py HOME

That happens also when pytest is killed, since the pipe then closes by itself. `HOME/components.json` holds the command
of each component by its name. Reads lines `start NAME`, and likewise `stop`, `shut`, `kill`, `freeze` and `thaw`;
answers each with a line `done`. `HOME/NAME.session` holds the number of the session in which all of a component is.
Standard library only.
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
        (self.home / f"{name}.session").write_text(str(self.running[name].pid))

    def signal(self, name: str, number: signal.Signals) -> None:
        """Signal the component and all that it has started, in whatever process groups: the session of its own."""
        for pid in _session(self.running[name].pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

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

    def freeze(self, name: str) -> None:
        """Stop the process itself, as a machine does that has too much to do; what it has started goes on."""
        self.running[name].send_signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGCONT)

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


def _session(number: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == number:
                    found.append(int(entry.name))
    return found


def main() -> None:
    keeper = Keeper(Path(sys.argv[1]))
    verbs = {name: getattr(keeper, name) for name in ("start", "stop", "shut", "kill", "freeze", "thaw")}
    try:
        for line in sys.stdin:
            verb, name = line.split()
            verbs[verb](name)
            print("done", flush=True)
    finally:
        keeper.stop_all()


if __name__ == "__main__":
    main()
