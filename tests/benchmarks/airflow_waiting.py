"""One way to wait, measured: what stands for the remote work, and what the triggerer does while nothing happens."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from example_dags.hosts.airflow_server import AIRFLOW, AirflowServer, free_ports
from tests.benchmarks.airflow_parts.notes import read, task_id
from tests.benchmarks.airflow_parts.provider import BackEnd

#: Once all wait, the triggerer has this long to settle.
SETTLE_S = 6.0


class Remote(ABC):
    """Remote work that costs next to nothing and ends when it is told."""

    system: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def renew(self) -> None:
        """Have all of the work run again."""

    @abstractmethod
    def end(self, index: int) -> None:
        """End the work of a map index."""

    @abstractmethod
    def requests(self) -> float | None:
        """Return how many requests there have been, None where nobody counts them."""


class FlowTasks(Remote):
    """Tasks of a back end behind a socket, which counts."""

    system, title = "flow", "FlowGPUOperator"

    def __init__(self, count: int) -> None:
        self.back_end = BackEnd(count)

    def renew(self) -> None:
        self.back_end.ended.clear()

    def end(self, index: int) -> None:
        self.back_end.ended[task_id(index)] = "completed"

    def requests(self) -> float:
        return float(self.back_end.requests.total())


class Files(Remote):
    """Files that appear on this machine."""

    system, title = "file", "FileSensor, deferrable"

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "files"
        self.folder.mkdir()

    def renew(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()

    def end(self, index: int) -> None:
        (self.folder / str(index)).touch()

    def requests(self) -> None:
        return None


class SSHJobs(Remote):
    """The folders of remote jobs, as SSHRemoteJobOperator makes them, behind a real sshd of our own.

    sshd has its own defaults; the shell finds no start-up files, which only would make each command slower.
    """

    system, title = "ssh", "SSHRemoteJobOperator"

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.notes = folder / "jobs", folder / "ssh-requests"
        self.variables: dict[str, str] = {}
        self._sshd: subprocess.Popen[bytes] | None = None
        self.missing = self._what_is_missing()
        for index in range(count):
            (self.folder / str(index)).mkdir(parents=True)
            (self.folder / str(index) / "stdout.log").write_text("the job has begun\n")
        if not self.missing:
            self._start(folder / "sshd")

    def _what_is_missing(self) -> str:
        if importlib.util.find_spec("airflow.providers.ssh") is None:
            return "apache-airflow-providers-ssh is not installed here"
        if not Path("/usr/sbin/sshd").exists():
            return "there is no /usr/sbin/sshd on this machine"
        return ""

    def _start(self, folder: Path) -> None:
        (folder / "home").mkdir(parents=True, mode=0o700)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "user.pub", folder / "authorized")
        (port,) = free_ports(1)
        settings = {
            "Port": port,
            "ListenAddress": "127.0.0.1",
            "HostKey": folder / "host",
            "AuthorizedKeysFile": folder / "authorized",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PermitRootLogin": "prohibit-password",
            "SetEnv": f"HOME={folder / 'home'}",
        }
        (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = (folder / "log").open("wb")
        self._sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", folder / "config"], stderr=log)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        login = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        extra = {"key_file": str(folder / "user"), "no_host_key_check": True}
        connection = {"conn_type": "ssh", "host": "127.0.0.1", "port": port, "login": login, "extra": extra}
        self.variables = {"AIRFLOW_CONN_BENCH_SSH": json.dumps(connection)}

    def close(self) -> None:
        if self._sshd is not None:
            self._sshd.terminate()
            self._sshd.wait(10)

    def renew(self) -> None:
        for file in self.folder.glob("*/exit_code"):
            file.unlink()

    def end(self, index: int) -> None:
        draft = self.folder / str(index) / ".exit_code"
        draft.write_text("0")
        draft.rename(draft.with_name("exit_code"))

    def requests(self) -> float:
        return float(len(read(self.notes)))


# --- the triggerer ---------------------------------------------------------------------------------------------------


def fresh_triggerer(server: AirflowServer) -> None:
    """Replace the triggerer by a new one, on whose loop the probe runs: what was freed hides what is taken."""
    old = server.processes["triggerer"]
    if old.poll() is None:
        old.terminate()
        try:
            old.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(old.pid, signal.SIGKILL)
            old.wait()
    with (server.home / "triggerer.log").open("ab") as log:
        server.processes["triggerer"] = subprocess.Popen(
            [AIRFLOW, "triggerer"], env=server.environment, stdout=log, stderr=log, start_new_session=True
        )
    began = time.time()
    lags = server.home.parent / "lags"
    server.until("the probe runs", lambda: sum(at > began for at, _ in read(lags)) > 2, 120)


def triggerer(server: AirflowServer) -> list[int]:
    """Return the process ids of the triggerer and all that it has started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [server.processes["triggerer"].pid]
    for pid in found:
        found += children.get(pid, [])
    return found


