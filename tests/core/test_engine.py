"""The engine's rules, on a provider in memory and a clock that is moved by hand."""

from __future__ import annotations

import threading

import pytest

from flow_core.engine import Engine, failure
from flow_core.errors import (
    ProviderUnavailable,
    TaskCancelledError,
    TaskExecutionError,
    TaskNotFoundError,
    TaskOutOfMemoryError,
    TaskTimeLimitError,
    TimeoutError,
    WorkerDiedError,
)
from flow_core.ids import TaskId
from flow_core.models import Snapshot, TaskConfig, TaskSpec, TaskStatus
from flow_core.testing import FakeClock, FakeProvider


@pytest.fixture
def fake() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def engine(fake: FakeProvider, clock: FakeClock) -> Engine:
    return Engine(fake, clock=clock)


SPEC = TaskSpec.from_config(TaskConfig(name="Train_It", command="true", instance_type="a100"), files=())


def test_the_id_is_made_of_a_readable_name_the_key_and_the_attempt(engine: Engine) -> None:
    first = engine.submit(SPEC, key="k")
    assert first.startswith("train-it-") and first.endswith("-1")
    assert str(TaskId.parse(first)) == first


@pytest.mark.parametrize(
    "status",
    [
        TaskStatus.PENDING,
        TaskStatus.PROVISIONING,
        TaskStatus.RUNNING,
        TaskStatus.PREEMPTED,
        TaskStatus.PAUSED,
        TaskStatus.COMPLETED,
    ],
)
def test_a_second_submit_with_the_same_key_returns_a_live_or_succeeded_task(
    engine: Engine, fake: FakeProvider, status: TaskStatus
) -> None:
    first = engine.submit(SPEC, key="k")
    fake.set(first, status)
    assert engine.submit(SPEC, key="k") == first
    assert len(fake.tasks) == 1


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (TaskStatus.FAILED, "exit"),
        (TaskStatus.CANCELLED, "cancelled"),
        (TaskStatus.LOST, "lost"),
        (TaskStatus.RUNNING, "cancelling"),
        (TaskStatus.COMPLETED, "released"),
    ],
)
def test_after_an_end_without_success_the_same_key_is_a_new_attempt(
    engine: Engine, fake: FakeProvider, status: TaskStatus, reason: str
) -> None:
    first = engine.submit(SPEC, key="k")
    fake.set(first, status, reason=reason)
    second = engine.submit(SPEC, key="k")
    assert TaskId.parse(second) == TaskId.parse(first).next()
    assert engine.submit(SPEC, key="k") == second


def test_an_adopted_task_that_may_be_half_submitted_is_submitted_again(
    engine: Engine, fake: FakeProvider
) -> None:
    first = engine.submit(SPEC, key="k")
    fake.calls.clear()
    engine.submit(SPEC, key="k")
    assert ("submit", (first,)) in fake.calls


def test_other_keys_are_other_tasks(engine: Engine) -> None:
    assert len({engine.submit(SPEC, key=key) for key in ("a", "b", "", "a ", "\udcff")}) == 5


def test_wait_returns_when_all_have_ended(engine: Engine, fake: FakeProvider, clock: FakeClock) -> None:
    ids = [engine.submit(SPEC, key=str(n)) for n in range(3)]

    def later(now: float) -> None:
        for n, one in enumerate(ids):
            if now > 10 * (n + 1):
                fake.set(one, TaskStatus.COMPLETED)

    clock.on_sleep = later
    assert all(seen.status.succeeded for seen in engine.wait(ids).values())
    assert 30 < clock.time < 33


def test_wait_for_any_returns_at_the_first_end(engine: Engine, fake: FakeProvider, clock: FakeClock) -> None:
    ids = [engine.submit(SPEC, key=str(n)) for n in range(3)]
    clock.on_sleep = lambda now: fake.set(ids[1], TaskStatus.FAILED) if now > 5 else None
    seen = engine.wait(ids, any_of=True)
    assert seen[ids[1]].status is TaskStatus.FAILED
    assert clock.time < 8


def test_a_wait_never_stays_away_from_python_for_long(
    engine: Engine, fake: FakeProvider, clock: FakeClock
) -> None:
    one = engine.submit(SPEC, key="k")
    clock.on_sleep = lambda now: fake.set(one, TaskStatus.COMPLETED) if now > 100 else None
    engine.wait([one])
    assert max(clock.slept) <= 0.1


def test_a_wait_asks_no_more_often_than_the_provider_says(
    engine: Engine, fake: FakeProvider, clock: FakeClock
) -> None:
    one = engine.submit(SPEC, key="k")
    clock.on_sleep = lambda now: fake.set(one, TaskStatus.COMPLETED) if now > 100 else None
    fake.calls.clear()
    engine.wait([one])
    assert len(fake.calls) <= 102


