"""put, get, delete and clear on folders: real files, racing and killed processes, damage, forged references."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core import config, objects
from flow_core.errors import (
    ConfigError,
    ObjectError,
    ObjectNotFoundError,
    SerializationError,
    ValidationError,
)
from flow_core.object_ref import ObjectRef, StoredFile
from flow_core.objects import Objects

DAY_S = 86400.0


class Pair:
    """A class that only this file knows."""

    def __init__(self, a: int) -> None:
        self.a = a


class Clock:
    """The time of the system, moved on by hand."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(home: Path, clock: Clock) -> Objects:
    return Objects(config.load(), now=clock)


def path_of(ref: ObjectRef) -> Path:
    return Path(ref.uri.removeprefix("file://"))


# ------------------------------------------------------------ values


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None]}, "text é", 0, [], None, False])
def test_a_json_value_comes_back_as_it_was(home: Path, value: Any) -> None:
    ref = objects.put(value)
    assert (ref.codec, objects.get(ref)) == ("json", value)
    assert objects.get(json.loads(json.dumps(ref))) == value


@pytest.mark.parametrize("value", [b"", b"\0\xff", bytearray(b"abc"), memoryview(b"abcdef")[::2]])
def test_bytes_stay_bytes(home: Path, value: Any) -> None:
    ref = objects.put(value if isinstance(value, (bytes, bytearray)) else bytes(value))
    assert (ref.codec, objects.get(ref)) == ("bytes", bytes(value))
    assert ref.size_bytes == len(bytes(value))


def test_arrays_come_back_writable_and_whole(home: Path) -> None:
    value = {
        "large": np.arange(100_000.0).reshape(100, 1000),
        "fortran": np.asfortranarray(np.arange(40_000).reshape(200, 200)),
        "strided": np.arange(100_000)[::2],
        "small": np.ones(3),
        "empty": np.empty((0, 3)),
    }
    made = objects.get(objects.put(value, codec="pickle"), allow_pickle=True)
    for name, array in value.items():
        assert np.array_equal(made[name], array) and made[name].dtype == array.dtype
        made[name][...] = 7


def test_an_array_is_not_written_twice(home: Path) -> None:
    ref = objects.put(np.ones(1_000_000), codec="pickle")
    assert 8_000_000 <= ref.size_bytes < 8_001_000


def test_a_value_of_a_class_of_the_users_is_one_of_that_class_again(home: Path) -> None:
    made = objects.get(objects.put(Pair(3), codec="pickle"), allow_pickle=True)
    assert type(made) is Pair and made.a == 3


def test_a_pickle_is_only_loaded_where_that_is_asked_for(home: Path) -> None:
    ref = objects.put({1, 2}, codec="pickle")
    with pytest.raises(ObjectError, match="is a pickle") as caught:
        objects.get(ref)
    assert "allow_pickle=True" in str(caught.value)
    assert objects.get(ref, allow_pickle=True) == {1, 2}


def test_what_cannot_be_stored_is_named_with_the_way_out(home: Path) -> None:
    with pytest.raises(SerializationError, match=r"value\['x'\]\[1\] is a set.*\n.*codec=\"pickle\""):
        objects.put({"x": [1, {2}]})
    with pytest.raises(SerializationError, match=r"value\['lock'\] is a _thread.lock"):
        objects.put({"lock": __import__("threading").Lock()}, codec="pickle")
    with pytest.raises(SerializationError, match="is a str and no bytes"):
        objects.put("text", codec="bytes")
    with pytest.raises(ValidationError, match="codec='dill'"):
        objects.put(1, codec="dill")  # type: ignore[arg-type]


def test_a_reference_inside_a_value_stays_a_reference(home: Path) -> None:
    inner = objects.put("inner")
    made = objects.get(objects.put({"ref": inner, "also": [inner]}, codec="pickle"), allow_pickle=True)
    assert type(made["ref"]) is ObjectRef and made["also"] == [inner]
    assert objects.get(objects.put([inner])) == [inner]


