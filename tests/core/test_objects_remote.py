"""Objects in other storages: S3 as a server over a socket, and what fsspec has in memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from flow_core import Flow, config, objects
from flow_core.errors import ConfigError, ObjectError, ObjectNotFoundError, ProviderUnavailable
from flow_core.objects import Objects

BUCKET = "s3://a-bucket/some/objects"


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 with one bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).with_name("moto_server")
    with open(tmp_path_factory.mktemp("s3") / "log", "wb") as log:
        server = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3(home: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file system, with an empty bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("FLOW_OBJECTS_STORAGE", BUCKET)
    fsspec.config.conf.pop("s3", None)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    if system.exists("a-bucket"):
        system.rm("a-bucket", recursive=True)
    system.mkdir("a-bucket")
    return system


@pytest.fixture(params=[BUCKET, "memory://some/objects"])
def storage(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(file system, where the objects lie in it) of either kind."""
    if request.param == BUCKET:
        yield request.getfixturevalue("s3"), "a-bucket/some/objects"
        return
    monkeypatch.setenv("FLOW_OBJECTS_STORAGE", request.param)
    system = fsspec.filesystem("memory")
    yield system, "/some/objects"
    system.rm("/some", recursive=True)


def test_a_value_goes_and_comes_back(storage: Any) -> None:
    system, base = storage
    value = {"weights": np.arange(300_000.0)}
    ref = objects.put(value, codec="pickle", max_age_s=60)
    assert system.size(f"{base}/for-60s/{ref.sha256[:2]}/{ref.sha256}.pickle") == ref.size_bytes
    assert np.array_equal(objects.get(ref, allow_pickle=True)["weights"], value["weights"])
    assert objects.get(objects.put([1, None])) == [1, None]
    assert objects.get(objects.put(b"")) == b""


def test_what_is_gone_cut_or_altered_is_told_apart(storage: Any) -> None:
    system, base = storage
    ref = objects.put(b"0123456789")
    path = f"{base}/{ref.uri.partition('some/objects/')[2]}"
    system.pipe_file(path, b"01234")
    with pytest.raises(ObjectError, match="has 5 bytes in place of 10"):
        objects.get(ref)
    system.pipe_file(path, b"9876543210")
    with pytest.raises(ObjectError, match="its hash is another"):
        objects.get(ref)
    objects.put(b"0123456789")
    assert objects.get(ref) == b"0123456789"
    objects.delete(ref)
    objects.delete(ref)
    with pytest.raises(ObjectNotFoundError, match="there is no object"):
        objects.get(ref)


def test_clear_removes_what_is_past_its_lifetime_and_nothing_else(storage: Any) -> None:
    system, base = storage
    system.pipe_file(f"{base}/for-60s/mine.txt", b"x")
    short, long = objects.put("short", max_age_s=60), objects.put("long", max_age_s=float("inf"))
    assert objects.clear() == 0
    later = Objects(config.load(), now=lambda: time.time() + 120)
    assert later.clear() == 1
    with pytest.raises(ObjectNotFoundError):
        objects.get(short)
    assert objects.get(long) == "long"
    assert later.clear(older_than_s=10) == 1
    assert system.exists(f"{base}/for-60s/mine.txt")


def test_a_reference_is_copied_between_a_folder_and_the_storage(storage: Any, tmp_path: Path) -> None:
    folder = f"file://{tmp_path}/folder"
    ref = objects.put(objects.put({"a": 1}, storage=folder), objects={"trusted": [folder]})
    assert objects.get(ref) == {"a": 1}
    back = objects.put(ref, storage=folder)
    assert objects.get(back, storage=folder) == {"a": 1}


def test_a_call_gets_the_value_and_its_machine_needs_neither_fsspec_nor_a_key(
    storage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "use.py").write_text(
        "import os\ndef f(data, more):\n    return len(data), more['x'], sorted(k for k in os.environ if 'AWS' in k)\n"
    )
    flow = Flow("local")
    data, more = objects.put(b"x" * 3_000_000), objects.put({"y": 2})
    task = flow.invoke_async(tmp_path / "use.py", "f", args=[data], kwargs={"more": {"x": more}})
    assert task.get_result(60) == [3_000_000, {"y": 2}, []]
    home = config.load().objects.home
    assert [path for path in home.rglob("*") if path.is_file()] == []  # what was fetched for the call is gone


def test_a_storage_that_refuses_says_why(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the storage s3://no-such-bucket/x does not exist"):
        objects.put(1, storage="s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.clear_instance_cache()
    with pytest.raises(ProviderUnavailable, match="the storage s3://a-bucket/x does not answer"):
        objects.put(1, storage="s3://a-bucket/x")
    s3.clear_instance_cache()


MISSING = """
import sys
sys.modules[sys.argv[1]] = None
from flow_core import objects
try:
    objects.put(1, storage=sys.argv[2])
except objects.config.ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "storage", "extra"),
    [("s3fs", "s3://bucket/x", "flow-gpu[s3]"), ("fsspec", "memory://x", "flow-gpu[fsspec]")],
)
def test_a_package_that_is_missing_is_named(home: Path, package: str, storage: str, extra: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISSING, package, storage], capture_output=True, text=True, check=True
    )
    assert extra in done.stdout


def test_nothing_of_fsspec_is_imported_before_it_is_needed(home: Path) -> None:
    code = (
        "import sys, flow_core\nfrom flow_core import objects\n"
        "objects.get(objects.put([1]))\nassert not {'fsspec', 's3fs', 'cloudpickle', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
