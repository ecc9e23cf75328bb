"""Warm sessions on SSH hosts: workers there, reached over the one connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from flow_core import Flow
from flow_core.definitions import CallOptions, Retries, SessionSpec
from flow_core.dispatch import Pool
from flow_core.errors import WorkerDiedError
from flow_core.ids import random_key
from flow_core.several import get
from flow_core.staying import Stayed
from tests.infra.ssh import Machines
from tests.sessions.conftest import eventually, sent
from tests.sessions.test_dispatch import add, count_to, nap


def machine() -> str:
    return socket.gethostname()


def die() -> None:
    os._exit(7)


def second_time_lucky(path: str) -> str:
    """Return at once, if it has been called before with this path; else go on for ever."""
    try:
        open(path, "x").close()
    except FileExistsError:
        return "value"
    time.sleep(600)
    return "not called again"


def length(data: bytes) -> int:
    return len(data)


def blob(size: int) -> bytes:
    return b"y" * size


@pytest.fixture
def hosts(three: Flow) -> Flow:
    theirs = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=True).stdout
    if "{}.{}".format(*sys.version_info) not in theirs:
        pytest.skip(f"the hosts' users have {theirs.strip()}, which is not ours")
    return three


def test_calls_run_on_warm_workers_of_a_host(hosts: Flow) -> None:
    pool = Pool.open(hosts, SessionSpec(workers=3))
    try:
        adding = sent(add)
        assert get([pool.submit(adding, (number, 1)) for number in range(500)], timeout=120) == list(
            range(1, 501)
        )
        where = {pool.submit(sent(machine)).result(60) for _ in range(5)}
        assert len(where) == 1 and where <= {"h1", "h2", "h3"}
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
    eventually(lambda: hosts.poll([pool.task_id])[pool.task_id].status.final, within_s=60)
    assert pool.task.snapshot.status.succeeded


def test_a_host_that_crashes_ends_its_sessions_calls(hosts: Flow, ssh_machines: Machines) -> None:
    pool = Pool.open(hosts, SessionSpec(workers=1))
    try:
        host = pool.submit(sent(machine)).result(60)
        running = pool.submit(sent(nap), (600,))
        eventually(lambda: running.status == "running")
        ssh_machines[host].crash()
        try:
            assert isinstance(running.exception(120), WorkerDiedError)
        finally:
            ssh_machines[host].boot()
    finally:
        pool.close()


def test_a_call_that_asks_for_it_is_made_again_when_its_host_has_come_back(
    hosts: Flow, ssh_machines: Machines
) -> None:
    pool = Pool.open(hosts, SessionSpec(workers=1))
    try:
        host = pool.submit(sent(machine)).result(60)
        again = CallOptions(retries=Retries(lost=3, delay_s=0.1))
        marker = f"home/ada/{random_key()}"
        asked = pool.submit(sent(second_time_lucky), (f"/{marker}",), options=again)
        once = pool.submit(sent(nap), (600,))
        eventually((ssh_machines[host].folder / marker).exists)
        ssh_machines[host].crash()
        for other in ssh_machines.values():  # the next attempt may be anywhere
            (other.folder / marker).touch()
        ssh_machines[host].boot()
        assert asked.result(150) == "value"
        assert isinstance(once.exception(10), WorkerDiedError)
        assert pool.task_id.endswith("-2")
    finally:
        pool.close()