def test_code_of_another_python_is_not_loaded(home: Path) -> None:
    ref = objects.put(lambda: 1, codec="pickle")
    data = bytearray(path_of(ref).read_bytes())
    data[8:10] = struct.pack("BB", 3, 7)
    with pytest.raises(ObjectError, match=r"functions or classes of Python 3\.7, and this is Python"):
        objects.get(forged(home, bytes(data), "pickle"), allow_pickle=True)


@pytest.mark.parametrize("cut", [9, 17, 60, 200])
def test_a_pickle_whose_parts_do_not_fit_is_damaged_and_not_loaded(home: Path, cut: int) -> None:
    data = path_of(objects.put(np.ones(50_000), codec="pickle")).read_bytes()
    with pytest.raises(ObjectError):
        objects.get(forged(home, data[:cut], "pickle"), allow_pickle=True)


def forged(home: Path, data: bytes, codec: Any) -> ObjectRef:
    """What `data` would look like if `put` had written it."""
    ref = objects.put(data, codec="bytes")
    path = path_of(ref).rename(path_of(ref).with_suffix(f".{codec}"))
    return ObjectRef(
        **{**{k: v for k, v in ref.items() if k != "flow/ref"}, "codec": codec, "uri": f"file://{path}"}
    )


# ------------------------------------------------------------ files


def test_an_object_is_for_its_owner_only_and_named_by_its_content(home: Path) -> None:
    os.umask(0)
    try:
        ref = objects.put([1])
    finally:
        os.umask(0o022)
    path = path_of(ref)
    assert path.name == f"{ref.sha256}.json" and path.read_bytes() == b"[1]"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    root = config.load().objects.home
    for folder in (path.parent, path.parent.parent, root):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert objects.put([1]).sha256 == ref.sha256
    assert [one.name for one in root.rglob("*.json")] == [path.name]


RACER = """
import sys, time
from flow_core import objects
while time.time() < float(sys.argv[1]): pass
for _ in range(20):
    ref = objects.put(b"x" * 3_000_000)
    assert len(objects.get(ref)) == 3_000_000
print(ref.uri)
"""


