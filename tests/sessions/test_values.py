"""Large values: shared memory that is used again, and never under the feet of somebody who still looks at it."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core.dispatch import Pool
from flow_core.futures import Future
from flow_core.several import get
from tests.sessions.conftest import Opener, eventually, sent


def filled(size: int, value: float) -> Any:
    import numpy as np

    return np.full(size, value)


def total(array: Any) -> float:
    return float(array.sum())


def same(value: Any) -> Any:
    return value


def shared_memory_of(pid: int) -> int:
    """How many pieces of session memory a process has open."""
    links = [os.readlink(f"/proc/{pid}/fd/{one}") for one in os.listdir(f"/proc/{pid}/fd") if one]
    return sum("memfd:flow-" in link for link in links)


def ours() -> int:
    count = 0
    for one in os.listdir("/proc/self/fd"):
        try:
            count += "memfd:flow-" in os.readlink(f"/proc/self/fd/{one}")
        except OSError:
            continue
    return count


@pytest.fixture
def pool(opened: Opener) -> Pool:
    return opened()


@pytest.mark.parametrize("size", [0, 1, 1000, 20_000, 300_000, 2_000_000])
def test_arrays_travel_both_ways_unchanged(pool: Pool, size: int) -> None:
    array = np.arange(size, dtype=np.float64)
    back = pool.submit(sent(same), (array,)).result(30)
    assert back.dtype == array.dtype and np.array_equal(back, array)
    back += 1  # it is the caller's own
    assert np.array_equal(pool.submit(sent(same), ([{"a": array}, array],)).result(30)[0]["a"], array)


def test_arrays_of_every_kind_travel(pool: Pool) -> None:
    base = np.arange(200_000, dtype=np.int32).reshape(400, 500)
    kinds = [
        base.T,
        base[::2, ::3],
        np.asfortranarray(base),
        base.astype("U3")[:50],
        np.array([{"x": 1}, None], dtype=object),
        np.zeros((0, 7)),
        base.astype(">i8"),
    ]
    for kind in kinds:
        back = pool.submit(sent(same), (kind,)).result(30)
        assert back.dtype == kind.dtype and np.array_equal(back, kind)


def test_large_bytes_text_and_json_travel(pool: Pool) -> None:
    data = os.urandom(3_000_000)
    assert pool.submit(sent(same), (data,)).result(30) == data
    assert pool.submit(sent(same), (bytearray(data),)).result(30) == bytearray(data)
    rows = [{"number": number, "text": "x" * 20} for number in range(20_000)]
    assert pool.submit(sent(same, "json"), (rows,)).result(30) == rows


def test_an_argument_may_be_changed_as_soon_as_the_call_is_submitted(pool: Pool) -> None:
    array = np.ones(500_000)
    futures = []
    for number in range(20):
        array[:] = number
        futures.append(pool.submit(sent(total), (array,)))
    array[:] = -1
    assert get(futures) == [number * 500_000.0 for number in range(20)]


def test_a_result_that_is_held_is_never_overwritten(pool: Pool) -> None:
    making = sent(filled)
    held = [pool.submit(making, (100_000, number)).result(30) for number in range(40)]
    for number in range(40):
        pool.submit(making, (100_000, -number)).result(30)
    for number, array in enumerate(held):
        assert (array == number).all()
    part = held[7][10:20]
    del held
    gc.collect()
    for number in range(40):
        pool.submit(making, (100_000, -number)).result(30)
    assert (part == 7).all()


def test_an_argument_that_the_worker_keeps_is_never_overwritten(opened: Opener) -> None:
    def keep(array: Any) -> float:
        import sys

        kept = sys.__dict__.setdefault("kept_by_the_test", [])
        kept.append(array[5:])
        return float(sum(one[0] for one in kept))

    pool, expected = opened(1), 0.0
    keeping = sent(keep)
    for number in range(30):
        expected += number
        assert pool.submit(keeping, (np.full(50_000, float(number)),)).result(30) == expected


def test_memory_is_used_again_and_given_up(pool: Pool) -> None:
    before, making = ours(), sent(filled)
    for number in range(200):
        assert pool.submit(making, (200_000, number)).result(30)[0] == number
        assert pool.submit(sent(total), (np.ones(200_000),)).result(30) == 200_000
    gc.collect()
    assert ours() - before < 20
    pool.close()
    del pool
    gc.collect()
    assert ours() - before < 20


def test_what_finds_no_shared_memory_travels_in_the_message(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    gc.collect()
    before = ours()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        assert pool.submit(sent(total), (filled(100_000, 2.0),)).result(30) == 200_000.0
    for value in (3.0, 4.0):
        assert pool.submit(sent(total), (filled(100_000, value),)).result(30) == value * 100_000
    pool.close()
    gc.collect()
    assert ours() <= before


def test_values_never_asked_for_are_let_go(pool: Pool) -> None:
    making = sent(filled)
    for _ in range(60):
        pool.submit(making, (500_000, 1.0)).wait(30)
    gc.collect()
    pool.submit(sent(same), (1,)).result(30)
    workers = [line.pid for line in pool.lines.values()]
    eventually(lambda: all(shared_memory_of(worker) < 40 for worker in workers))


def test_a_value_goes_from_worker_to_worker_without_coming_here(pool: Pool) -> None:
    making, adding = sent(filled), sent(total)
    big = pool.submit(making, (1_000_000, 2.0))
    sums = [pool.submit(adding, (big,)) for _ in range(8)]
    inside = pool.submit(sent(lambda many: float(many["x"][0].sum())), ({"x": [big]},))
    assert get(sums) == [2_000_000.0] * 8 and inside.result(30) == 2_000_000.0
    assert big.outcome is None  # nobody has unpacked it here
    assert big.result()[0] == 2.0
    assert pool.submit(adding, (big,)).result(30) == 2_000_000.0  # and again once it has been


def test_a_chain_of_large_values_holds_no_more_than_it_must(pool: Pool) -> None:
    def plus_one(array: Any) -> Any:
        return array + 1

    value: Future = pool.submit(sent(filled), (500_000, 0.0))
    adding = sent(plus_one)
    for _ in range(50):
        value = pool.submit(adding, (value,))
    assert value.result(60)[123] == 50.0
    gc.collect()
    eventually(lambda: all(shared_memory_of(line.pid) < 30 for line in pool.lines.values()))


def test_a_death_gives_back_what_the_dead_had(pool: Pool, tmp_path: Path) -> None:
    def die(array: Any) -> None:
        os._exit(5)

    for _ in range(6):
        assert pool.submit(sent(die), (np.ones(300_000),)).exception(30) is not None
    assert pool.submit(sent(total), (np.ones(300_000),)).result(30) == 300_000
    gc.collect()
    assert ours() < 20


def test_values_over_a_stream_that_shares_no_memory(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    from flow_core.providers.local_sessions import LocalSessions

    monkeypatch.setattr(LocalSessions, "shares_memory", False)
    pool = opened()
    before = ours()
    array = np.arange(1_000_000, dtype=np.float64)
    big = pool.submit(sent(same), (array,))
    assert np.array_equal(big.result(30), array)
    assert pool.submit(sent(total), (big,)).result(30) == array.sum()
    later = pool.submit(sent(filled), (400_000, 3.0))
    assert pool.submit(sent(total), ([later, later][0],)).result(30) == 1_200_000
    assert ours() == before
