"""What a review of the sessions' core has found, each reduced to the one moment that matters."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

import pytest

from flow_core.errors import FlowError
from flow_core.links import Door
from flow_core.runner import wire
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
