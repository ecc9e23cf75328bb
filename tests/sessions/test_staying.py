"""Large values between calls whose workers share no memory with the client: they stay there, as files of the task."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core import Flow, Runner
from flow_core.definitions import CallOptions, Retries
from flow_core.dispatch import Pool
from flow_core.errors import ResourceNotFoundError, TaskExecutionError
from flow_core.futures import Future
from tests.sessions.conftest import Link, Opener, eventually, sent
from tests.sessions.test_dispatch import add, nap
from tests.sessions.test_losses import AGAIN, lose_machine

LARGE = 3_000_000

STAYS = CallOptions(stays=True)
"""Whatever comes first, the value or a call that takes it."""


def made(size: int, go: str = "") -> Any:
    import os
    import time

    while go and not os.path.exists(go):
        time.sleep(0.005)
    return np.full(size, 7, dtype=np.uint8)


def text(size: int) -> str:
    return "ä" * size


def total(*parts: Any) -> int:
    return sum(int(part.sum()) for part in parts)


def dies_once(path: str, array: Any) -> int:
    import os

    if not os.path.exists(path):
        open(path, "w").close()
        os._exit(3)
    return int(array.sum())


@pytest.fixture
def pool(link: Link, opened: Opener) -> Pool:
    pool = opened()
    assert pool.submit(sent(add), (1, 1)).result(30) == 2
    link.carried = 0
    return pool


def files(pool: Pool, home: Path) -> list[str]:
    _, digest, attempt = pool.task_id.rsplit("-", 2)
    folder = home / "tasks" / digest / attempt / "calls"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def test_a_large_value_goes_from_call_to_call_without_passing_through_the_client(
    pool: Pool, link: Link, home: Path, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    first, second = (pool.submit(sent(made), (LARGE, str(go))) for _ in range(2))
    both = pool.submit(sent(total), (first, second))
    go.touch()
    assert both.result(30) == 2 * 7 * LARGE
    assert pool.submit(sent(total), (first,)).result(30) == 7 * LARGE
    assert link.carried < 100_000
    assert len(files(pool, home)) == 2


def test_json_values_stay_as_well(pool: Pool, link: Link) -> None:
    long = pool.submit(sent(text, "json"), (LARGE // 2,), options=STAYS)
    assert pool.submit(sent(len, "json"), (long,)).result(30) == LARGE // 2
    assert link.carried < 100_000
    assert long.result(30) == "ä" * (LARGE // 2)


def test_who_asks_for_the_value_gets_it_and_it_is_dropped_there(pool: Pool, link: Link, home: Path) -> None:
    array = pool.submit(sent(made), (LARGE,), options=STAYS)
    size = pool.submit(sent(total), (array,))
    assert size.result(30) == 7 * LARGE
    value = array.result(30)
    assert value.shape == (LARGE,) and value.sum() == 7 * LARGE
    assert array.result() is value
    eventually(lambda: files(pool, home) == [])
    value[0] = 8  # it is the caller's own, and goes as it is now
    assert pool.submit(sent(total), (array,)).result(30) == 7 * LARGE + 1


def test_a_value_that_nobody_can_ask_for_any_more_is_dropped(pool: Pool, home: Path) -> None:
    for _ in range(4):
        assert (
            pool.submit(sent(total), (pool.submit(sent(made), (LARGE,), options=STAYS),)).result(30)
            == 7 * LARGE
        )
    gc.collect()
    eventually(lambda: files(pool, home) == [])


def test_small_values_and_those_that_nobody_waits_for_are_sent_at_once(pool: Pool, home: Path) -> None:
    assert pool.submit(sent(total), (pool.submit(sent(made), (1000,)),)).result(30) == 7000
    assert pool.submit(sent(made), (LARGE,)).result(30).shape == (LARGE,)
    assert files(pool, home) == []


def test_a_call_can_be_told_that_its_value_stays_while_it_runs(
    pool: Pool, link: Link, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    array = pool.submit(sent(made), (LARGE, str(go)))
    eventually(lambda: array.status == "running")
    size = pool.submit(sent(total), (array,))
    go.touch()
    assert size.result(30) == 7 * LARGE
    assert link.carried < 100_000


def test_a_reference_is_made_without_bringing_the_value(
    pool: Pool, link: Link, flow: Flow, home: Path
) -> None:
    array = pool.submit(sent(made), (LARGE,), options=STAYS)
    ref = array.object_ref(30)
    assert link.carried < 100_000
    assert ref.size_bytes > LARGE and ref.codec == "pickle"
    del array
    gc.collect()
    assert pool.submit(sent(total), (ref,)).result(30) == 7 * LARGE
    assert flow.objects.get(ref, allow_pickle=True).sum() == 7 * LARGE


def test_others_find_a_value_that_stayed_by_the_id_of_its_call(pool: Pool, flow: Flow, home: Path) -> None:
    array = pool.submit(sent(made), (LARGE,), options=STAYS)
    assert pool.submit(sent(total), (array,)).result(30) == 7 * LARGE
    call_id = array.id
    array.result(30)
    pool.submit(sent(add), (1, 2)).result(30)
    del array
    gc.collect()
    found = Future.from_id(call_id, serialization="pickle", local={"home": home})
    assert found.result(30).sum() == 7 * LARGE


def test_a_call_in_another_session_gets_the_value_through_here(
    pool: Pool, opened: Opener, home: Path
) -> None:
    other, ordered = opened(), opened(workers=1, ordered=True)
    array = pool.submit(sent(made), (LARGE,), options=STAYS)
    here = pool.submit(sent(total), (array,))
    there = other.submit(sent(total), (array,))
    in_turn = [ordered.submit(sent(total), (array,)), ordered.submit(sent(add), (1, 2))]
    assert here.result(30) == there.result(30) == in_turn[0].result(30) == 7 * LARGE
    assert in_turn[1].result(30) == 3


def test_without_room_on_the_machine_the_value_is_sent(pool: Pool, home: Path) -> None:
    _, digest, attempt = pool.task_id.rsplit("-", 2)
    (home / "tasks" / digest / attempt / "calls").write_text("in the way")
    array = pool.submit(sent(made), (LARGE,), options=STAYS)
    assert pool.submit(sent(total), (array,)).result(30) == 7 * LARGE
    assert array.result(30).shape == (LARGE,)


def test_a_value_outlives_its_worker_and_serves_a_second_attempt(pool: Pool, tmp_path: Path) -> None:
    array = pool.submit(sent(made), (LARGE,), options=STAYS)
    retried = CallOptions(retries=Retries(lost=1, delay_s=0.05))
    size = pool.submit(sent(dies_once), (str(tmp_path / "died"), array), options=retried)
    assert size.result(30) == 7 * LARGE
    assert array.result(30).shape == (LARGE,)


def test_a_value_that_was_removed_there_is_an_error_that_says_so(pool: Pool, home: Path) -> None:
    array = pool.submit(sent(made), (LARGE,), options=STAYS)
    assert pool.submit(sent(total), (array,)).result(30) == 7 * LARGE
    _, digest, attempt = pool.task_id.rsplit("-", 2)
    for name in files(pool, home):
        (home / "tasks" / digest / attempt / "calls" / name).unlink()
    with pytest.raises(TaskExecutionError, match="not there any more"):
        pool.submit(sent(total), (array,)).result(30)
    with pytest.raises(ResourceNotFoundError):
        array.result(30)


def test_calls_of_a_session_that_was_begun_anew_get_what_stayed_with_the_one_before(
    pool: Pool, home: Path, tmp_path: Path
) -> None:
    array = pool.submit(sent(made), (LARGE,), options=STAYS)
    assert pool.submit(sent(total), (array,)).result(30) == 7 * LARGE
    holding = [pool.submit(sent(nap), (600,)) for _ in range(2)]
    eventually(lambda: all(one.status == "running" for one in holding))
    size = pool.submit(sent(total), (array,), options=AGAIN)
    lose_machine(home)
    assert size.result(30) == 7 * LARGE


def test_services_of_one_runner_hand_values_on_where_they_are(link: Link, flow: Flow, tmp_path: Path) -> None:
    class Holder:
        def __init__(self) -> None:
            self.array: Any = None

        def take(self, array: Any) -> int:
            self.array = array
            return int(array.sum())

    with Runner("staying", flow=flow, serialization="pickle") as runner:
        maker, holder = runner.service(made), runner.service(Holder)
        assert holder.take(maker(10)).get() == 70
        before = link.carried
        assert holder.take(maker(LARGE)).get() == 7 * LARGE
        assert link.carried - before < 100_000


def test_a_value_that_stayed_can_be_had_after_its_session_was_closed(link: Link, flow: Flow) -> None:
    with Runner("closed", flow=flow, serialization="pickle") as runner:
        array = runner.service(made)(LARGE)
        array.wait(30)
        assert link.carried < 100_000
    assert array.get(30).sum() == 7 * LARGE
