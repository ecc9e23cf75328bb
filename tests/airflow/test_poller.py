"""One poll for all triggers of a provider."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import pytest

from flow_airflow.poller import Poller, shared_poller
from flow_core.errors import AuthenticationError, ProviderUnavailable
from flow_core.models import Snapshot, TaskStatus

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def snapshot(task_id: str, status: TaskStatus) -> Snapshot:
    return Snapshot(task_id=task_id, name=task_id, status=status)


class Backend:
    """Answers polls, and counts them."""

    def __init__(self) -> None:
        self.status: dict[str, TaskStatus] = {}
        self.asked: list[list[str]] = []
        self.errors: list[Exception] = []

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        self.asked.append(list(task_ids))
        if self.errors:
            raise self.errors.pop(0)
        return {one: snapshot(one, self.status.get(one, TaskStatus.RUNNING)) for one in task_ids}


async def test_many_waiters_cost_one_poll_per_tick() -> None:
    backend = Backend()
    poller = Poller(backend.poll, 0.02)
    names = [f"task-{number}" for number in range(1000)]

    async def wait(name: str) -> TaskStatus:
        async with poller.watch(name) as ended:
            return (await ended).status

    waiting = [asyncio.create_task(wait(name)) for name in names]
    while len(backend.asked) < 3:
        await asyncio.sleep(0.01)
    backend.status = dict.fromkeys(names, TaskStatus.COMPLETED)
    assert set(await asyncio.gather(*waiting)) == {TaskStatus.COMPLETED}
    assert max(len(one) for one in backend.asked) == 1000
    assert len(backend.asked) < 50


async def test_a_provider_that_is_away_for_a_while_is_asked_again() -> None:
    backend = Backend()
    backend.errors = [ProviderUnavailable("away"), ProviderUnavailable("away")]
    backend.status = {"a": TaskStatus.FAILED}
    async with Poller(backend.poll, 0.01).watch("a") as ended:
        assert (await ended).status is TaskStatus.FAILED
    assert len(backend.asked) == 3


async def test_an_error_that_will_not_pass_reaches_everybody_who_waits() -> None:
    backend = Backend()
    backend.errors = [AuthenticationError("no key")]
    poller = Poller(backend.poll, 0.01)
    async with poller.watch("a") as first, poller.watch("b") as second:
        for one in (first, second):
            with pytest.raises(AuthenticationError):
                await one


async def test_a_waiter_that_leaves_does_not_disturb_the_others() -> None:
    backend = Backend()
    poller = Poller(backend.poll, 0.01)
    async with poller.watch("a") as ended:
        async with poller.watch("a"):
            pass
        backend.status = {"a": TaskStatus.COMPLETED}
        assert (await ended).status is TaskStatus.COMPLETED
    asked = len(backend.asked)
    await asyncio.sleep(0.05)
    assert len(backend.asked) == asked


async def test_triggers_of_one_provider_share_a_poller() -> None:
    backend = Backend()
    assert shared_poller("local", 1.0, backend.poll) is shared_poller("local", 1.0, Backend().poll)
    assert shared_poller("local", 1.0, backend.poll) is not shared_poller("other", 1.0, backend.poll)
