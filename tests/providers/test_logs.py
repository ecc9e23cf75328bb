"""How the bytes of one answer are shared out among many logs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flow_core.engine import Engine
from flow_core.ids import TaskId
from flow_core.models import LogChunk, LogPosition, Snapshot, TaskStatus
from flow_core.runner.logs import share
from flow_core.testing import FakeProvider


@given(st.lists(st.integers(0, 5000), max_size=50), st.integers(0, 100_000))
def test_a_share_is_never_more_than_wanted_and_never_nothing(sizes: list[int], limit: int) -> None:
    parts = share(sizes, limit)
    assert all(0 < part <= size or size == part == 0 for part, size in zip(parts, sizes, strict=True))
    assert sum(parts) <= max(limit, sum(size > 0 for size in sizes))
    assert sum(parts) == sum(sizes) or sum(parts) >= limit - len(sizes)


def test_the_small_get_all_and_the_large_the_same_each() -> None:
    assert share([10, 9000, 0, 40, 9000], 1050) == [10, 500, 0, 40, 500]


def test_a_provider_that_reads_one_by_one_shares_out_too() -> None:
    provider = FakeProvider()
    flood, quiet, nobody = (str(TaskId.first("task", key)) for key in "abc")
    provider.logs = {flood: b"x" * 1000, quiet: b"hello"}
    for one in (flood, quiet):
        provider.tasks[one] = Snapshot(task_id=one, name="", status=TaskStatus.COMPLETED)
    chunks = Engine(provider).read_logs([LogPosition(one) for one in (flood, nobody, quiet)], limit=300)
    assert chunks == {
        LogPosition(flood): LogChunk(b"x" * 100, 100, end=False),
        LogPosition(quiet): LogChunk(b"hello", 5, end=True),
    }
