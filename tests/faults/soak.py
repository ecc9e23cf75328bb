"""Sessions under fire: many clients, calls of every kind, and random kills of workers, sessions and clients.

``python -m tests.faults.soak --seconds 600`` (or ``make soak``) prints what happened and fails if anything did that
must not: a call lost without an error, a wrong result, a call run twice unasked, a process or a descriptor left over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIENT = Path(__file__).with_name("soak_client.py")
GONE_WITHIN_S = 60.0  # a session whose client was killed
STUCK_S = 240.0  # a client that has not ended this long after its time


@dataclass
class Soak:
    """One run."""

    home: Path
    seed: int
    clients: int = 3
    random: random.Random = field(init=False)
    running: dict[int, tuple[subprocess.Popen[bytes], float]] = field(default_factory=dict)
    killed: Counter[str] = field(default_factory=Counter)
    violations: list[dict[str, Any]] = field(default_factory=list)
    started: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.ledgers = self.home / "ledgers"
        self.folder = self.home / "project"
        for path in (self.ledgers, self.folder):
            path.mkdir(parents=True)

    # -- clients

    def start_client(self, longest: float) -> None:
        """Start one more client, for some seconds."""
        self.started += 1
        seconds = min(longest, self.random.uniform(5, 40))
        errors = (self.ledgers / f"stderr-{self.started}").open("wb")
        command = [sys.executable, str(CLIENT), str(self.ledgers), str(self.seed * 1000 + self.started)]
        client = subprocess.Popen(
            [*command, str(seconds)], cwd=self.folder, stdout=errors, stderr=errors, start_new_session=True
        )
        errors.close()
        self.running[self.started] = (client, time.monotonic() + seconds + STUCK_S)

    def reap(self) -> None:
        """Look which clients have ended, and how."""
        for number, (client, deadline) in list(self.running.items()):
            if client.poll() is None and time.monotonic() > deadline:
                self.violation("stuck client", number)
                client.kill()
                client.wait()
            elif client.poll() not in {None, 0, -signal.SIGKILL}:
                self.violation(f"client ended with {client.returncode}", number)
            if client.poll() is not None:
                del self.running[number]

    def violation(self, what: str, number: int) -> None:
        """A client did what it must not."""
        said = (self.ledgers / f"stderr-{number}").read_text(errors="replace")
        self.violations.append({"what": what, "said": said[-6000:]})

    # -- kills

    def strike(self) -> None:
        """Kill somebody."""
        what = self.random.choices(["worker", "supervisor", "runner", "client", "freeze"], [60, 8, 4, 8, 20])[
            0
        ]
        if what == "client":
            if self.running:
                client, _ = self.random.choice(list(self.running.values()))
                client.kill()
                self.killed[what] += 1
            return
        chosen = [pid for pid, role in roles(self.home).items() if role == what.replace("freeze", "worker")]
        if not chosen:
            return
        pid = self.random.choice(chosen)
        self.killed[what] += 1
        with contextlib.suppress(ProcessLookupError):
            if what == "freeze":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.1)
                os.kill(pid, signal.SIGCONT)
            else:
                os.kill(pid, signal.SIGKILL)

    # -- the run

    def run(self, seconds: float) -> dict[str, Any]:
        """Do it; return what happened."""
        deadline = time.monotonic() + seconds
        try:
            while (left := deadline - time.monotonic()) > 0:
                self.reap()
                if len(self.running) < self.clients and left > 3:
                    self.start_client(left)
                time.sleep(self.random.uniform(0, 1.0))
                self.strike()
            while self.running:
                self.reap()
                time.sleep(0.1)
        finally:
            for client, _ in self.running.values():
                client.kill()
                client.wait()
        return self.account(self.nobody_left())

    def nobody_left(self) -> list[str]:
        """Wait for the sessions of killed clients to end; return the processes that are left."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := list(processes(self.home))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [f"{pid} {role(pid)} {shown(pid)}" for pid in left]

    def account(self, left: list[str]) -> dict[str, Any]:
        """Compare what ran with what the clients saw."""
        begun = Counter(lines(self.ledgers / "begun"))
        outcomes = [json.loads(line) for line in lines(self.ledgers / "outcomes")]
        self.violations += [json.loads(line) for line in lines(self.ledgers / "violations")]
        unseen = [one for one in outcomes if one["outcome"] == "right" and not begun[one["call"]]]
        self.violations += [{"what": "right without having run", **one} for one in unseen]
        twice = [call for call, ran in begun.items() if ran > (4 if call.startswith("again-") else 1)]
        return {
            "seed": self.seed,
            "clients": self.started,
            "sessions": len(set(lines(self.ledgers / "sessions"))),
            "killed": dict(self.killed),
            "calls begun": sum(begun.values()),
            "outcomes": dict(Counter(one["outcome"] for one in outcomes)),
            "run twice": twice,
            "left": left,
            "violations": self.violations,
        }


def lines(path: Path) -> list[str]:
    """The lines of a file that may not exist."""
    return path.read_text().splitlines() if path.exists() else []


# --- the processes of sessions --------------------------------------------------------------------------------


def processes(home: Path) -> Iterator[int]:
    """The living processes of all tasks under a home."""
    needle = b"FLOW_TASK_DIR=" + os.fsencode(home) + b"/"
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and needle in (entry / "environ").read_bytes() and state(entry) != "Z":
                yield int(entry.name)


def state(process: Path) -> str:
    """One letter: what a process is doing."""
    return (process / "stat").read_text().rsplit(") ", 1)[1][0]


def parent(pid: int) -> int:
    """The parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])


def supervisor_of(pid: int) -> int:
    """The pid of the supervisor in whose session a process is, 0 where there is none yet."""
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    folder = next(os.fsdecode(one[14:]) for one in environ if one.startswith(b"FLOW_TASK_DIR="))
    return int(json.loads(Path(folder, "session.json").read_text())["pid"])


def role(pid: int) -> str:
    """What a process of a session is: its supervisor, a worker, or what watches over the task."""
    try:
        supervisor = supervisor_of(pid)
        if pid == supervisor:
            return "supervisor"
        return "worker" if parent(pid) == supervisor else "runner"
    except (OSError, ValueError, KeyError, StopIteration):
        return "unknown"


def roles(home: Path) -> dict[int, str]:
    """All processes of sessions, and what they are."""
    return {pid: role(pid) for pid in processes(home)}


def shown(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return "(gone)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--home", type=Path, help="a folder that does not exist yet, and is kept")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.home or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flow-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        home, config = folder.resolve() / "home", folder.resolve() / "config.yaml"
        config.write_text("{}")
        os.environ |= {"FLOW_CONFIG": str(config), "FLOW_LOCAL_HOME": str(home), "FLOW_PROVIDER": "local"}
        told = Soak(home, options.seed, options.clients).run(options.seconds)
    print(json.dumps(told, indent=1))
    sys.exit(bool(told["violations"] or told["run twice"] or told["left"]))


if __name__ == "__main__":
    main()
