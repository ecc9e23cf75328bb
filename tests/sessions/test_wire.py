"""The wire and the door of a session: pieces of any size, and strangers that say anything."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_core.dispatch import Pool
from flow_core.links import Door
from flow_core.runner import wire
from tests.sessions.conftest import Opener, eventually, sent

FRAMES = st.lists(
    st.tuples(
        st.integers(0, 255),
        st.integers(0, 255),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**64 - 1),
        st.binary(max_size=60),
    ),
    max_size=8,
)


@given(FRAMES, st.lists(st.integers(1, 50), max_size=40))
def test_frames_come_out_whole_whatever_pieces_they_came_in(
    frames: list[tuple[int, int, int, int, bytes]], sizes: list[int]
) -> None:
    stream = b"".join(
        wire.frame(kind, number, body, codec, more) for kind, codec, more, number, body in frames
    )
    reader, found = wire.Frames(), []
    for size in sizes:
        if stream:
            found += reader.cut(stream[:size])
            stream = stream[size:]
    if stream:
        found += reader.cut(stream)
    assert found == frames


@given(st.binary(min_size=20, max_size=200))
@settings(max_examples=300)
def test_garbage_is_cut_or_refused_and_never_hoarded(garbage: bytes) -> None:
    reader = wire.Frames()
    try:
        reader.cut(garbage)
    except wire.ProtocolError as error:
        assert f"{wire.MAX_FRAME_BYTES:,}" in str(error)  # noqa: PT017 - it may also not be raised


def double(x: int) -> int:
    return 2 * x


@pytest.fixture
def pool(opened: Opener) -> Pool:
    pool = opened(workers=1)
    assert pool.submit(sent(double), (1,)).result(20) == 2
    return pool


@pytest.fixture
def stranger(pool: Pool) -> Iterator[socket.socket]:
    sessions = pool.flow.provider.sessions
    assert sessions is not None
    with sessions.connect(pool.task_id) as connection:
        connection.settimeout(20)
        yield connection


def read_line(connection: socket.socket) -> dict[str, object]:
    said = b""
    while not said.endswith(b"\n"):
        piece = connection.recv(1)
        assert piece, said
        said += piece
    message: dict[str, object] = json.loads(said)
    return message


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no handshake"),
        (b"\x00\xff" * 100 + b"\n", "no handshake"),
        (b"[" * 8000 + b"\n", "no handshake"),
        (b"7\n", "no handshake"),
        (b'{"flow": 2}\n', "version 2 of the session protocol, this session version 1"),
        (b'{"flow": 1}\n', "the key is not this session's"),
        (b'{"flow": 1, "proof": 5, "nonce": []}\n', "the key is not this session's"),
        (b"x" * 9000, "said nothing, or too much"),
    ],
)
def test_a_stranger_is_told_why_and_sent_away(
    pool: Pool, stranger: socket.socket, said: bytes, reason: str
) -> None:
    read_line(stranger)
    stranger.sendall(said)
    answer = read_line(stranger)
    assert answer["ok"] is False and reason in str(answer["error"])
    assert stranger.recv(1) == b""
    assert pool.submit(sent(double), (4,)).result(20) == 8


def test_a_proof_is_good_for_one_connection_only(pool: Pool) -> None:
    sessions = pool.flow.provider.sessions
    assert sessions is not None
    door = Door(pool.flow.engine, pool.task_id, os.urandom(8).hex())
    door.check()
    with sessions.connect(pool.task_id) as first, sessions.connect(pool.task_id) as second:
        key, ours = bytes.fromhex(pool.flow.engine.collect(pool.task_id, "session.key").decode()), "ours"
        heard = read_line(first)
        read_line(second)
        proof = wire.proof(key, "client", ours, str(heard["nonce"]))
        replayed = {"flow": 1, "nonce": ours, "proof": proof, "role": "control", "client": "ab"}
        second.sendall(wire.line(replayed))
        assert read_line(second)["ok"] is False


def test_many_silent_strangers_keep_nobody_out(pool: Pool) -> None:
    sessions = pool.flow.provider.sessions
    assert sessions is not None
    silent = [sessions.connect(pool.task_id) for _ in range(100)]
    try:
        door = Door(pool.flow.engine, pool.task_id, os.urandom(8).hex())
        door.check()
        connection, _ = eventually(lambda: door.open("control"))
        connection.close()
    finally:
        for one in silent:
            one.close()


def test_a_client_that_talks_garbage_after_the_handshake_is_dropped_and_no_other(pool: Pool) -> None:
    door = Door(pool.flow.engine, pool.task_id, os.urandom(8).hex())
    door.check()
    connection, _ = door.open("control")
    with connection:
        connection.setblocking(True)
        connection.settimeout(20)
        connection.sendall(b"\xff" * 4096)
        assert connection.recv(1) == b""
    assert pool.submit(sent(double), (5,)).result(20) == 10


def test_only_the_owner_can_read_the_key_and_reach_the_door(pool: Pool) -> None:
    folders = list(pool.flow.settings.local.home.glob("tasks/*/*"))
    assert len(folders) == 1
    for name in ("session.key", "session.json", "door"):
        assert (folders[0] / name).stat().st_mode & 0o077 == 0
    assert pool.flow.engine.collect(pool.task_id, "session.key") not in repr(pool.task.config).encode()


def test_after_the_end_nobody_listens(pool: Pool) -> None:
    pool.close()
    sessions = pool.flow.provider.sessions
    assert sessions is not None
    start = time.monotonic()
    with pytest.raises(Exception, match="does not listen"):
        sessions.connect(pool.task_id)
    assert time.monotonic() - start < 10
