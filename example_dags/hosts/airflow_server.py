"""A whole Airflow in one folder: scheduler, DAG processor, triggerer and API server, driven by REST.

Standard library only; started by the Python of an environment that has Airflow. Nothing of it is left when the
`with` block ends, however it ends: every process is in a session of its own and is killed as a group.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

AIRFLOW = Path(sys.executable).with_name("airflow")
COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer")


class AirflowServer:
    """A running Airflow; made by `running_airflow`."""

    def __init__(self, home: Path, dags: Path) -> None:
        self.home, self.dags = home, dags
        self.port, *others = free_ports(3)
        self.environment = environment(home, dags, self.port, *others)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._token = ""

    # -- processes

    def start(self, say: Callable[[str], None]) -> None:
        """Start all of it; after return it is healthy and has parsed the DAGs. Raises RuntimeError, naming the log."""
        say("making its database")
        with (self.home / "migrate.log").open("wb") as log:
            command = [str(AIRFLOW), "db", "migrate"]
            if subprocess.run(command, env=self.environment, stdout=log, stderr=log, check=False).returncode:
                raise RuntimeError(f"`airflow db migrate` failed: see {self.home / 'migrate.log'}")
        say(f"starting {', '.join(COMPONENTS)}")
        for name in COMPONENTS:
            with (self.home / f"{name}.log").open("wb") as log:
                self.processes[name] = subprocess.Popen(
                    [AIRFLOW, name], env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
        self.until("Airflow is healthy", self._healthy)
        self.until("the DAGs are parsed", self._parsed)

    def stop(self) -> None:
        """Take every process away: asked politely, then not."""
        for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            for process in self.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline and any(one.poll() is None for one in self.processes.values()):
                time.sleep(0.05)
        self._kill_strays()

    def _kill_strays(self) -> None:
        """What left its group, as the executor's workers do, still carries this Airflow's environment."""
        mark = f"AIRFLOW_HOME={self.home}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        os.kill(int(entry.name), signal.SIGKILL)

    def until(self, what: str, true: Callable[[], bool], timeout_s: float = 240.0) -> None:
        """Wait for something. Raises RuntimeError when a process ends meanwhile or the time is over."""
        deadline = time.monotonic() + timeout_s
        while not true():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"Airflow's {name} has ended: see {self.home / name}.log")
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {timeout_s:g} s: {what}; the logs are in {self.home}")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        try:
            if not self._token:
                self._token = self._request("GET", "/auth/token")["access_token"]
            health = self.api("GET", "/monitor/health")
        except (OSError, KeyError):
            return False
        return all(
            health[name]["status"] == "healthy" for name in ("scheduler", "triggerer", "dag_processor")
        )

    def _parsed(self) -> bool:
        errors = self.api("GET", "/importErrors")["import_errors"]
        if errors:
            raise RuntimeError(f"Airflow cannot read {errors[0]['filename']}:\n{errors[0]['stack_trace']}")
        return bool(self.api("GET", "/dags")["total_entries"] >= len(list(self.dags.glob("*.py"))))

    # -- REST

    def api(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Ask Airflow's API (version 2)."""
        return self._request(method, f"/api/v2{path}", body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        request.add_header("Content-Type", "application/json")
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(request, data, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def run(self, dag_id: str, params: Mapping[str, Any], timeout_s: float = 600.0) -> str:
        """Run a DAG to its end and return the run's id. Raises RuntimeError, with the logs, unless it succeeds."""
        run_id: str = self.api("POST", f"/dags/{dag_id}/dagRuns", {"logical_date": None, "conf": params})[
            "dag_run_id"
        ]
        path = f"/dags/{dag_id}/dagRuns/{run_id}"
        self.until(
            f"{run_id} has ended", lambda: self.api("GET", path)["state"] in ("success", "failed"), timeout_s
        )
        if self.api("GET", path)["state"] == "failed":
            raise RuntimeError("\n\n".join([f"the DAG run {run_id} failed", *self._failures(path)]))
        return run_id

    def _failures(self, path: str) -> Iterator[str]:
        for task in self.api("GET", f"{path}/taskInstances?limit=100")["task_instances"]:
            if task["state"] == "failed":
                name, index = task["task_id"], task["map_index"]
                query = f"{path}/taskInstances/{name}/logs/{task['try_number']}?map_index={index}&full_content=true"
                lines = [str(line.get("event", line)) for line in self.api("GET", query)["content"]]
                yield "\n".join([f"{name}[{index}]:", *lines[-40:]])

    def xcom(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> Any:
        """Return what a task of a run returned."""
        task = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        return self.api("GET", f"{task}/xcomEntries/return_value?map_index={map_index}")["value"]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def environment(home: Path, dags: Path, api: int, workers: int, triggerer: int) -> dict[str, str]:
    """Return the variables with which all of Airflow's processes are started."""
    url = f"http://127.0.0.1:{api}"
    ours = {
        "AIRFLOW_HOME": str(home),
        "PATH": f"{AIRFLOW.parent}{os.pathsep}{os.environ['PATH']}",
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(api),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__SECRET_KEY": secrets.token_hex(16),
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_hex(32),
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(workers),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(triggerer),
        "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    return {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")} | ours


@contextlib.contextmanager
def running_airflow(
    home: Path, dags: Path, say: Callable[[str], None] = lambda _text: None
) -> Iterator[AirflowServer]:
    """A started Airflow with the DAGs of a folder; gone, with everything that it started, at the end."""
    server = AirflowServer(home, dags)
    try:
        server.start(say)
        yield server
    finally:
        server.stop()
