"""Finding this machine's GPUs: the driver's own tool is asked, and its answer decides what can be had."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from flow_core import Flow, SpecRejected
from flow_core.providers.local_machine import Devices
from flow_core.runner.inventory import base_environment

T = TypeVar("T")


@pytest.fixture
def driver(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two H100, as far as `nvidia-smi` tells (its output as release 550 of the driver prints it)."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 81559'\necho '1, NVIDIA H100 80GB HBM3, 81559'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("FLOW_LOCAL_GPUS")
    return tool


def test_real_gpus_are_found_named_and_shared_out(driver: Path) -> None:
    flow = Flow("local")
    found = flow.find_instances({"gpu_type": "h100", "gpu_memory_gb": 80})
    assert [(one.instance_type, one.gpu_count, one.gpu_memory_gb, one.available) for one in found] == [
        ("1xh100", 1, 81, 2),
        ("2xh100", 2, 81, 1),
    ]
    task = flow.run('echo "$CUDA_VISIBLE_DEVICES"', gpu="2xh100", upload_code=False)
    task.wait(30)
    assert task.logs() == "0,1\n"
    assert flow.find_instances({"gpu_type": "a100"}) == []


def test_a_declaration_limits_real_gpus_and_cannot_add_any(driver: Path) -> None:
    assert Devices.of_this_machine(1).names == ("0",)
    assert Devices.of_this_machine(8).names == ("0", "1")
    with pytest.raises(SpecRejected, match="asks for 8 GPUs, and this machine has 2") as caught:
        Flow("local").run("true", gpu="8xh100", upload_code=False)
    assert "FLOW_LOCAL_GPUS" not in str(caught.value), "real GPUs are not conjured up"


def test_memory_is_compared_with_what_the_gpu_has(driver: Path) -> None:
    flow = Flow("local")
    flow.run("true", min_gpu_memory_gb=80, upload_code=False).wait(30)
    with pytest.raises(
        SpecRejected, match=r"min_gpu_memory_gb=141 is more than this machine's h100 has \(81 GB\)"
    ):
        flow.run("true", min_gpu_memory_gb=141, upload_code=False)


@pytest.mark.parametrize(
    "answer",
    ["echo 'No devices were found'", "exit 9", "echo garbage, with, too, many, commas", "kill -9 $$"],
)
def test_a_driver_that_does_not_answer_means_no_gpu(driver: Path, answer: str) -> None:
    driver.write_text(f"#!/bin/sh\n{answer}\n")
    assert Devices.of_this_machine(None).names == ()
    assert Devices.of_this_machine(2).real is False


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_models_get_their_short_names(driver: Path, name: str, model: str) -> None:
    driver.write_text(f"#!/bin/sh\necho '0, {name}, 40960'\n")
    assert Devices.of_this_machine(None).model == model


def test_the_environment_of_a_task_keeps_what_describes_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    env = base_environment("/opt/python/bin/python3")
    assert env["PATH"].split(os.pathsep)[0] == "/opt/python/bin"
    assert env["LC_ALL"] == "C.UTF-8"
    assert "hunter2" not in env.values()


USE = """#!/bin/sh
case "$*" in
  *utilization.gpu*--id=0,1) echo '80, 1000'; echo '40, 3000' ;;
  *) echo '0, NVIDIA H100 80GB HBM3, 81559'; echo '1, NVIDIA H100 80GB HBM3, 81559' ;;
esac
"""


def test_how_busy_the_gpus_were_is_known_at_the_end(driver: Path) -> None:
    driver.write_text(USE)
    task = Flow("local").run("sleep 2.5", gpu="2xh100", upload_code=False)
    task.wait(30)
    assert task.snapshot.gpu_utilization_percent == 60
    assert task.snapshot.peak_gpu_memory_bytes == 3000 * 1024 * 1024
    assert task.snapshot.status.succeeded


def test_a_driver_that_does_not_answer_neither_fails_nor_delays_a_task(driver: Path) -> None:
    flow = Flow("local")
    started = flow.run("sleep 1.5", gpu="1xh100", upload_code=False)
    driver.write_text("#!/bin/sh\nsleep 60\n")
    started.wait(10)
    assert started.snapshot.status.succeeded
    assert started.snapshot.gpu_utilization_percent is None
    assert started.snapshot.ended_at is not None and started.snapshot.started_at is not None
    assert (started.snapshot.ended_at - started.snapshot.started_at).total_seconds() < 5


def test_the_gpus_of_a_task_are_free_at_its_end_whatever_looked_at_them(driver: Path) -> None:
    driver.write_text(USE.replace("echo '80, 1000'", "sleep 20; echo '80, 1000'"))
    flow = Flow("local")
    flow.run("sleep 1.5", gpu="2xh100", upload_code=False).wait(20)
    flow.run("true", gpu="2xh100", upload_code=False).wait(10)


def test_nobody_looks_where_there_is_no_driver(home: Path) -> None:
    task = Flow("local").run("sleep 1.3", gpu="a100", upload_code=False)
    task.wait(30)
    assert task.snapshot.status.succeeded
    assert not list(home.rglob("gpu-use.json"))


def test_what_looks_at_the_gpus_is_gone_when_the_runner_is_killed(driver: Path, home: Path) -> None:
    driver.write_text(USE)
    task = Flow("local").run("sleep 60", gpu="2xh100", upload_code=False)
    (record,) = eventually(lambda: list(home.rglob("gpu-use.json")))
    os.kill(json.loads((record.parent / "claimed").read_text())["pid"], signal.SIGKILL)
    task.wait(20)
    assert task.snapshot.reason == "runner-died"
    eventually(lambda: not at_work_in(record.parent))


def at_work_in(folder: Path) -> list[str]:
    """Return the processes whose current folder this is."""
    return [
        link.parent.name for link in Path("/proc").glob("[0-9]*/cwd") if os.path.realpath(link) == str(folder)
    ]


def eventually(ask: Callable[[], T]) -> T:
    """Return the first answer that is true; fail after a minute."""
    deadline = time.monotonic() + 60
    while not (answer := ask()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer
