"""What the soak has found, each reduced to the one moment that matters."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core.errors import CallCancelledError, SessionClosedError, WorkerDiedError
from flow_core.streamed import Stream
from tests.sessions.conftest import Opener, eventually, sent


class Asking:
    """Runs a generator; each time a value is taken, the next one arrives in another thread."""

    task_id = "none"

    def __init__(self) -> None:
        self.stuck = False

    def credit(self, stream: Stream) -> None:
        arriving = threading.Thread(target=stream.arrive, args=("the second",), daemon=True)
        arriving.start()
        arriving.join(5)
        self.stuck = arriving.is_alive()

    def decode(self, stream: Stream, parcel: Any) -> Any:
        return parcel

    def cancel(self, stream: Stream) -> bool:
        return True


def test_a_generators_value_can_arrive_while_another_is_being_taken() -> None:
    asking = Asking()
    stream = Stream(asking)
    stream.arrive("the first")  # type: ignore[arg-type]  # as `decode` above reads it
    assert next(iter(stream)) == "the first"
    assert not asking.stuck


def parent() -> int:
    return os.getppid()


def nap() -> None:
    time.sleep(60)


def say(text: str) -> None:
    print(text)


def note(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text + "\n")


def total(array: Any) -> int:
    return int(array.sum())


def test_a_large_argument_that_comes_after_the_end_leaves_no_descriptor(opened: Opener) -> None:
    pool = opened(workers=1)
    array, adding = np.ones(500_000), sent(total)
    assert pool.submit(adding, (array,)).result() == 500_000
    pool.close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SessionClosedError):
        pool.submit(adding, (array,))
    del pool
    opened.pools.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_calls_whose_session_is_killed_are_told_of_their_workers_death(opened: Opener) -> None:
    pool = opened(workers=1)
    supervisor = pool.submit(sent(parent)).result()
    running = pool.submit(sent(nap))
    eventually(lambda: running.status == "running")
    os.kill(supervisor, signal.SIGKILL)
    error = running.exception(20)
    assert isinstance(error, WorkerDiedError)
    assert (error.signal, error.task_id) == (signal.SIGKILL, pool.task_id)


def test_what_a_call_printed_can_be_read_when_its_session_is_gone(opened: Opener) -> None:
    pool = opened(workers=1)
    supervisor = pool.submit(sent(parent)).result()
    told = [pool.submit(sent(say), (text,)) for text in ("first", "second")]
    for one in told:
        one.result()
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: pool.over)
    assert [one.logs() for one in told] == ["first\n", "second\n"]


def test_a_worker_that_dies_before_its_client_knows_of_it_is_replaced(opened: Opener) -> None:
    pool = opened(workers=1)
    assert pool.submit(sent(total), (np.ones(3),)).result() == 3
    keeper, connect = pool.keeper, pool.keeper.door.open
    killed: list[int] = []

    def connect_and_kill(role: str, **more: Any) -> Any:
        connection, welcome = connect(role, **more)
        if not killed:
            killed.append(welcome["pid"])
            os.kill(welcome["pid"], signal.SIGKILL)
            eventually(lambda: not Path(f"/proc/{welcome['pid']}").exists())
            # When it has answered this, it has told of the death before.
            keeper.ask({"do": "log", "worker": 0, "range": [0, 0]})
        return connection, welcome

    keeper.door.open = connect_and_kill  # type: ignore[method-assign]
    os.kill(pool.lines[0].pid, signal.SIGKILL)
    eventually(lambda: killed)
    assert pool.submit(sent(total), (np.ones(4),)).result(20) == 4


def test_a_call_that_was_cancelled_does_not_run_after_the_death_of_the_worker_it_waited_at(
    opened: Opener, tmp_path: Path
) -> None:
    pool, noting, path = opened(workers=1), sent(note), str(tmp_path / "notes")
    pool.submit(noting, (path, "before")).result()
    worker = pool.lines[0].pid
    noting.estimate = 10.0  # microseconds: short enough for one to be sent behind another
    os.kill(worker, signal.SIGSTOP)  # what is sent now is not begun
    wanted, unwanted = (pool.submit(noting, (path, text)) for text in ("wanted", "unwanted"))
    assert unwanted.status == "running"
    assert unwanted.cancel()
    os.kill(worker, signal.SIGKILL)
    wanted.result(20)
    assert isinstance(unwanted.exception(20), CallCancelledError)
    pool.submit(noting, (path, "after")).result(20)
    assert Path(path).read_text().split() == ["before", "wanted", "after"]
