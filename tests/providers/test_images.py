"""`image=`: the task runs in a real container, and the container is gone when the task is."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from flow_core import Flow, TaskExecutionError, TaskStatus
from tests.infra import image, packages


@pytest.fixture(scope="session")
def python_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not shutil.which("podman"):
        try:
            packages.install(packages.PODMAN)
        except packages.Unavailable as missing:
            leave_out = pytest.fail if os.environ.get("CI") else pytest.skip
            leave_out(f"podman is not installed: {missing}")
    os.environ.setdefault("CONTAINERS_CONF", str(Path(image.__file__).with_name("containers.conf")))
    return image.build(tmp_path_factory.mktemp("image"))


@pytest.fixture
def flow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python_image: str) -> Flow:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    return Flow("local", local={"kill_grace_s": 1.0})


def containers() -> list[str]:
    command = ["podman", "ps", "--all", "--filter", "label=flow-task", "--format", "{{.Names}}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_a_command_runs_inside_the_image_with_its_variables_and_code(flow: Flow, python_image: str) -> None:
    Path("data.txt").write_text("travelled\n")
    command = 'cat data.txt; echo "$VALUE" [$CUDA_VISIBLE_DEVICES]; test -e /etc/debian_version || echo inside; exit 3'
    task = flow.run(command, image=python_image, gpu="a100", env={"VALUE": "a'b\n\"c d"})
    task.wait(60)
    assert task.logs() == "travelled\na'b\n\"c d [0]\ninside\n"
    assert (task.status, task.snapshot.exit_code) == (TaskStatus.FAILED, 3)
    assert containers() == []


def test_a_function_runs_inside_the_image(flow: Flow, python_image: str) -> None:
    Path("where.py").write_text(
        "import os\ndef where(x):\n    return [x, os.path.exists('/etc/debian_version')]\n"
    )
    assert flow.invoke("where.py", "where", [1], image=python_image) == [1, False]
    with pytest.raises(TypeError, match="missing 1 required"):
        flow.invoke("where.py", "where", image=python_image)


def test_a_container_sees_its_own_task_and_no_other(flow: Flow, python_image: str) -> None:
    other = flow.run("true", env={"TOKEN": "hunter2"})
    other.wait(60)
    Path("look.py").write_text(
        "import os, glob\ndef look():\n"
        "    return len(glob.glob(os.environ['FLOW_TASK_DIR'] + '/../../*/*/job.json'))\n"
    )
    assert flow.invoke("look.py", "look", image=python_image) == 1


def test_a_volume_is_mounted_at_its_place(flow: Flow, python_image: str) -> None:
    volumes = [{"name": "data", "mount_path": "/data"}]
    flow.run("echo kept > /data/x", image=python_image, volumes=volumes).result(60)
    second = flow.run("cat /data/x", image=python_image, volumes=volumes)
    second.result(60)
    assert second.logs() == "kept\n"


def test_cancel_leaves_no_container(flow: Flow, python_image: str) -> None:
    task = flow.run("trap '' TERM; echo ready; while :; do :; done", image=python_image)
    assert next(task.logs(follow=True)) == "ready\n"
    assert len(containers()) == 1
    task.cancel()
    task.wait(60)
    assert task.status is TaskStatus.CANCELLED
    assert containers() == []


def test_a_killed_runner_leaves_no_container(flow: Flow, python_image: str, home: Path) -> None:
    import json
    import signal

    task = flow.run("echo ready; while :; do :; done", image=python_image)
    assert next(task.logs(follow=True)) == "ready\n"
    os.kill(json.loads(next(home.glob("tasks/*/1/claimed")).read_text())["pid"], signal.SIGKILL)
    task.wait(60)
    assert task.snapshot.reason == "runner-died"
    deadline = time.monotonic() + 10
    while containers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert containers() == []


def test_an_image_that_is_not_there_is_told_from_the_commands_own_failure(flow: Flow) -> None:
    task = flow.run("true", image="localhost/no/such:image")
    with pytest.raises(
        TaskExecutionError, match="could not run the image 'localhost/no/such:image'"
    ) as caught:
        task.result(60)
    assert caught.value.reason == "start-failed"


def test_no_value_of_a_variable_is_on_the_engines_command_line(flow: Flow, python_image: str) -> None:
    task = flow.run("echo ready; while :; do :; done", image=python_image, env={"TOKEN": "hunter2"})
    assert next(task.logs(follow=True)) == "ready\n"
    listing = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    task.cancel()
    task.wait(60)
    assert "hunter2" not in listing