def memory(pids: list[int]) -> int:
    """Return their proportional set size in bytes."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def processor(pids: list[int]) -> float:
    """Return the processor time that they have used, in seconds."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(
    server: AirflowServer, remote: Remote, count: int, *, window_s: float, ends: int, interval_s: float
) -> dict[str, Any]:
    """Let `count` tasks wait, look on for a while, end a few; return what was seen."""
    folder, dag_id = server.home.parent, f"waiting_{remote.system}_{count}"
    notes = {what: folder / f"{remote.system}-{what}" for what in ("waiting", "fired", "resumed")}
    for path in notes.values():
        path.unlink(missing_ok=True)
    remote.renew()
    fresh_triggerer(server)
    empty = memory(triggerer(server))
    began = time.time()
    run = server.api("POST", f"/dags/{dag_id}/dagRuns", {"logical_date": None})
    server.until(f"{count} tasks wait", lambda: len(read(notes["waiting"])) >= count, 240)
    seen: dict[str, Any] = {"all_wait_s": time.time() - began}
    time.sleep(max(SETTLE_S, interval_s))
    try:
        seen |= quiet(server, remote, count, window_s, interval_s)
        seen["bytes"] = memory(triggerer(server)) - empty
        seen |= few_end(server, remote, count, ends, notes)
    finally:
        url = f"/dags/{dag_id}/dagRuns/{run['dag_run_id']}"
        server.api("PATCH", url, {"state": "failed"})
        server.until(f"nothing of {dag_id} waits", lambda: not deferred(server, url), 120)
        time.sleep(3)
    return seen


def deferred(server: AirflowServer, path: str) -> int:
    return int(server.api("GET", f"{path}/taskInstances?state=deferred&limit=1")["total_entries"])


def quiet(
    server: AirflowServer, remote: Remote, count: int, window_s: float, interval_s: float
) -> dict[str, Any]:
    """Look on while all wait and nothing happens."""
    pids = triggerer(server)
    asked, used, began = remote.requests(), processor(pids), time.time()
    time.sleep(window_s)
    now, after = remote.requests(), time.time()
    minutes = (after - began) / 60
    lags = sorted(
        float(one)
        for at, line in read(server.home.parent / "lags")
        if began <= at <= after
        for one in line.split()
    )
    if not lags:
        raise RuntimeError(f"the event loop was blocked for the whole {window_s:g} s")
    return {
        "requests_per_minute": count * 60 / interval_s
        if now is None or asked is None
        else (now - asked) / minutes,
        "counted": now is not None,
        "cores": (processor(pids) - used) / (after - began),
        "lag_ms": {
            "p50": statistics.median(lags),
            "p99": lags[int(len(lags) * 0.99)],
            "max": lags[-1],
            "samples": len(lags),
        },
    }


def few_end(
    server: AirflowServer, remote: Remote, count: int, ends: int, notes: dict[str, Path]
) -> dict[str, Any]:
    """End a few tasks one after the other; return how long until the trigger fired, and until the task went on."""
    ended: dict[str, float] = {}
    for number in range(min(ends, count)):
        index = number * count // min(ends, count)
        ended[str(index)] = time.time()
        remote.end(index)
        time.sleep(1.37)  # not in step with the interval
    deadline = time.monotonic() + 90
    while len(read(notes["resumed"])) < len(ended) and time.monotonic() < deadline:
        time.sleep(0.2)
    seen: dict[str, Any] = {"ended": len(ended)}
    for what in ("fired", "resumed"):
        seen[f"until_{what}_s"] = [at - ended[index] for at, index in read(notes[what]) if index in ended]
    return seen
