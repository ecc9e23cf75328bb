"""Kill a submitting process at one step after another; then look whether anything was lost, doubled or left.

``python crash_loop.py HOME RUNS`` prints one JSON line. Every run forks a client that submits a function call with a
key of its own and collects the value; at its n-th contact with the system (every audited open, rename, link, lock,
process start, …) it is killed with SIGKILL. Then another process does the same with the same key.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from flow_core import Flow
from flow_core.ids import digest
from flow_core.providers import local as _local  # noqa: F401 - imported before the counting starts

MODULE = """
def once(path, value):
    with open(path, "a") as file:
        file.write("start\\n")
    return value
"""
STEPS = ("open", "os.", "fcntl.", "subprocess.", "shutil.", "tempfile.", "pathlib.")


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


def forked(module: Path, starts: Path, key: str, kill_at: int) -> int | None:
    """Run the client in a process of its own; None when it was killed."""
    theirs, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(ours, str(client(module, starts, key, kill_at)).encode())
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    os.close(ours)
    said = os.read(theirs, 100)
    os.close(theirs)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the client failed in another way than by our hand"
    return int(said) if said else None


def main(home: Path, runs: int) -> None:
    module = home / "module.py"
    module.write_text(MODULE)
    flow = Flow()
    flow.invoke(module, "once", [str(home / "first"), "first"])  # what is done once is done
    steps = forked(module, home / "dry", "dry", 0) or 0
    killed = 0
    doubled: list[list[object]] = []
    lost: list[list[object]] = []
    left: list[str] = []
    for run in range(runs):
        kill_at = 1 + run % steps
        key, starts = f"run {run}", home / f"starts-{run}"
        killed += forked(module, starts, key, kill_at) is None
        before = flow.find(key)
        if (
            before is None or before.snapshot.reason != "released"
        ):  # killed before it could say that it had the value
            value: object
            try:
                value = flow.invoke_async(module, "once", [str(starts), key], idempotency_key=key).get_result(
                    60
                )
            except Exception as error:
                value = error
            if value != key:
                lost.append([kill_at, str(value)])
        count = starts.read_text().count("start") if starts.exists() else 0
        if count != 1:
            doubled.append([kill_at, count])
        if flow.engine.find(key) is None or not flow.engine.find(key).endswith(f"{digest(key)}-1"):  # type: ignore[union-attr]
            doubled.append([kill_at, str(flow.engine.find(key))])
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (left := _processes(home)):
        time.sleep(0.05)
    print(
        json.dumps(
            {"runs": runs, "steps": steps, "killed": killed, "doubled": doubled, "lost": lost, "left": left}
        )
    )


def _processes(home: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"FLOW_TASK_DIR=" + os.fsencode(home) in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return [one for one in found if one]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