def test_a_wait_that_is_too_long_raises_and_the_task_goes_on(
    engine: Engine, fake: FakeProvider, clock: FakeClock
) -> None:
    one = engine.submit(SPEC, key="k")
    with pytest.raises(TimeoutError, match=f"waited 7 s and task {one} is pending"):
        engine.wait([one], timeout=7)
    assert 7 <= clock.time < 7.2
    assert fake.tasks[one].status is TaskStatus.PENDING


def test_a_provider_that_does_not_answer_is_asked_again(
    engine: Engine, fake: FakeProvider, clock: FakeClock
) -> None:
    one = engine.submit(SPEC, key="k")
    fake.trouble = [ProviderUnavailable("no route")] * 5
    clock.on_sleep = lambda now: fake.set(one, TaskStatus.COMPLETED) if now > 2 else None
    assert engine.wait([one])[one].status.succeeded


def test_many_waiting_threads_ask_the_provider_together(fake: FakeProvider) -> None:
    engine = Engine(fake)
    fake.poll_interval_s = 0.05  # type: ignore[misc]
    ids = [engine.submit(SPEC, key=str(n)) for n in range(50)]
    fake.calls.clear()
    threads = [threading.Thread(target=engine.wait, args=([one],)) for one in ids]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.6)
    for one in ids:
        fake.set(one, TaskStatus.COMPLETED)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    polls = [asked for verb, asked in fake.calls if verb == "poll"]
    assert len(polls) < 100, "one poll serves all threads"
    assert max(len(asked) for asked in polls) == 50


def test_get_of_an_unknown_task_says_so(engine: Engine) -> None:
    with pytest.raises(TaskNotFoundError, match="knows no task 'x-0123456789abcdef-1'"):
        engine.get("x-0123456789abcdef-1")


def test_poll_asks_for_each_task_once(engine: Engine, fake: FakeProvider) -> None:
    one = engine.submit(SPEC, key="k")
    fake.calls.clear()
    assert set(engine.poll([one, one])) == {one}
    assert fake.calls == [("poll", (one,))]
    assert engine.poll([]) == {}


def test_followed_lines_are_whole_whatever_the_pieces(
    engine: Engine, fake: FakeProvider, clock: FakeClock
) -> None:
    one = engine.submit(SPEC, key="k")
    text = "first\nzw\u00f6lf \U0001f680\n\nno newline"
    data = text.encode()
    fake.logs[one] = b""

    def byte_by_byte(_now: float) -> None:
        fake.logs[one] = data[: len(fake.logs[one]) + 1]
        if fake.logs[one] == data:
            fake.set(one, TaskStatus.COMPLETED)

    clock.on_sleep = byte_by_byte
    assert "".join(engine.follow(one)) == text


def test_a_line_that_never_ends_is_followed_in_reasonable_time(engine: Engine, fake: FakeProvider) -> None:
    one = engine.submit(SPEC, key="k")
    fake.logs[one] = b"\rprogress" * 2_000_000
    fake.set(one, TaskStatus.COMPLETED)
    assert [len(line) for line in engine.follow(one)] == [18_000_000]


def test_the_tail_is_the_last_lines_of_a_log_of_any_length(engine: Engine, fake: FakeProvider) -> None:
    one = engine.submit(SPEC, key="k")
    fake.logs[one] = "".join(f"line {n}\n" for n in range(100_000)).encode()
    fake.set(one, TaskStatus.COMPLETED)
    assert engine.tail(one, lines=2) == "line 99998\nline 99999\n"
    assert engine.tail(one, lines=50_000).count("\n") == 50_000
    assert engine.tail(one, lines=200_000).count("\n") == 100_000
    assert engine.tail(one, lines=0) == ""


@pytest.mark.parametrize(
    ("reason", "kind", "retryable"),
    [
        ("exit", TaskExecutionError, False),
        ("cancelled", TaskCancelledError, False),
        ("time-limit", TaskTimeLimitError, False),
        ("out-of-memory", TaskOutOfMemoryError, False),
        ("runner-died", WorkerDiedError, True),
        ("reboot", WorkerDiedError, True),
        ("a reason of tomorrow", TaskExecutionError, False),
    ],
)
def test_each_end_has_its_error(reason: str, kind: type[TaskExecutionError], retryable: bool) -> None:
    error = failure(
        Snapshot(
            task_id="t",
            name="n",
            status=TaskStatus.FAILED,
            reason=reason,
            message="what happened",
            exit_code=7,
        ),
        "the end",
    )
    assert type(error) is kind
    assert error.retryable is retryable
    assert (error.task_id, error.exit_code, error.reason, error.log_tail) == ("t", 7, reason, "the end")
    assert "task t failed: what happened" in str(error) and "the end" in str(error)
