"""What a review of the sessions' core has found, each reduced to the one moment that matters."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from typing import Any

import pytest

from flow_core.errors import FlowError
from flow_core.links import Door
from flow_core.runner import wire
from flow_core.runner.ahead import Chunk
from tests.sessions.conftest import Opener, sent


def add(x: int, y: int = 1) -> int:
    return x + y


def wait_for(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.005)
    return path


def read_line(connection: socket.socket) -> dict[str, Any]:
    said = b""
    while not said.endswith(b"\n"):
        piece = connection.recv(1)
        assert piece, said
        said += piece
    message: dict[str, Any] = json.loads(said)
    return message


# -- one client never harms another


@pytest.mark.parametrize(
    "said",
    [b'{"flow": 1, "nonce": "\\ud800", "proof": "x"}\n', b'{"flow": 1, "nonce": "x", "proof": "\\ud800"}\n'],
)
def test_a_stranger_whose_words_are_no_text_is_sent_away(opened: Opener, said: bytes) -> None:
    pool = opened(1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    sessions = pool.flow.provider.sessions
    assert sessions is not None
    with sessions.connect(pool.task_id) as stranger:
        stranger.settimeout(20)
        read_line(stranger)
        stranger.sendall(said)
        assert read_line(stranger)["ok"] is False
    assert pool.submit(sent(add), (2,)).result(20) == 3


@pytest.mark.parametrize(
    "said",
    [
        b"[" * 100_000,
        b'{"do": "cancel", "worker": 1e999, "stream": 1, "number": 1}',
        b'{"do": "log", "worker": 0, "range": [1e999, 2]}',
        b'{"do": "log", "worker": 0, "range": [99999999999999999999999999, null]}',
        b'{"do": ["ping"]}',
    ],
)
def test_a_client_whose_wishes_make_no_sense_is_dropped_and_no_other(opened: Opener, said: bytes) -> None:
    pool = opened(1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    door = Door(pool.flow.engine, pool.task_id)
    door.check()
    connection, _ = door.open("control")
    with connection:
        connection.setblocking(True)
        connection.settimeout(20)
        connection.sendall(wire.frame(wire.SAY, 1, said))
        assert connection.recv(1) == b""
    door.open("control")[0].close()


def test_a_worker_that_is_no_number_is_refused(opened: Opener) -> None:
    pool = opened(1)
    assert pool.submit(sent(add), (1,)).result(20) == 2
    door = Door(pool.flow.engine, pool.task_id)
    door.check()
    connection, _ = door.open("control")
    with connection, pytest.raises(FlowError):
        door.open("worker", worker=float("inf"))
    door.open("control")[0].close()


def test_a_client_that_talks_garbage_to_a_worker_harms_no_other(opened: Opener) -> None:
    pool = opened(1)
    pid = pool.submit(sent(os.getpid)).result(20)
    door = Door(pool.flow.engine, pool.task_id)
    door.check()
    for garbage in (
        wire.frame(wire.DEFINE, 1, b"no json"),
        wire.frame(wire.SEGMENT, 1),
        wire.frame(99, 1),
        wire.frame(wire.CALL, 1, b"", 2, 12345),
        wire.frame(wire.CALL_WITH, 1, b"no json", 2, 12345),
    ):
        control, _ = door.open("control")
        line, _ = door.open("worker", worker=0, dedicated=False)
        with control, line:
            line.setblocking(True)
            line.settimeout(20)
            line.sendall(garbage)
            assert line.recv(1) == b""
    assert pool.submit(sent(os.getpid)).result(20) == pid


# -- every call once


def test_the_items_that_a_worker_gives_back_are_told_of_before_the_others_outcome() -> None:
    told: list[str] = []
    sending, go = threading.Event(), threading.Event()

    class Slow:
        def send(self, _: bytes) -> None:
            sending.set()
            go.wait(20)
            told.append("returned")

    chunk = Chunk(Slow(), 1, deque(range(5)))  # type: ignore[arg-type]
    chunk.items.popleft()
    cutting = threading.Thread(target=chunk.cut)
    cutting.start()
    assert sending.wait(20)
    ending = threading.Thread(target=lambda: (chunk.end(), told.append("result")))
    ending.start()
    ending.join(0.1)
    go.set()
    cutting.join(20)
    ending.join(20)
    assert told == ["returned", "result"] and chunk.size == 1


def test_a_chunk_that_is_about_to_begin_is_not_given_back_as_a_whole() -> None:
    class Mute:
        def send(self, _: bytes) -> None:
            pass

    chunk = Chunk(Mute(), 1, deque(range(5)))  # type: ignore[arg-type]
    chunk.cut()
    assert chunk.items.popleft() == 0 and chunk.size == 1 and not chunk.items


def test_a_chunk_that_has_ended_gives_nothing_back() -> None:
    class Loud:
        def send(self, _: bytes) -> None:
            raise AssertionError

    chunk = Chunk(Loud(), 1, deque(range(5)))  # type: ignore[arg-type]
    chunk.items.popleft()
    chunk.end()
    chunk.cut()
