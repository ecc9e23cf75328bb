"""Triggers write to one socket that is read slowly; neither the event loop nor a task's end waits for it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from flow_airflow import FlowTaskTrigger
from flow_airflow.channel import Channel
from flow_airflow.logs import Line
from flow_airflow.poller import News, Watch
from flow_core.models import Snapshot, TaskStatus

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Supervisor:
    """The other end of the log's socket: takes 4 KiB every `pause_s`, as a triggerer's main process does."""

    def __init__(self) -> None:
        self.ours, self._theirs = socket.socketpair()
        self.pause_s = 0.05
        self._data = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while data := self._theirs.recv(4096):
            self._data += data
            time.sleep(self.pause_s)
        self._theirs.close()

    def info(self, _format: str, text: str, *, chan: str) -> None:
        """Write a line as a trigger's logger does, with what Airflow adds; blocks when the socket is full."""
        self.ours.sendall(json.dumps({"event": text, "chan": chan, "more": "x" * 300}).encode() + b"\n")

    def events(self) -> list[dict[str, str]]:
        """Return all that was written, once it has been read."""
        self.pause_s = 0.0
        self.ours.close()
        self._thread.join(10)
        return [json.loads(line) for line in self._data.splitlines()]


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    supervisor.events()


def trigger(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, channel: Channel) -> FlowTaskTrigger:
    made = FlowTaskTrigger(flow_task_id="t-1", log_offsets=[0])
    made._log = cast("Any", supervisor)
    monkeypatch.setattr("flow_airflow.triggers.shared_channel", lambda: channel)
    return made


def some_lines(count: int) -> list[Line]:
    return [Line(f"line {number:05d}", 0, 11 * (number + 1)) for number in range(count)]


async def longest_lag(work: asyncio.Task[object]) -> float:
    longest = 0.0
    while not work.done():
        before = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - before - 0.01)
    work.result()
    return longest


async def test_many_lines_arrive_in_order_while_the_event_loop_goes_on(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = Channel(supervisor.ours.fileno())
    lines = some_lines(3000)
    one = trigger(supervisor, monkeypatch, channel)
    lag = await longest_lag(asyncio.create_task(one._show(lines)))
    assert lag < 1.0  # the socket takes 700 of them; the rest would block for many seconds
    events = supervisor.events()
    assert "\n".join(event["event"] for event in events).split("\n") == [line.text for line in lines]
    assert events[0]["event"] == "line 00000" and len(events) < 1500  # joined where it was crowded
    assert [event["chan"] for event in events][-1] == f"t-1[0]:{11 * 3000}"


async def test_the_end_of_a_task_does_not_wait_for_its_lines_and_says_how_far_they_are_shown(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor.pause_s = 0.5
    one = trigger(supervisor, monkeypatch, Channel(supervisor.ours.fileno()))
    watch = Watch("t-1", 1.0, None)
    watch.tell(News(some_lines(5000), Snapshot("t-1", "t", TaskStatus.COMPLETED)), last=True)
    before = time.monotonic()
    await one._follow(watch)
    assert time.monotonic() - before < 15
    shown = "\n".join(event["event"] for event in supervisor.events()).split("\n")
    assert 0 < len(shown) < 5000
    assert one._shown == [11 * len(shown)]


async def test_those_who_write_take_turns(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = Channel(supervisor.ours.fileno())
    both = [trigger(supervisor, monkeypatch, channel) for _ in range(2)]
    both[1].flow_task_id = "t-2"
    await asyncio.gather(*(one._show(some_lines(1500)) for one in both))
    origins = [event["chan"].partition("[")[0] for event in supervisor.events()]
    assert {"t-1", "t-2"} == set(origins[:100])


async def test_a_log_that_goes_elsewhere_has_always_room(tmp_path: object) -> None:
    async with Channel(None).turn() as crowded:
        assert crowded is False