def test_processes_that_put_the_same_content_at_once_make_one_file(home: Path) -> None:
    start = str(time.time() + 1.0)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, start], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {racer.communicate(timeout=60)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(said) == 1
    files = [path for path in config.load().objects.home.rglob("*") if path.is_file()]
    assert sorted(path.suffix or path.name for path in files) == [".bytes", ".lock", ".swept"]


KILLED = """
import os, sys
from flow_core import objects, object_storage
def write_and_die(path, pieces, mode=0o600):
    with open(path, "wb") as file:
        file.write(b"half of it")
    os.kill(os.getpid(), 9)
object_storage.write_file = write_and_die
objects.put(b"all of it")
"""


def test_a_put_that_is_killed_leaves_no_object_and_its_draft_is_cleared(
    home: Path, store: Objects, clock: Clock
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert done.returncode == -signal.SIGKILL
    root = config.load().objects.home
    assert [path.suffix for path in root.rglob("*.bytes")] == []
    assert len(list(root.rglob(".new-*"))) == 1
    assert store.clear() == 0 and len(list(root.rglob(".new-*"))) == 1  # it may still be writing
    clock.ahead = 2 * DAY_S
    assert store.clear() == 0 and list(root.rglob(".new-*")) == []


def test_a_folder_that_cannot_be_written_says_so(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ObjectError, match="could not be written to"):
        objects.put(1, storage=f"file://{tmp_path}/file")


# ------------------------------------------------------------ damage and loss


def test_a_file_that_is_cut_or_longer_is_refused_with_both_sizes(home: Path) -> None:
    ref = objects.put(b"0123456789")
    for content, says in ((b"01234", "has 5 bytes in place of 10"), (b"x" * 11, "has 11 bytes")):
        path_of(ref).write_bytes(content)
        with pytest.raises(ObjectError, match=says):
            objects.get(ref)


def test_a_file_with_other_content_is_refused(home: Path) -> None:
    ref = objects.put(b"0123456789" * 300_000)
    with open(path_of(ref), "r+b") as file:
        file.seek(2_000_000)
        file.write(b"!")
    with pytest.raises(ObjectError, match="does not hold what was written: its hash is another"):
        objects.get(ref)
    assert (
        objects.get(objects.put(b"0123456789" * 300_000)) == b"0123456789" * 300_000
    )  # to put it again heals


def test_neither_a_pipe_nor_a_link_nor_a_folder_is_opened(home: Path, tmp_path: Path) -> None:
    ref = objects.put(b"abc")
    path, elsewhere = path_of(ref), tmp_path / "elsewhere"
    elsewhere.write_bytes(b"abc")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ObjectError, match="is no file"):
        objects.get(ref)
    path.unlink()
    path.symlink_to(elsewhere)
    with pytest.raises(ObjectError, match="cannot be opened"):
        objects.get(ref)
    path.unlink()
    path.mkdir()
    with pytest.raises(ObjectError, match="is no file"):
        objects.get(ref)


def test_an_object_that_is_gone_says_so(home: Path) -> None:
    ref = objects.put("x")
    objects.delete(ref)
    objects.delete(ref)
    with pytest.raises(ObjectNotFoundError, match="there is no object file://"):
        objects.get(ref)


# ------------------------------------------------------------ lifetimes


def test_an_object_is_kept_for_as_long_as_was_asked_since_it_was_last_put(
    store: Objects, clock: Clock
) -> None:
    ref = store.put("x", max_age_s=100)
    assert ref.expires_at == pytest.approx(clock() + 100, abs=5)
    clock.ahead = 90
    assert store.clear() == 0
    assert store.get(ref) == "x"
    clock.ahead = 110
    os.utime(path_of(ref), (clock() - 20, clock() - 20))  # as another put would have done twenty seconds ago
    assert store.clear() == 0
    os.utime(path_of(ref), (clock() - 110, clock() - 110))
    assert store.clear() == 1
    with pytest.raises(
        ObjectNotFoundError, match=r"expired on 20\d\d-\d\d-\d\d \d\d:\d\d UTC and has been removed"
    ):
        store.get(ref)


def test_a_put_of_the_same_content_makes_it_new(store: Objects) -> None:
    ref = store.put("x")
    os.utime(path_of(ref), (1.0, 1.0))
    assert store.put("x").uri == ref.uri
    assert path_of(ref).stat().st_mtime > 1_000_000_000


def test_the_lifetime_is_that_of_the_settings_unless_given(home: Path, clock: Clock) -> None:
    store = Objects(config.load(objects={"max_age_days": 2}), now=clock)
    expires = store.put("x").expires_at
    assert expires == pytest.approx(clock() + 2 * DAY_S, abs=5)
    assert store.put("x", max_age_s=math.inf).expires_at is None
    clock.ahead = 400 * DAY_S
    assert store.clear() == 1
    assert store.get(store.put("y", max_age_s=math.inf)) == "y"
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValidationError, match="max_age_s="):
            store.put("x", max_age_s=wrong)


def test_clear_removes_what_is_older_and_never_what_is_not_ours(store: Objects, clock: Clock) -> None:
    kept, old = store.put("kept", max_age_s=math.inf), store.put("old", max_age_s=math.inf)
    root = store.settings.objects.home
    strangers = [root / "mine.txt", path_of(old).with_name("mine.txt"), root / "for-ever/zz.json"]
    for stranger in strangers:
        stranger.write_text("x")
        os.utime(stranger, (1.0, 1.0))
    os.utime(path_of(old), (clock() - 1000, clock() - 1000))
    assert store.clear(older_than_s=500) == 1
    assert all(stranger.exists() for stranger in strangers)
    assert store.get(kept) == "kept"
    with pytest.raises(ObjectNotFoundError):
        store.get(old)


CLEARS = """
from flow_core import objects
print("ready", flush=True)
while True:
    objects.clear(older_than_s=1000)
"""


