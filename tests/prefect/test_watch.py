"""One question per tick for all bodies, and each body's thread wakes when its own has ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from flow_core import Flow, ProviderUnavailable, TaskConfig, TaskStatus
from flow_core.models import TaskSpec
from flow_core.testing import FakeProvider
from flow_prefect.watch import Watch
from tests.prefect.machine import until


class Quick(FakeProvider):
    poll_interval_s = 0.01


@pytest.fixture
def provider() -> Quick:
    provider = Quick()
    spec = TaskSpec.from_config(TaskConfig(command="true", instance_type="cpu"))
    for number in range(1, 101):
        provider.submit(spec, task_id=f"body-{number:016x}-1")
    provider.calls.clear()
    return provider


@pytest.fixture
def waiting(provider: Quick) -> Iterator[tuple[Watch, dict[str, threading.Event]]]:
    watch = Watch(Flow(provider))
    events = {task_id: threading.Event() for task_id in provider.tasks}
    for task_id, event in events.items():
        watch.add(task_id, event)
    yield watch, events
    for task_id in events:
        watch.remove(task_id)


def watchers() -> int:
    return sum(thread.name == "flow-watch" for thread in threading.enumerate())


def test_only_the_thread_whose_task_has_ended_wakes(
    provider: Quick, waiting: tuple[Watch, dict[str, threading.Event]]
) -> None:
    _, events = waiting
    first, *others = events
    provider.set(first, TaskStatus.FAILED)
    assert events[first].wait(30)
    assert not any(events[task_id].is_set() for task_id in others)


def test_all_are_asked_about_at_once_and_by_one_thread(
    provider: Quick, waiting: tuple[Watch, dict[str, threading.Event]]
) -> None:
    until("a few questions", lambda: len(provider.calls) >= 5)
    assert {len(ids) for _, ids in provider.calls[2:]} == {100}
    assert watchers() == 1


def test_a_provider_that_does_not_answer_is_asked_again(
    provider: Quick, waiting: tuple[Watch, dict[str, threading.Event]]
) -> None:
    _, events = waiting
    provider.trouble.extend([ProviderUnavailable("busy")] * 3)
    until("the trouble to be over", lambda: not provider.trouble)
    assert not any(event.is_set() for event in events.values())
    provider.set(next(iter(events)), TaskStatus.COMPLETED)
    assert next(iter(events.values())).wait(30)


def test_when_asking_fails_for_good_every_thread_looks_for_itself(
    provider: Quick, waiting: tuple[Watch, dict[str, threading.Event]]
) -> None:
    provider.trouble.append(RuntimeError("a bug"))
    assert all(event.wait(30) for event in waiting[1].values())


def test_nobody_asks_when_nobody_waits_and_a_new_one_is_asked_about(provider: Quick) -> None:
    watch, event = Watch(Flow(provider)), threading.Event()
    task_id = next(iter(provider.tasks))
    watch.add(task_id, event)
    watch.remove(task_id)
    until("the thread to end", lambda: watchers() == 0, 20)
    provider.set(task_id, TaskStatus.COMPLETED)
    watch.add(task_id, event)
    assert event.wait(30)
    watch.remove(task_id)
