"""A whole `dagster dev`, driven as the UI drives it: metadata on the asset page, and what Terminate does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow, TaskStatus
from tests.conftest import processes_under
from tests.dagster import jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAUNCH = """mutation($p: ExecutionParams!) { launchRun(executionParams: $p) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
STATUS = "query($r: ID!) { runOrError(runId: $r) { ... on Run { status } } }"
TERMINATE = "mutation($r: String!) { terminateRun(runId: $r) { __typename } }"
RE_EXECUTE = """mutation($r: String!) { launchRunReexecution(
    reexecutionParams: { parentRunId: $r, strategy: FROM_FAILURE }) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
METADATA = """query($r: ID!) { runOrError(runId: $r) { ... on Run { assetMaterializations { metadataEntries {
    label ... on TextMetadataEntry { text } ... on IntMetadataEntry { intValue }
    ... on FloatMetadataEntry { floatValue } } } } } }"""


class Server:
    """A `dagster dev` over HTTP."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def up(self) -> bool:
        try:
            return bool(self.opener.open(f"{self.url}/server_info", timeout=5).status == 200)
        except OSError:
            return False

    def ask(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        return json.load(self.opener.open(request, timeout=60))["data"]

    def launch(self, job: str, **selector: Any) -> str:
        repositories = self.ask(
            "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } } }"
        )
        [one] = repositories["repositoriesOrError"]["nodes"]
        where = {"repositoryName": one["name"], "repositoryLocationName": one["location"]["name"]}
        answer = self.ask(LAUNCH, p={"selector": {**where, "jobName": job, **selector}, "runConfigData": {}})
        return str(answer["launchRun"]["run"]["runId"])

    def status(self, run_id: str) -> str:
        return str(self.ask(STATUS, r=run_id)["runOrError"]["status"])

    def wait(self, run_id: str, wanted: Sequence[str]) -> str:
        deadline = time.monotonic() + 120
        while (status := self.status(run_id)) not in wanted:
            assert time.monotonic() < deadline, status
            time.sleep(0.1)
        return status


ENDS = ("SUCCESS", "FAILURE", "CANCELED")


@pytest.fixture
def server(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    home = tmp_path / "dagster"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("dagster")), "dev", "-h", "127.0.0.1", "-p", str(port)]
    with (home / "dev.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "-f", jobs.__file__], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        server, deadline = Server(port), time.monotonic() + 150
        while not server.up():
            assert process.poll() is None, (home / "dev.log").read_text()
            assert time.monotonic() < deadline, (home / "dev.log").read_text()
            time.sleep(0.1)
        yield server
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def appear(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 90
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.05)


def test_metadata_terminate_and_re_execute_as_the_ui_does_them(
    server: Server, folder: Path, home: Path
) -> None:
    materialized = server.launch("__ASSET_JOB", assetSelection=[{"path": ["accuracy"]}])
    assert server.wait(materialized, ENDS) == "SUCCESS"
    [event] = server.ask(METADATA, r=materialized)["runOrError"]["assetMaterializations"]
    shown: dict[str, Any] = {
        entry.pop("label"): next(iter(entry.values()), None) for entry in event["metadataEntries"]
    }
    assert (shown["flow/gpu"], shown["flow/gpu_count"], shown["flow/exit_code"]) == ("a100", 1, 0)
    assert shown["flow/duration_seconds"] > 0

    for job, sign in (
        ("counted_job", "call-*"),
        ("in_process_job", "call-*"),
        ("left_alone_job", "submitted"),
    ):
        for mark in folder.iterdir():
            mark.unlink()
        run = server.launch(job)
        appear(folder, sign)
        assert processes_under(home), job
        server.ask(TERMINATE, r=run)
        assert server.wait(run, ENDS) == "CANCELED", job
        assert not processes_under(home), job

    failed = server.launch("named_job")
    assert server.wait(failed, ENDS) == "FAILURE"
    again = server.ask(RE_EXECUTE, r=failed)["launchRunReexecution"]["run"]["runId"]
    assert server.wait(again, ENDS) == "FAILURE"
    tries = (folder / "keys").read_text().splitlines()
    assert len(tries) == 4
    assert len(set(tries)) == 1, "a re-execution from failure asks for the same tasks"

    ends = [task.status for task in Flow().list_tasks()]
    assert ends == [TaskStatus.CANCELLED] * 3 + [TaskStatus.COMPLETED]
