"""How sessions begin, are left, joined, forgotten, and end: nothing stays behind, and nothing is awaited in vain."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow
from flow_core.definitions import PLAIN, CallOptions, SessionSpec
from flow_core.dispatch import Pool
from flow_core.errors import (
    CallCancelledError,
    CallTimeoutError,
    ResultError,
    SessionClosedError,
    TaskNotFoundError,
    ValidationError,
    WorkerDiedError,
)
from flow_core.futures import Future
from tests.sessions.conftest import Opener, eventually, processes_of, sent
from tests.sessions.test_dispatch import add, nap, pid

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def in_another_process(home: Path, text: str) -> Iterator[subprocess.Popen[str]]:
    """Run a piece of a program that begins with a Flow and what the tests call."""
    beginning = f"""
        import sys, time
        from flow_core import Flow
        from flow_core.definitions import SessionSpec
        from flow_core.dispatch import Pool
        from flow_core.futures import Future
        from tests.sessions.conftest import sent
        from tests.sessions.test_dispatch import add, nap, pid
        flow = Flow(local={{"home": {str(home)!r}}})
        """
    program = textwrap.dedent(beginning) + textwrap.dedent(text)
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said_by_another_process(home: Path, text: str) -> str:
    """Run such a program to its end; return what it has printed."""
    with in_another_process(home, text) as process:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    return said


def test_close_leaves_no_process_and_says_so_to_who_waits(opened: Opener, home: Path) -> None:
    pool = opened()
    running = [pool.submit(sent(nap), (60,)) for _ in range(4)]
    eventually(lambda: running[0].status == "running")
    pool.close()
    eventually(lambda: not processes_of(home))  # the runner writes down how it ended, and ends
    for future in running:
        with pytest.raises(CallCancelledError, match="is closed"):
            future.result(20)
    pool.close()
    with pytest.raises(SessionClosedError, match="it was closed here"):
        pool.submit(sent(add), (1,))
    assert pool.task.status.succeeded


def test_closing_before_the_session_has_started_is_fine(opened: Opener, home: Path) -> None:
    pool = opened()
    future = pool.submit(sent(add), (1,))
    pool.close()
    assert future.done()
    eventually(lambda: not processes_of(home))


def test_a_killed_client_leaves_nothing_running(home: Path, flow: Flow) -> None:
    with in_another_process(
        home,
        """
        pool = Pool.open(flow, SessionSpec(lease_s=1.0))
        pool.submit(sent(nap), (600,))
        print(pool.submit(sent(pid)).result(20), flush=True)
        time.sleep(600)
        """,
    ) as client:
        assert client.stdout is not None
        assert int(client.stdout.readline())
        assert processes_of(home)
    eventually(lambda: not processes_of(home), within_s=60)
    (task,) = flow.list_tasks()
    assert task.status.succeeded


def test_a_client_that_is_stopped_for_too_long_finds_its_session_gone(home: Path) -> None:
    with in_another_process(
        home,
        """
        pool = Pool.open(flow, SessionSpec(lease_s=0.6))
        pool.submit(sent(add), (1,)).result(20)
        print("ready", flush=True)
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            try:
                pool.submit(sent(add), (1,)).result(20)
            except Exception as error:
                print(type(error).__name__, error, flush=True)
                break
            time.sleep(0.05)
        """,
    ) as client:
        assert client.stdout is not None and client.stdout.readline() == "ready\n"
        os.kill(client.pid, signal.SIGSTOP)
        try:
            eventually(lambda: not processes_of(home), within_s=60)
        finally:
            os.kill(client.pid, signal.SIGCONT)
        assert "its owner was silent for too long" in client.stdout.read()
        assert client.wait(20) == 0


def test_a_session_that_idles_ends_and_a_busy_one_does_not(opened: Opener, home: Path) -> None:
    pool = opened(idle_limit_s=0.7)
    assert pool.submit(sent(nap), (2.0, "busy")).result(20) == "busy"
    eventually(lambda: pool.over is not None)
    with pytest.raises(SessionClosedError, match="it was idle for too long"):
        pool.submit(sent(add), (1,))
    eventually(lambda: not processes_of(home))


def test_another_process_joins_by_the_sessions_id(opened: Opener, home: Path) -> None:
    pool = opened(workers=1)
    worker = pool.submit(sent(pid)).result(20)
    other = said_by_another_process(
        home,
        f"""
        pool = Pool.attach(flow, {pool.task_id!r}, SessionSpec(workers=1))
        print(pool.submit(sent(pid)).result(20), flush=True)
        pool.leave()
        """,
    )
    assert int(other) == worker
    assert pool.submit(sent(pid)).result(20) == worker


def test_a_session_outlives_its_opener_for_its_lease(home: Path, flow: Flow) -> None:
    first = said_by_another_process(
        home,
        """
        pool = Pool.open(flow, SessionSpec(workers=1, lease_s=20))
        print(pool.task_id, pool.submit(sent(pid)).result(20), flush=True)
        import os
        os._exit(0)
        """,
    )
    task_id, worker = first.split()
    pool = Pool.attach(flow, task_id, SessionSpec(workers=1))
    try:
        assert pool.submit(sent(pid)).result(20) == int(worker)
    finally:
        pool.close()
    eventually(lambda: not processes_of(home))


def test_a_forked_child_is_told_and_harms_nobody(opened: Opener) -> None:
    pool = opened()
    assert pool.submit(sent(add), (1,)).result(20) == 1
    child = os.fork()
    if child == 0:
        try:
            pool.submit(sent(add), (1,))
        except SessionClosedError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.submit(sent(add), (2,)).result(20) == 2


def test_a_session_that_cannot_start_says_why(home: Path, tmp_path: Path) -> None:
    broken = Flow(local={"home": home, "python": str(tmp_path / "no-python")})
    pool = Pool.open(broken, SessionSpec())
    with pytest.raises(Exception, match="no-python"):
        pool.submit(sent(add), (1,)).result(20)
    with pytest.raises(SessionClosedError, match="no-python"):
        pool.submit(sent(add), (1,))
    pool.close()


def test_a_session_that_waits_for_too_long_to_start_is_given_up(home: Path, tmp_path: Path) -> None:
    one_gpu = Flow(local={"home": home, "gpus": 1})
    blocking = one_gpu.run(["sleep", "600"], instance_type="a100", upload_code=False)
    pool = Pool.open(one_gpu, SessionSpec(workers=1, instance_type="a100", startup_timeout_s=0.5))
    with pytest.raises(CallTimeoutError, match="did not start within 0.5 s: it is pending"):
        pool.submit(sent(add), (1,)).result(20)
    eventually(
        lambda: pool.task.snapshot.status.final or one_gpu.poll([pool.task_id])[pool.task_id].status.final
    )
    blocking.cancel()
    pool.close()


def test_workers_share_out_the_gpus(home: Path) -> None:
    four = Flow(local={"home": home, "gpus": 4})

    def gpus(seconds: float) -> str:
        time.sleep(seconds)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    pool = Pool.open(four, SessionSpec(workers=2, instance_type="2xa100"))
    try:
        seen = [pool.submit(sent(gpus), (0.3,)) for _ in range(2)]
        assert {one.result(20) for one in seen} == {"0,1", "2,3"}
    finally:
        pool.close()


# ------------------------------------------------------------------ outcomes that other processes ask for


def collected(home: Path, call_id: str, **settings: Any) -> Future:
    return Future.from_id(call_id, local={"home": home}, **settings)


@pytest.mark.parametrize("codec", ["json", "pickle"])
def test_an_id_read_at_any_moment_gives_the_outcome(opened: Opener, home: Path, codec: str) -> None:
    pool = opened(workers=1)
    first = pool.submit(sent(nap, codec), (0.5, {"value": 1}))
    queued = pool.submit(sent(nap, codec), (0.0, {"value": 2}))
    ended = pool.submit(sent(nap, codec), (0.0, {"value": 3}))
    ids = [first.id, queued.id]
    assert first.id == ids[0] and all(len(one) < 200 for one in ids)
    ended.result(20)
    ids.append(ended.id)
    late = pool.submit(sent(nap, codec), (0.0, {"value": 4}))
    assert late.result(20) == {"value": 4}
    ids.append(late.id)
    values = [collected(home, one, serialization=codec).result(20) for one in ids]
    assert values == [{"value": number} for number in (1, 2, 3, 4)]
    pool.close()
    assert [collected(home, one, serialization=codec).result(20) for one in ids] == values


def test_an_error_is_collected_as_it_was(opened: Opener, home: Path) -> None:
    def fail() -> None:
        raise LookupError("nowhere")

    pool = opened(workers=1, grace_s=0.2)
    early, late = pool.submit(sent(fail)), pool.submit(sent(fail))
    early_id = early.id
    assert isinstance(late.exception(20), LookupError)
    for call_id in (early_id, late.id):
        with pytest.raises(LookupError, match="nowhere"):
            collected(home, call_id).result(20)
    dying = pool.submit(sent(lambda: os._exit(3)))
    dying_id = dying.id
    assert isinstance(dying.exception(20), WorkerDiedError)
    with pytest.raises(WorkerDiedError, match="exit code 3") as lost:
        collected(home, dying_id).result(20)
    assert lost.value.exit_code == 3 and lost.value.suggestions


def test_what_ended_a_call_from_outside_is_collected_as_that(opened: Opener, home: Path) -> None:
    def kept(*args: Any, options: CallOptions = PLAIN) -> tuple[Future, str]:
        made = pool.submit(sent(nap), args, options=options)
        return made, made.id

    pool = opened(workers=1, grace_s=0.2)
    slow, cancelled, queued = kept(60, options=CallOptions(timeout_s=0.3)), kept(60), kept(60)
    assert isinstance(slow[0].exception(20), CallTimeoutError)
    queued[0].cancel()
    eventually(lambda: cancelled[0].status == "running")
    cancelled[0].cancel()
    cancelled[0].exception(20)
    with pytest.raises(CallTimeoutError, match="'nap' was stopped at its limit of 0.3 s"):
        collected(home, slow[1]).result(20)
    for name, match in ((cancelled[1], "while it ran"), (queued[1], "before it started")):
        with pytest.raises(CallCancelledError, match=match) as error:
            collected(home, name).result(20)
        assert error.value.task_id == pool.task_id and "Remote" not in str(error.value)


def test_a_value_that_could_not_travel_is_collected_as_that(opened: Opener, home: Path) -> None:
    pool = opened(workers=1)
    made = pool.submit(sent(lambda: {1}, "json"))
    call_id = made.id
    assert isinstance(made.exception(20), ResultError)
    assert type(collected(home, call_id).exception(20)) is ResultError


def test_a_call_whose_session_went_away_is_said_to_be_lost(opened: Opener, home: Path) -> None:
    pool = opened(workers=1)
    running = pool.submit(sent(nap), (60,))
    call_id = running.id
    eventually(lambda: running.status == "running")
    waiting = collected(home, call_id)
    assert not waiting.done() and waiting.status == "running"
    pool.flow.cancel([pool.task_id])
    with pytest.raises(WorkerDiedError, match="left no outcome|was cancelled"):
        waiting.result(20)


def test_ids_that_are_none_are_refused(home: Path) -> None:
    with pytest.raises(ValidationError, match="is not the id of a call"):
        collected(home, "nonsense")
    with pytest.raises(ValidationError, match="is not the id of a call"):
        collected(home, "a-0123456789abcdef-1:../../secret")
    with pytest.raises(TaskNotFoundError):
        collected(home, "a-0123456789abcdef-1:ab-1")


def test_a_future_travels_by_its_id(opened: Opener, home: Path) -> None:
    import pickle

    pool = opened(workers=1)
    future = pool.submit(sent(add, "json"), (1, 2))
    future.result(20)
    os.environ["FLOW_LOCAL_HOME"] = str(home)
    try:
        assert pickle.loads(pickle.dumps(future)).result(20) == 3
    finally:
        del os.environ["FLOW_LOCAL_HOME"]
