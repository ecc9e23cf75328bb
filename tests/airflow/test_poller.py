"""One poll, and one reading of output, for all triggers of a provider."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from flow_airflow.logs import TaskLines
from flow_airflow.poller import OUTPUT_BYTES, Poller, shared_poller, started
from flow_core.errors import AuthenticationError, ProviderUnavailable
from flow_core.models import LogChunk, LogPosition, Snapshot, TaskStatus

pytestmark = pytest.mark.anyio

ENDED = (TaskStatus.COMPLETED, TaskStatus.FAILED)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Backend:
    """Answers, and counts the questions."""

    status: dict[str, TaskStatus] = field(default_factory=dict)
    output: dict[str, bytes] = field(default_factory=dict)
    polls: list[list[str]] = field(default_factory=list)
    reads: list[list[LogPosition]] = field(default_factory=list)
    cancels: list[list[str]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    read_errors: list[Exception] = field(default_factory=list)
    takes_s: float = 0.0
    threads: set[str] = field(default_factory=set)

    def _asked(self) -> None:
        self.threads.add(threading.current_thread().name)
        time.sleep(self.takes_s)

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        self.polls.append(list(task_ids))
        self._asked()
        if self.errors:
            raise self.errors.pop(0)
        return {
            one: Snapshot(task_id=one, name=one, status=self.status.get(one, TaskStatus.RUNNING))
            for one in task_ids
        }

    def read_logs(
        self, wanted: Sequence[LogPosition], *, limit: int = 65536
    ) -> Mapping[LogPosition, LogChunk]:
        self.reads.append(list(wanted))
        self._asked()
        if self.read_errors:
            raise self.read_errors.pop(0)
        chunks = {}
        for at in wanted:
            data = self.output.get(at.task_id, b"")[at.offset :][: limit // len(wanted)]
            end = self.status.get(at.task_id) in ENDED
            end = end and at.offset + len(data) == len(self.output.get(at.task_id, b""))
            chunks[at] = LogChunk(data, at.offset + len(data), end=end)
        return chunks

    def cancel(self, task_ids: Collection[str]) -> None:
        self.cancels.append(list(task_ids))
        self._asked()
        if self.errors:
            raise self.errors.pop(0)


def poller_of(backend: Backend) -> Poller:
    return Poller(lambda: backend)


async def told(poller: Poller, task_id: str, interval_s: float = 0.01, *, output: bool = True) -> list[str]:
    """Wait for the end of a task; return the lines it printed, the troubles and its status, in the order of news."""
    heard: list[str] = []
    open_output = (lambda: TaskLines([0])) if output else None
    async with poller.watch(task_id, interval_s=interval_s, output=open_output) as watch:
        while True:
            news = await watch.news()
            heard += [line.text for line in news.lines] + [news.trouble] * bool(news.trouble)
            if news.arrived is not None:
                return [*heard, news.arrived.status.value]


async def test_many_waiters_cost_one_poll_and_one_reading_per_tick() -> None:
    backend = Backend(output={f"task-{number}": b"hello\n" for number in range(1000)})
    names = list(backend.output)
    poller = poller_of(backend)
    waiting = [asyncio.create_task(told(poller, name, 0.05)) for name in names]
    while len(backend.reads) < 3:
        await asyncio.sleep(0.01)
    backend.status = dict.fromkeys(names, TaskStatus.COMPLETED)
    heard = await asyncio.gather(*waiting)
    assert heard == [["hello", "completed"]] * 1000
    assert max(len(one) for one in backend.polls) == max(len(one) for one in backend.reads) == 1000
    assert len(backend.polls) < 200
    assert len(backend.reads) <= len(backend.polls)


async def test_who_waits_for_the_start_only_is_told_when_the_task_runs_or_has_ended_without() -> None:
    backend = Backend(status={"a": TaskStatus.PENDING, "b": TaskStatus.PENDING})
    poller = poller_of(backend)
    async with (
        poller.watch("a", interval_s=0.01, until=started) as first,
        poller.watch("b", interval_s=0.01, until=started) as second,
    ):
        while len(backend.polls) < 3:
            await asyncio.sleep(0.01)
        assert not first.over.done()
        backend.status = {"a": TaskStatus.RUNNING, "b": TaskStatus.FAILED}
        for watch, status in ((first, "running"), (second, "failed")):
            arrived = (await watch.news()).arrived
            assert arrived is not None and arrived.status.value == status


async def test_only_what_was_added_is_read_and_what_has_not_started_is_not() -> None:
    backend = Backend(status={"a": TaskStatus.PENDING}, output={"a": b"one\ntwo\nthr"})
    waiting = asyncio.create_task(told(poller_of(backend), "a"))
    while len(backend.polls) < 3:
        await asyncio.sleep(0.01)
    assert backend.reads == []
    backend.status = {"a": TaskStatus.RUNNING}
    while len(backend.reads) < 2:
        await asyncio.sleep(0.01)
    backend.output["a"] += b"ee\nfour"
    backend.status = {"a": TaskStatus.COMPLETED}
    assert await waiting == ["one", "two", "three", "four", "completed"]
    assert [one[0].offset for one in backend.reads[:2]] == [0, 11]


async def test_nobody_is_asked_for_output_that_nobody_wants() -> None:
    backend = Backend(status={"a": TaskStatus.COMPLETED}, output={"a": b"one\n"})
    assert await told(poller_of(backend), "a", output=False) == ["completed"]
    assert backend.reads == []


async def test_a_provider_that_is_away_for_a_while_is_asked_again_and_it_is_told_once() -> None:
    backend = Backend(errors=[ProviderUnavailable("away")] * 3, status={"a": TaskStatus.FAILED})
    assert await told(poller_of(backend), "a") == [
        "No answer at the moment, asking again: away",
        "There is an answer again.",
        "failed",
    ]
    assert len(backend.polls) == 4


async def test_output_out_of_reach_hides_no_end() -> None:
    backend = Backend(
        read_errors=[ProviderUnavailable("disk")], status={"a": TaskStatus.COMPLETED}, output={"a": b"x"}
    )
    trouble, end = await told(poller_of(backend), "a")
    assert "the output is out of reach: disk" in trouble and end == "completed"


async def test_an_error_that_will_not_pass_reaches_everybody_who_waits() -> None:
    poller = poller_of(Backend(errors=[AuthenticationError("no key")]))
    async with poller.watch("a", interval_s=0.01) as first, poller.watch("b", interval_s=0.01) as second:
        for one in (first, second):
            with pytest.raises(AuthenticationError):
                await one.news()


async def test_a_provider_that_cannot_be_made_is_an_error_too() -> None:
    def connect() -> Backend:
        raise AuthenticationError("no key")

    async with Poller(connect).watch("a", interval_s=0.01) as watch:
        with pytest.raises(AuthenticationError):
            await watch.news()


async def test_a_waiter_that_leaves_does_not_disturb_the_others() -> None:
    backend = Backend()
    poller = poller_of(backend)
    waiting = asyncio.create_task(told(poller, "a"))
    async with poller.watch("a", interval_s=0.01):
        pass
    backend.status = {"a": TaskStatus.COMPLETED}
    assert await waiting == ["completed"]
    asked = len(backend.polls)
    await asyncio.sleep(0.05)
    assert len(backend.polls) == asked


async def test_who_is_not_done_with_the_last_lines_gets_no_more() -> None:
    backend = Backend(output={"slow": b"x\n" * 100})
    async with poller_of(backend).watch("slow", interval_s=0.01, output=lambda: TaskLines([0])) as watch:
        news = await watch.news()
        assert len(news.lines) == 100
        backend.output["slow"] += b"y\n"
        asked, read = len(backend.polls), len(backend.reads)
        while len(backend.polls) < asked + 3:
            await asyncio.sleep(0.01)
        assert len(backend.reads) <= read + 1  # one may have been under way
        assert [line.text for line in (await watch.news()).lines] == ["y"]


async def test_a_flood_is_read_in_bounded_pieces_and_every_line_arrives() -> None:
    flood = b"".join(b"line %06d\n" % number for number in range(40_000))
    backend = Backend(output={"flood": flood, "quiet": b"hello\n"})
    poller = poller_of(backend)
    both = [asyncio.create_task(told(poller, name, 0.02)) for name in ("flood", "quiet")]
    while backend.reads == [] or backend.reads[-1][0].offset < len(flood):
        await asyncio.sleep(0.02)
    backend.status = dict.fromkeys(backend.output, TaskStatus.COMPLETED)
    heard, quiet = await asyncio.gather(*both)
    assert heard == [*flood.decode().splitlines(), "completed"]
    assert quiet == ["hello", "completed"]
    steps = [one[0].offset for one in backend.reads if one[0].task_id == "flood"]
    assert max(later - earlier for earlier, later in itertools.pairwise(steps)) <= OUTPUT_BYTES


async def test_a_slow_provider_blocks_neither_the_event_loop_nor_a_cancel() -> None:
    backend = Backend(takes_s=0.2)
    poller = poller_of(backend)
    waiting = [asyncio.create_task(told(poller, f"task-{number}")) for number in range(50)]
    while not backend.polls:
        await asyncio.sleep(0.01)
    cancelling = [asyncio.create_task(poller.cancel(f"task-{number}")) for number in range(50)]
    lags = []
    for _ in range(40):
        began = time.monotonic()
        await asyncio.sleep(0.01)
        lags.append(time.monotonic() - began - 0.01)
    await asyncio.gather(*cancelling)
    backend.status = {f"task-{number}": TaskStatus.COMPLETED for number in range(50)}
    await asyncio.gather(*waiting)
    assert sorted(lags)[len(lags) // 2] < 0.05
    assert backend.cancels == [[f"task-{number}" for number in range(50)]]
    assert len(backend.threads) <= 2


async def test_a_cancel_that_fails_fails_for_all_who_wanted_it() -> None:
    poller = poller_of(Backend(errors=[ProviderUnavailable("away")]))
    answers = await asyncio.gather(*(poller.cancel(name) for name in "ab"), return_exceptions=True)
    assert [type(one) for one in answers] == [ProviderUnavailable] * 2


async def test_triggers_of_one_provider_share_a_poller() -> None:
    assert shared_poller("local", Backend) is shared_poller("local", Backend)
    assert shared_poller("local", Backend) is not shared_poller("other", Backend)
