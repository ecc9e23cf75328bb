"""The claim of a task whose scheduler may start it again."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from flow_core.runner import proc, task


@pytest.fixture
def folder(tmp_path: Path) -> str:
    task.reserve(str(tmp_path))
    return str(tmp_path)


def owner(folder: str) -> tuple[str, int]:
    claimed = task.read_json(folder, "claimed")
    assert claimed is not None
    return claimed["job"], claimed["incarnation"]


def test_the_first_runner_gets_the_task_and_a_second_one_does_not(folder: str) -> None:
    assert task.claim_incarnation(folder, "17", 0)
    assert not task.claim_incarnation(folder, "17", 0)
    assert owner(folder) == ("17", 0)


def test_a_restart_takes_over_and_an_older_incarnation_does_not(folder: str) -> None:
    assert task.claim_incarnation(folder, "17", 0)
    assert task.claim_incarnation(folder, "17", 2)
    assert not task.claim_incarnation(folder, "17", 1)
    assert owner(folder) == ("17", 2)


def test_a_duplicated_job_leaves_also_when_it_was_restarted(folder: str) -> None:
    assert task.claim_incarnation(folder, "17", 0)
    for count in (0, 1, 2):
        assert not task.claim_incarnation(folder, "18", count)
    assert owner(folder) == ("17", 0)


def test_a_task_that_has_ended_is_not_started_again(folder: str) -> None:
    assert task.claim_incarnation(folder, "17", 0)
    assert task.finish(folder, task.exit_record("exit", code=0))
    assert not task.claim_incarnation(folder, "17", 1)


def test_a_task_that_was_cancelled_before_its_start_is_claimed_by_nobody_else(folder: str) -> None:
    assert task.claim_first(folder, proc.nobody())
    assert not task.claim_first(folder, proc.nobody())
    assert not task.claim_incarnation(folder, "17", 1)


def test_a_claim_leaves_no_drafts(folder: str) -> None:
    task.claim_incarnation(folder, "17", 0)
    task.claim_incarnation(folder, "17", 0)
    task.claim_incarnation(folder, "17", 1)
    names = sorted(path.name for path in Path(folder).iterdir())
    assert names == ["claimed", "incarnation.1", "reserve", "unclaimed"]


@pytest.mark.parametrize("count", [0, 1])
def test_of_racing_runners_of_one_incarnation_one_starts(folder: str, count: int) -> None:
    if count:
        task.claim_incarnation(folder, "17", 0)
    with multiprocessing.get_context("spawn").Pool(6) as pool:
        won = pool.starmap(task.claim_incarnation, [(folder, "17", count)] * 60, chunksize=1)
    assert won.count(True) == 1