def test_what_is_put_again_while_it_is_cleared_stays(home: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", CLEARS], stdout=subprocess.PIPE) as clearing:
        try:
            assert clearing.stdout is not None and clearing.stdout.readline()
            for _ in range(300):
                ref = objects.put(b"x")
                assert objects.get(ref) == b"x"
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path_of(ref), (1.0, 1.0))
        finally:
            clearing.kill()


def test_the_own_folder_is_swept_by_the_puts_once_an_hour(store: Objects, clock: Clock) -> None:
    store.put("first")
    ref = store.put("x", max_age_s=10)
    clock.ahead = 60
    store.put("second")
    assert path_of(ref).exists()
    clock.ahead = 3700
    store.put("third")
    assert not path_of(ref).exists()


# ------------------------------------------------------------ storages


def test_a_shared_folder_is_readable_by_others_and_needs_to_be_trusted(home: Path, tmp_path: Path) -> None:
    shared = f"file://{tmp_path}/a shared; folder"
    ref = objects.put([1], storage=shared)
    assert ref.uri.startswith(shared + "/")
    assert stat.S_IMODE(path_of(ref).stat().st_mode) == 0o644
    with pytest.raises(ObjectError, match="which is no storage of these settings") as caught:
        objects.get(ref)
    assert "trusted" in str(caught.value) and shared in str(caught.value)
    assert objects.get(ref, storage=shared) == objects.get(ref, storage=shared + "/") == [1]
    assert objects.get(ref, storage=str(tmp_path / "a shared; folder")) == [1]
    assert objects.get(ref, objects={"trusted": [shared]}) == [1]
    assert objects.get(ref, objects={"storage": shared}) == [1]
    with pytest.raises(ObjectError, match="no storage of these settings"):
        objects.delete(ref)
    objects.delete(ref, storage=shared)
    assert not path_of(ref).exists()


def test_the_storage_of_the_settings_is_where_objects_go(home: Path, tmp_path: Path) -> None:
    shared = f"file://{tmp_path}/shared"
    ref = objects.put([1], objects={"storage": shared})
    assert isinstance(ref.place, StoredFile) and ref.place.root == shared
    assert objects.clear(objects={"storage": shared}, older_than_s=0) in (0, 1)


def test_a_reference_is_copied_from_storage_to_storage(home: Path, tmp_path: Path) -> None:
    shared = f"file://{tmp_path}/shared"
    ref = objects.put(np.arange(1_000_000), codec="pickle")
    moved = objects.put(ref, storage=shared)
    assert (moved.sha256, moved.codec, moved.size_bytes) == (ref.sha256, ref.codec, ref.size_bytes)
    objects.delete(ref)
    assert objects.get(moved, storage=shared, allow_pickle=True)[-1] == 999_999


def test_a_damaged_object_is_not_copied(home: Path, tmp_path: Path) -> None:
    ref = objects.put(b"0123456789")
    path_of(ref).write_bytes(b"9876543210")
    with pytest.raises(ObjectError, match="its hash is another"):
        objects.put(ref, storage=f"file://{tmp_path}/shared")
    assert [path for path in (tmp_path / "shared").rglob("*") if path.is_file()] == []


def test_a_storage_that_cannot_be_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="ObjectSettings.storage must be a URL"):
        objects.put(1, objects={"storage": "bucket"})
    with pytest.raises(ConfigError, match="nonsense://x cannot be used"):
        objects.put(1, storage="nonsense://x")
    with pytest.raises(ConfigError, match="max_age_days"):
        objects.put(1, objects={"max_age_days": 0})


def test_a_forged_reference_leads_nowhere(home: Path, tmp_path: Path) -> None:
    """Somebody who can write an XCom knows a file's hash, and wants it read from where it lies."""
    ref = objects.put(b"secret", storage=f"file://{tmp_path}/theirs")
    for forged_uri in (
        ref.uri.replace("file://", f"file://{config.load().objects.home}/..", 1),
        ref.uri.replace("file://", "local://", 1),
        ref.uri.replace("file://", "http://127.0.0.1:1", 1),
    ):
        with pytest.raises((ValidationError, ObjectError)):
            objects.get({**ref, "uri": forged_uri})
