"""Warm sessions in an allocation: workers on a compute node, reached through a step of their job."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flow_core import Flow
from flow_core.definitions import CallOptions, Retries, SessionSpec
from flow_core.dispatch import Pool
from flow_core.errors import WorkerDiedError
from flow_core.several import get
from flow_core.staying import Stayed
from tests.infra.slurm import Cluster
from tests.sessions.conftest import eventually, sent
from tests.sessions.test_dispatch import add, count_to, nap


def job() -> str:
    return os.environ["SLURM_JOB_ID"]


def length(data: bytes) -> int:
    return len(data)


def blob(size: int) -> bytes:
    return b"y" * size


def die() -> None:
    os._exit(7)


@pytest.fixture(params=["here", "through a login node"])
def flow_there(request: pytest.FixtureRequest) -> Flow:
    if request.param == "here":
        here: Flow = request.getfixturevalue("flow")
        return here
    theirs = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=True).stdout
    if "{}.{}".format(*sys.version_info) not in theirs:
        pytest.skip(f"the nodes' users have {theirs.strip()}, which is not ours")
    login, client = request.getfixturevalue("slurm_login"), request.getfixturevalue("ssh_client")
    home = str(login.lab.home / "ada" / "flow sessions")
    settings = {"host": "ada@login", "home": home, "memory": "500M"}
    return Flow("slurm", slurm=settings, ssh={"config": str(client.config)})


def test_calls_run_on_warm_workers_of_a_job(flow_there: Flow) -> None:
    flow = flow_there
    pool = Pool.open(flow, SessionSpec(workers=2, task={"memory_mb": 500}))
    try:
        adding = sent(add)
        assert get([pool.submit(adding, (number, 1)) for number in range(300)], timeout=120) == list(
            range(1, 301)
        )
        assert {pool.submit(sent(job)).result(60) for _ in range(5)} == {pool.submit(sent(job)).result(60)}
        assert pool.submit(sent(length), (b"x" * 3_000_000,)).result(60) == 3_000_000
        large = pool.submit(sent(blob), (3_000_000,), options=CallOptions(stays=True))
        assert pool.submit(sent(length), (large,)).result(60) == 3_000_000
        assert isinstance(large.parcel, Stayed) and large.result(60) == b"y" * 3_000_000
        assert pool.submit(sent(count_to), (40,)).result(60) == list(range(40))
        with pytest.raises(WorkerDiedError, match="exit code 7"):
            pool.submit(sent(die)).result(60)
        assert pool.submit(adding, (1, 2)).result(60) == 3
        running = pool.submit(sent(nap), (600,))
        eventually(lambda: running.status == "running")
    finally:
        pool.close()
    eventually(lambda: flow.poll([pool.task_id])[pool.task_id].status.final, within_s=60)
    assert pool.task.snapshot.status.succeeded


def test_a_requeued_session_goes_on_and_makes_the_calls_again_that_ask_for_it(
    flow: Flow, slurm_cluster: Cluster, tmp_path: Path
) -> None:
    def hold(noted: str, go: str) -> int:
        with open(noted, "a") as file:
            file.write("began\n")
        while not os.path.exists(go):
            time.sleep(0.05)
        return int(os.environ.get("SLURM_RESTART_COUNT", "0"))

    noted, go = flow_folder(flow) / f"{tmp_path.name} noted", flow_folder(flow) / f"{tmp_path.name} go"
    pool = Pool.open(flow, SessionSpec(workers=2, task={"memory_mb": 500}))
    try:
        options = CallOptions(retries=Retries(lost=1, delay_s=0.1))
        asked = pool.submit(sent(hold), (str(noted), str(go)), options=options)
        once = pool.submit(sent(nap), (600,))
        eventually(lambda: noted.exists() and once.status == "running", within_s=60)
        (job_id,) = slurm_cluster.job_ids()
        slurm_cluster.requeue(job_id)
        with pytest.raises(WorkerDiedError, match="its machine was taken away"):
            once.result(120)
        go.touch()
        assert asked.result(200) == 1
        assert noted.read_text() == "began\nbegan\n" and pool.task_id.endswith("-1")
        assert pool.submit(sent(add), (1, 2)).result(60) == 3
    finally:
        pool.close()


def flow_folder(flow: Flow) -> Path:
    """A folder that the nodes share with us."""
    return Path(flow.provider.site.home)  # type: ignore[attr-defined]
