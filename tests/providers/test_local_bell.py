"""The bell of local tasks: heard at once, and never in the way where there is none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flow_core import Flow
from flow_core.runner import bell as bells
from flow_core.runner.bell import FolderBell

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[FolderBell]:
    (tmp_path / "task").mkdir()
    made = FolderBell.on([tmp_path / "task"])
    assert made is not None
    yield made
    made.close()


def test_it_rings_when_the_exit_record_gets_its_name_and_for_nothing_else(
    tmp_path: Path, bell: FolderBell
) -> None:
    folder = tmp_path / "task"
    assert not bell.heard()
    (folder / "draft").write_text("{}")
    (folder / "draft").rename(folder / "started.json")
    assert not bell.heard()
    (folder / "reserve").write_text("{}")
    (folder / "reserve").rename(folder / "exit.json")
    assert bell.heard()
    assert not bell.heard()


def test_a_wait_hears_of_the_end_without_asking_again_and_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flow = Flow("local")
    asked = 0
    poll = flow.provider.poll

    def counted(ids: object) -> object:
        nonlocal asked
        asked += 1
        return poll(ids)  # type: ignore[arg-type]

    monkeypatch.setattr("flow_core.engine.SLICE_S", 30.0)
    task = flow.run("sleep 0.1", upload_code=False)
    monkeypatch.setattr(flow.provider, "poll", counted)
    task.wait(60)
    assert asked == 2


def test_where_there_is_none_a_wait_ends_all_the_same(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, *_: object) -> int:
        raise OSError(f"no {name}")

    monkeypatch.setattr(bells, "libc", missing)
    monkeypatch.chdir(tmp_path)
    flow = Flow("local")
    assert flow.provider.bell([]) is None
    flow.run("true", upload_code=False).wait(30)


def test_a_folder_that_is_not_there_and_an_id_that_is_none_have_no_bell(home: Path, tmp_path: Path) -> None:
    assert FolderBell.on([tmp_path / "nothing"]) is None
    assert Flow("local").provider.bell(["no id"]) is None


def test_a_process_takes_only_a_few_of_the_systems_and_gives_them_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    bells = []
    while (bell := FolderBell.on([tmp_path])) is not None:
        bells.append(bell)
    assert len(bells) == 8
    for bell in bells:
        bell.close()
    assert len(os.listdir("/proc/self/fd")) == before
    again = FolderBell.on([tmp_path])
    assert again is not None
    again.close()
