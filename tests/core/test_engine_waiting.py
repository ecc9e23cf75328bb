"""Many who wait, on a provider that misbehaves."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Collection, Mapping

import pytest

from flow_core.engine import Engine
from flow_core.errors import ProviderUnavailable, TimeoutError
from flow_core.models import LogChunk, Snapshot, TaskConfig, TaskSpec, TaskStatus
from flow_core.task import Task
from flow_core.testing import FakeClock, FakeProvider

SPEC = TaskSpec.from_config(TaskConfig(name="t", command="true", instance_type="a100"), files=())


class Down(FakeProvider):
    """Answers no poll until it is `up`."""

    up = False

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        if not self.up:
            self.trouble = [ProviderUnavailable("no route")]
        return super().poll(task_ids)


def test_a_provider_that_is_down_is_asked_once_per_interval_however_many_wait() -> None:
    down = Down()
    down.poll_interval_s = 0.2  # type: ignore[misc]
    engine = Engine(down)
    ids = [engine.submit(SPEC, key=str(n)) for n in range(40)]
    down.calls.clear()
    threads = [threading.Thread(target=engine.wait, args=([one],)) for one in ids]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    threading.Event().wait(1.0)
    took, asked = time.monotonic() - begin, len(down.calls)
    for one in ids:
        down.set(one, TaskStatus.COMPLETED)
    down.up = True
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert asked <= took / 0.2 + 2


def test_an_outage_is_told_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    clock, down = FakeClock(), Down()
    engine = Engine(down, clock=clock)
    one = engine.submit(SPEC, key="k")

    def later(now: float) -> None:
        down.up = now > 3600
        if now > 3700:
            down.set(one, TaskStatus.COMPLETED)

    clock.on_sleep = later
    with caplog.at_level(logging.INFO, "flow_core"):
        engine.wait([one])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert "does not answer" in said[0] and "answers again" in said[1]


def test_a_wait_that_got_no_answer_says_how_many_have_not_ended() -> None:
    down = Down()
    engine = Engine(down, clock=FakeClock())
    one, two = (engine.submit(SPEC, key=key) for key in "ab")
    with pytest.raises(TimeoutError, match="waited 3 s and 2 tasks have not ended"):
        engine.wait([one, two], timeout=3)
    with pytest.raises(TimeoutError, match=f"waited 3 s and nothing is known of task {one}"):
        engine.wait([one], timeout=3)


def test_two_threads_that_wait_for_one_task_do_not_take_it_from_each_other() -> None:
    fake = FakeProvider()
    fake.poll_interval_s = 0.02  # type: ignore[misc]
    engine = Engine(fake)
    one = engine.submit(SPEC, key="k")
    ended: list[Snapshot] = []
    patient = threading.Thread(target=lambda: ended.append(engine.wait([one, one])[one]))
    patient.start()
    with pytest.raises(TimeoutError):
        engine.wait([one], timeout=0.1)
    fake.set(one, TaskStatus.COMPLETED)
    patient.join(10)
    assert [seen.status for seen in ended] == [TaskStatus.COMPLETED]
    assert not engine.watch._wanted and not engine.watch._seen


def test_an_interrupt_in_a_wait_leaves_nothing_behind() -> None:
    clock, fake = FakeClock(), FakeProvider()
    engine = Engine(fake, clock=clock)
    one = engine.submit(SPEC, key="k")

    def interrupt(_now: float) -> None:
        raise KeyboardInterrupt

    clock.on_sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.wait([one])
    assert not engine.watch._wanted and not engine.watch._seen
    clock.on_sleep = lambda _now: fake.set(one, TaskStatus.COMPLETED)
    assert engine.wait([one])[one].status.succeeded


def test_a_wait_for_thousands_of_tasks_returns_all_of_them() -> None:
    clock, fake = FakeClock(), FakeProvider()
    engine = Engine(fake, clock=clock)
    ids = [engine.submit(SPEC, key=str(n)) for n in range(3000)]

    def later(now: float) -> None:
        for one in ids if now > 5 else ids[::2]:
            if not fake.tasks[one].status.final:
                fake.set(one, TaskStatus.COMPLETED)

    clock.on_sleep = later
    fake.calls.clear()
    assert len(engine.wait(ids)) == 3000
    assert len(fake.calls) < 10
    assert len(fake.calls[-1][1]) == 1500, "what has ended is not asked for again"


def test_a_failure_reads_no_more_of_an_endless_line_than_a_person_would() -> None:
    class Counting(FakeProvider):
        seen_bytes = 0

        def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
            chunk = super().read_log(task_id, node=node, offset=offset, limit=limit)
            self.seen_bytes += len(chunk.data)
            return chunk

    fake = Counting()
    engine = Engine(fake)
    one = engine.submit(SPEC, key="k")
    fake.logs[one] = b"x" * 20_000_000
    fake.set(one, TaskStatus.FAILED, reason="exit")
    assert engine.failure(fake.tasks[one]).log_tail
    assert fake.seen_bytes <= 1_000_000


def test_interrupts_at_any_moment_do_not_stop_later_waits() -> None:
    class Busy(FakeClock):
        def now(self) -> float:
            return time.monotonic()

    fake = FakeProvider()
    fake.poll_interval_s = 0.0  # type: ignore[misc]
    engine = Engine(fake, clock=Busy())
    one = engine.submit(SPEC, key="k")

    inside: list[bool] = []

    def interrupt(*_: object) -> None:
        if inside:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGVTALRM, interrupt)  # SIGALRM belongs to the time limit of this test
    try:
        begin = time.monotonic()
        while time.monotonic() - begin < 1.5:
            with contextlib.suppress(KeyboardInterrupt, TimeoutError):
                inside.append(True)
                signal.setitimer(signal.ITIMER_VIRTUAL, random.uniform(0.0001, 0.001))
                try:
                    engine.wait([one], timeout=0.1)  # an interrupt in a collector's callback is lost
                finally:
                    inside.clear()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    fake.set(one, TaskStatus.COMPLETED)
    assert engine.wait([one], timeout=5)[one].status.succeeded


def test_a_wait_that_is_short_of_time_asks_itself_while_another_thread_is_asking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else `result(timeout=0)` of an ended task would fail whenever somebody else waits for another one."""
    fake = FakeProvider()
    engine = Engine(fake, clock=FakeClock())
    slow, ended = engine.submit(SPEC, key="slow"), engine.submit(SPEC, key="ended")
    fake.set(ended, TaskStatus.COMPLETED)
    within: list[bool] = []
    poll = fake.poll

    def wait_at_once() -> None:
        Task(engine, ended).wait(timeout=0)
        within.append(True)

    def asked(task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        if not within:  # the first one to ask is in the middle of it when the other thread comes
            within.append(True)
            other = threading.Thread(target=wait_at_once)
            other.start()
            other.join(10)
        return poll(task_ids)

    monkeypatch.setattr(fake, "poll", asked)
    engine.wait([slow, ended], any_of=True)
    assert within == [True, True]


def test_a_handle_that_has_seen_the_end_does_not_ask_again() -> None:
    fake = FakeProvider()
    engine = Engine(fake, clock=FakeClock())
    one = engine.submit(SPEC, key="k")
    fake.set(one, TaskStatus.COMPLETED)
    task = Task(engine, one)
    task.wait()
    fake.calls.clear()
    task.wait()
    assert task.result() is None
    assert fake.calls == []


class Rings:
    """A bell that is rung by hand: a pipe."""

    def __init__(self) -> None:
        self.ear, self.rope = os.pipe()
        self.closed = False

    def fileno(self) -> int:
        return self.ear

    def heard(self) -> bool:
        return os.read(self.ear, 1) == b"!"

    def close(self) -> None:
        self.closed = True
        os.close(self.ear)


def test_a_wait_that_hears_of_an_end_asks_at_once_and_hears_no_more_afterwards() -> None:
    fake, bell = FakeProvider(), Rings()
    fake.poll_interval_s = 3600.0  # type: ignore[misc]
    fake.bell = lambda task_ids: bell  # type: ignore[method-assign]
    engine = Engine(fake)
    one = engine.submit(SPEC, key="k")
    fake.calls.clear()
    thread = threading.Thread(target=engine.wait, args=([one],))
    thread.start()
    os.write(bell.rope, b"?")  # something else is heard: no reason to ask
    fake.set(one, TaskStatus.COMPLETED)
    os.write(bell.rope, b"!")
    thread.join(10)
    os.close(bell.rope)
    assert not thread.is_alive()
    assert len(fake.calls) == 2
    assert bell.closed
