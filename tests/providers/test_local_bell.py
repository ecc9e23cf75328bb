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
    monkeypatch.setattr(FolderBell, "_spare", [])
    monkeypatch.chdir(tmp_path)
    flow = Flow("local")
    assert flow.provider.bell([]) is None
    flow.run("true", upload_code=False).wait(30)


def test_a_folder_that_is_not_there_and_an_id_that_is_none_have_no_bell(home: Path, tmp_path: Path) -> None:
    assert FolderBell.on([tmp_path / "nothing"]) is None
    assert Flow("local").provider.bell(["no id"]) is None


def heard_by(pid: int | str) -> int:
    """How many of the system's descriptors for hearing of files a process has."""
    links = [Path(f"/proc/{pid}/fd", name) for name in os.listdir(f"/proc/{pid}/fd")]
    return sum(link.is_symlink() and "inotify" in os.readlink(link) for link in links)


def test_a_process_takes_only_a_few_of_the_systems_and_keeps_one(tmp_path: Path) -> None:
    bells = []
    while (bell := FolderBell.on([tmp_path])) is not None:
        bells.append(bell)
    assert len(bells) == 8
    for bell in bells:
        bell.close()
    assert heard_by("self") == 1
    again = FolderBell.on([tmp_path])
    assert again is not None and heard_by("self") == 1
    again.close()


def test_who_listens_next_hears_nothing_of_what_was_before(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
    bell = FolderBell.on([first, tmp_path])
    assert bell is not None
    for moment in ("before", "after"):
        (first / moment).touch()
        (first / moment).rename(first / "exit.json")
        if moment == "before":
            bell.close()
            bell = FolderBell.on([second])
            assert bell is not None
        assert not bell.heard()
    (second / "draft").touch()
    (second / "draft").rename(second / "exit.json")
    assert bell.heard()
    second.rename(tmp_path / "gone")  # with what it listens to
    bell.close()


def test_a_forked_process_does_not_listen_with_its_parents(bell: FolderBell, tmp_path: Path) -> None:
    spare = FolderBell.on([tmp_path])
    assert spare is not None
    spare.close()
    pid = os.fork()
    if pid == 0:
        os._exit(heard_by("self"))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == heard_by("self") - 1
