"""Workers that share no memory with their caller, as on SSH hosts and Slurm: what is too large to travel is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from flow_core import Flow, Session, encoding, get
from flow_core.dispatch import Pool
from flow_core.errors import ResultError, SerializationError
from tests.sessions.conftest import Link, Opener, sent


def length(*values: Any) -> int:
    return sum(map(len, values))


def zeros(size: int) -> Any:
    import numpy as np

    return np.zeros(size, dtype="u1")


def pieces(size: int) -> Iterator[bytes]:
    yield b"first"
    yield bytes(size)


@pytest.fixture
def pool(link: Link, opened: Opener) -> Pool:
    return opened(workers=1)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(encoding, "MOST_BYTES", 1_000_000)
    return 1_000_000


@pytest.mark.parametrize("codec", ["json", "pickle"])
def test_arguments_over_the_limit_are_refused_in_the_caller(pool: Pool, limit: int, codec: str) -> None:
    with pytest.raises(SerializationError) as refused:
        pool.submit(sent(length, codec), ("x" * limit,))
    text = str(refused.value)
    assert "The arguments of 'length' take 1,000,0" in text and "at most 1,000,000 can travel" in text
    assert "put(value" in text and "pass the reference" in text
    assert pool.submit(sent(length, codec), ("x" * (limit - 100),)).result(20) == limit - 100
    assert pool.open_calls == 0


def test_an_array_over_the_limit_is_refused_as_well(pool: Pool, limit: int) -> None:
    with pytest.raises(SerializationError, match="take 2,000,"):
        pool.submit(sent(length), (np.zeros(2 * limit, dtype="u1"),))
    assert pool.submit(sent(length), (np.zeros(limit // 2, dtype="u1"),)).result(20) == limit // 2


def test_a_call_whose_inputs_are_too_large_together_fails_with_that(pool: Pool, limit: int) -> None:
    half = sent(zeros)
    inputs = [pool.submit(half, (600_000,)) for _ in range(2)]
    both = pool.submit(sent(length), tuple(inputs))
    with pytest.raises(SerializationError, match="The arguments of 'length' take 1,200,"):
        both.result(20)
    assert pool.submit(sent(length), (inputs[0],)).result(20) == 600_000


def test_the_items_of_a_map_travel_apart_where_they_are_too_large_together(
    link: Link, flow: Flow, limit: int
) -> None:
    with Session(flow=flow, workers=1, serialization="pickle") as session:
        count = session.function(length)
        assert list(count.imap([1, 2, 3][:0])) == []
        assert list(count.imap("x" for _ in range(500))) == [1] * 500, "now they travel many at a time"
        items = [bytes(100_000 + number) for number in range(50)]
        assert list(count.imap(items)) == [len(one) for one in items]
        assert get(count.map(items)) == [len(one) for one in items]
        with pytest.raises(SerializationError, match="The arguments of 'length'"):
            list(count.imap([b"", bytes(2_000_000)]))


@pytest.mark.slow
def test_a_value_over_the_limit_is_the_calls_error_and_no_lost_worker(pool: Pool) -> None:
    with pytest.raises(ResultError, match=r"result takes 536,87\d,\d+ bytes; at most 536,870,912 can travel"):
        pool.submit(sent(zeros), (512 * 1024 * 1024 + 1,)).result(60)
    stream = pool.submit(sent(pieces), (512 * 1024 * 1024 + 1,))
    with pytest.raises(ResultError, match="the value that was yielded takes 536,87"):
        stream.result(60)
    assert pool.submit(sent(length), (b"x",)).result(20) == 1
