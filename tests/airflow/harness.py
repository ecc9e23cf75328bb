"""A real Airflow for the tests: scheduler, DAG processor, API server and triggerer, driven by REST."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from example_dags.hosts.airflow_server import AIRFLOW
from tests.airflow.deployment import HERE, Deployment

T = TypeVar("T")

ENDED = ("success", "failed", "skipped", "upstream_failed")


def until(what: str, ask: Callable[[], T | None], timeout_s: float = 90.0) -> T:
    """Return the first answer that is neither None nor False; fail with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = ask()
        if answer is not None and answer is not False:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.1)


@dataclass
class Airflow:
    """One running Airflow. `flow_home` is where its tasks' Flow tasks live."""

    deployment: Deployment
    token: str = ""
    keeper: subprocess.Popen[str] | None = None
    _opener: urllib.request.OpenerDirector = field(
        default_factory=lambda: urllib.request.build_opener(urllib.request.ProxyHandler({}))
    )

    @property
    def home(self) -> Path:
        return self.deployment.home

    @property
    def environment(self) -> dict[str, str]:
        return self.deployment.environment

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.deployment.port}"

    @property
    def flow_home(self) -> Path:
        return Path(self.environment["FLOW_LOCAL_HOME"])

    # -- processes

    def start(self) -> None:
        (self.home / "components.json").write_text(json.dumps(self.deployment.commands))
        self.keeper = subprocess.Popen(
            [sys.executable, HERE / "keeper.py", self.home],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        first = [name for name in self.deployment.commands if name in ("database", "broker")]
        for name in first:
            self.control("start", name)
        if self.deployment.server is not None:
            until("the database takes connections", self.deployment.server.ready, 60)
        with (self.home / "migrate.out").open("wb") as out:
            subprocess.run(
                [AIRFLOW, "db", "migrate"],
                env=self.environment,
                check=True,
                stdout=out,
                stderr=out,
                timeout=180,
            )
        for name in self.deployment.commands:
            if name not in first:
                self.control("start", name)
        until("Airflow is healthy", self.healthy, 240)
        until("the DAGs are parsed", self._parsed, 120)

    def stop(self) -> None:
        if self.keeper is not None and self.keeper.stdin is not None:
            self.keeper.stdin.close()
            with self.keeper:
                self.keeper.wait(60)
        if self.deployment.server is not None:
            self.deployment.server.remove()

    def control(
        self, verb: Literal["start", "stop", "shut", "kill", "freeze", "thaw"], component: str
    ) -> None:
        """Do to one of Airflow's processes what keeper.py calls `verb`."""
        assert self.keeper is not None
        assert self.keeper.stdin is not None
        assert self.keeper.stdout is not None
        self.keeper.stdin.write(f"{verb} {component}\n")
        self.keeper.stdin.flush()
        assert self.keeper.stdout.readline() == "done\n"

    def healthy(self) -> bool:
        """Whether all of it runs and says so."""
        assert self.keeper is not None
        assert self.keeper.poll() is None, "the keeper has ended"
        try:
            if not self.token:
                self.token = self.request("GET", "/auth/token")["access_token"]
            health = self.api("GET", "/monitor/health")
        except (OSError, KeyError):
            return False
        return all(
            health[name]["status"] == "healthy" for name in ("scheduler", "triggerer", "dag_processor")
        )

    def _parsed(self) -> bool:
        errors = self.api("GET", "/importErrors")["import_errors"]
        assert not errors, errors[0]["stack_trace"]
        wanted = sum(
            "with DAG(" in line
            for file in self.deployment.dags.glob("*.py")
            for line in file.read_text().splitlines()
        )
        return bool(self.api("GET", "/dags")["total_entries"] >= wanted)

    # -- REST

    def api(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        return self.request(method, f"/api/v2{path}", body)

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Ask the API server; again when SQLite's lock was not to be had."""
        for patience in (1, 2, 4, 8, None):
            try:
                return self._request(method, path, body)
            except urllib.error.HTTPError as error:
                if error.code != 500 or patience is None:
                    raise
                time.sleep(patience)
        raise AssertionError("not reached")

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", method=method)
        request.add_header("Content-Type", "application/json")
        request.add_header("Accept", "application/json")
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(request, data, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def idle(self) -> bool:
        """Whether no DAG run is under way."""
        under_way = self.api("GET", "/dags/~/dagRuns?state=running&state=queued&limit=1")
        return bool(under_way["total_entries"] == 0)

    def task_instances(self, run_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return what Airflow says about a task of each of these runs, by the run's id."""
        body = {"dag_run_ids": list(run_ids), "page_limit": 100}
        found = self.api("POST", "/dags/~/dagRuns/~/taskInstances/list", body)["task_instances"]
        return {one["dag_run_id"]: one for one in found}

    def trigger(self, dag_id: str, **conf: Any) -> Run:
        """Start a DAG run with `conf`."""
        body: dict[str, Any] = {"logical_date": None, "conf": conf}
        body["dag_run_id"] = f"{dag_id}-{secrets.token_hex(4)}"
        try:
            self.api("POST", f"/dags/{dag_id}/dagRuns", body)
        except urllib.error.HTTPError as error:
            if error.code != 409:  # the second time it is there
                raise
        return Run(self, dag_id, body["dag_run_id"])


@dataclass(frozen=True)
class Run:
    """A DAG run."""

    airflow: Airflow
    dag_id: str
    run_id: str

    @property
    def path(self) -> str:
        return f"/dags/{self.dag_id}/dagRuns/{self.run_id}"

    def state(self) -> str:
        return str(self.airflow.api("GET", self.path)["state"])

    def ended(self, timeout_s: float = 180.0) -> str:
        """Wait for the end of the run and return its state."""

        def ask() -> str | None:
            state = self.state()
            return state if state in ("success", "failed") else None

        return until(f"{self.run_id} has ended", ask, timeout_s)

    def mark(self, state: str) -> None:
        self.airflow.api("PATCH", self.path, {"state": state})

    def task(self, task_id: str, map_index: int = -1) -> TaskRun:
        return TaskRun(self, task_id, map_index)

    def tasks(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.airflow.api("GET", f"{self.path}/taskInstances?limit=100")[
            "task_instances"
        ]
        return found

    def clear(self, *task_ids: str) -> None:
        body = {"dry_run": False, "dag_run_id": self.run_id, "task_ids": list(task_ids), "only_failed": False}
        self.airflow.api("POST", f"/dags/{self.dag_id}/clearTaskInstances", body)

    def __str__(self) -> str:
        return f"{self.run_id}: " + ", ".join(
            f"{one['task_id']}[{one['map_index']}]={one['state']}" for one in self.tasks()
        )


@dataclass(frozen=True)
class TaskRun:
    """A task of a DAG run."""

    run: Run
    task_id: str
    map_index: int

    @property
    def path(self) -> str:
        return f"{self.run.path}/taskInstances/{self.task_id}"

    @property
    def info(self) -> dict[str, Any]:
        index = "" if self.map_index < 0 else f"/{self.map_index}"
        found: dict[str, Any] = self.run.airflow.api("GET", self.path + index)
        return found

    def state(self) -> str | None:
        state: str | None = self.info["state"]
        return state

    def reaches(self, *states: str, timeout_s: float = 90.0) -> str:
        """Wait until the task is in one of `states`."""

        def ask() -> str | None:
            state = self.state()
            if state in ("failed", "upstream_failed") and state not in states:
                raise AssertionError(f"{self.task_id}: {state}\n{self.log()}")
            return state if state in states else None

        return until(f"{self.task_id} of {self.run.run_id} is {' or '.join(states)}", ask, timeout_s)

    def ended(self, timeout_s: float = 120.0) -> str:
        return until(f"{self.task_id} of {self.run.run_id} has ended", self._ended, timeout_s)

    def _ended(self) -> str | None:
        state = self.state()
        return state if state in ENDED else None

    def xcom(self, key: str = "return_value") -> Any:
        """Return the XCom's value, None when there is none."""
        try:
            answer = self.run.airflow.api("GET", f"{self.path}/xcomEntries/{key}?map_index={self.map_index}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return answer["value"]

    def mark(self, state: str) -> None:
        self.run.airflow.api("PATCH", self.path, {"new_state": state})

    def lines(self, attempt: int | None = None) -> list[str]:
        """Return the events of the task's log, worker and triggerer together, as the UI shows them."""
        number = self.info["try_number"] if attempt is None else attempt
        answer = self.run.airflow.api(
            "GET", f"{self.path}/logs/{number}?map_index={self.map_index}&full_content=true"
        )
        events = []
        for one in answer["content"]:
            details = one.get("error_detail") or []
            events.append(
                one["event"] + "".join(f"\n{detail['exc_type']}: {detail['exc_value']}" for detail in details)
            )
        return events

    def log(self, attempt: int | None = None) -> str:
        try:
            return "\n".join(self.lines(attempt))
        except urllib.error.HTTPError as error:
            return f"no log: {error}"


@contextmanager
def running_airflow(deployment: Deployment) -> Iterator[Airflow]:
    """A started Airflow; gone, with everything that it started, at the end."""
    airflow = Airflow(deployment)
    try:
        airflow.start()
        yield airflow
    finally:
        airflow.stop()
