"""Kill a submitting process at one step after another; then look whether anything was lost, doubled or left.

``python crash_loop.py FOLDER RUNS [TASKS]`` prints one JSON line. Every run forks a client that submits a function call
with a key of its own and collects the value; it is killed with SIGKILL at its n-th contact with the system (every
audited open, rename, link, lock, process start, and every word with a host's agent) or, in every third run, after a
time. Then another process does the same with the same key. The provider is that of the settings; FOLDER is one that its
tasks can write to, and TASKS begins the path of every task's folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flow_core import Flow
from flow_core.ids import digest
from flow_core.providers import transport

MODULE = """
def once(path, value):
    with open(path, "a") as file:
        file.write("start\\n")
    return value
"""
STEPS = ("open", "os.", "fcntl.", "subprocess.", "shutil.", "tempfile.", "pathlib.", "agent.")


def audited(name: str) -> None:
    """Make each call of a method of an agent's client two steps: before and after."""
    method: Callable[..., Any] = getattr(transport.AgentClient, name)

    def call(*args: Any, **more: Any) -> Any:
        sys.audit(f"agent.{name}.begin")
        answer = method(*args, **more)
        sys.audit(f"agent.{name}.end")
        return answer

    setattr(transport.AgentClient, name, call)


def client(module: Path, starts: Path, key: str, kill_at: int) -> int:
    """Submit and collect; return how many steps there were, if nobody killed us."""
    flow = Flow()
    steps = 0

    def hook(name: str, _args: object) -> None:
        nonlocal steps
        if name.startswith(STEPS):
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    assert flow.invoke_async(module, "once", [str(starts), key], idempotency_key=key).get_result(60) == key
    flow.release([str(flow.engine.find(key))])
    return steps


def forked(
    module: Path, starts: Path, key: str, kill_at: int, kill_after_s: float | None = None
) -> tuple[int, float] | None:
    """Run the client in a process of its own; return its steps and seconds, None when it was killed."""
    theirs, ours = os.pipe()
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(ours, str(client(module, starts, key, kill_at)).encode())
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    os.close(ours)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    said = os.read(theirs, 100)
    os.close(theirs)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the client failed in another way than by our hand"
    return (int(said), time.monotonic() - begun) if said else None


class Loop:
    """The runs, and what went wrong in them."""

    def __init__(self, folder: Path, runs: int) -> None:
        self.folder, self.runs = folder, runs
        self.module = folder / "module.py"
        self.module.write_text(MODULE)
        self.killed = 0
        self.doubled: list[list[object]] = []
        self.lost: list[list[object]] = []
        for dry in ("dry 1", "dry 2"):  # the first one also installs the runner
            told = forked(self.module, folder / dry, f"{folder} {dry}", 0)
            assert told is not None
            self.steps, self.seconds = told
        self.flow = Flow()

    def run(self, number: int) -> None:
        """Kill one client, and do its work with its key."""
        key, starts = f"{self.folder} run {number}", self.folder / f"starts-{number}"
        share = (number % self.runs + 0.5) / self.runs
        timed = number % 3 == 2
        kill_at = 0 if timed else 1 + int(share * self.steps)
        after_s = share * self.seconds if timed else None
        where = f"after {after_s:.3f} s" if after_s is not None else f"step {kill_at}"
        survived = forked(self.module, starts, key, kill_at, after_s)
        if survived is None:
            self.killed += 1
        else:  # how often it looks while it waits, and how long that takes, differs from run to run
            self.steps, self.seconds = min(self.steps, survived[0]), min(self.seconds, survived[1])
        before = self.flow.find(key)
        if (
            before is None or before.snapshot.reason != "released"
        ):  # killed before it could say that it had the value
            value: object
            try:
                call = self.flow.invoke_async(self.module, "once", [str(starts), key], idempotency_key=key)
                value = call.get_result(60)
            except Exception as error:
                value = error
            if value != key:
                self.lost.append([where, str(value)])
        count = starts.read_text().count("start") if starts.exists() else 0
        if count != 1:
            self.doubled.append([where, count])
        found = str(self.flow.engine.find(key))
        if not found.endswith(f"{digest(key)}-1"):
            self.doubled.append([where, found])


def main(folder: Path, runs: int, tasks: Path) -> None:
    for name in ("call", "_send"):
        audited(name)
    loop = Loop(folder, runs)
    for number in range(runs):
        loop.run(number)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (left := processes(tasks)):
        time.sleep(0.05)
    seen = {
        "steps": loop.steps,
        "killed": loop.killed,
        "doubled": loop.doubled,
        "lost": loop.lost,
        "left": left,
    }
    print(json.dumps({"runs": runs, **seen}))


def processes(tasks: Path) -> list[str]:
    """The command lines of all that runs for a task under a path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"FLOW_TASK_DIR=" + os.fsencode(tasks) in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return [one for one in found if one]


def check(folder: Path, runs: int, tasks: Path | None = None) -> None:
    """Run the loop in a process of its own; raise AssertionError unless every run came out right."""
    command = [sys.executable, __file__, str(folder), str(runs), str(tasks or folder)]
    loop = subprocess.run(command, capture_output=True, text=True, check=False)
    assert loop.returncode == 0, loop.stderr
    told = json.loads(loop.stdout)
    assert told["steps"] >= 40, told
    assert told["killed"] >= runs * 0.5, told
    assert (told["doubled"], told["lost"], told["left"]) == ([], [], []), told


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[-1] if sys.argv[3:] else sys.argv[1]))
