"""How a command runs inside an image: what each engine is called with. Pure, except for one engine that is a script."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow
from flow_core.runner.ranks import Container

ENV = {"FLOW_TASK_DIR": "/home/tasks/t", "TOKEN": "hunter2", "PATH": "/opt/bin"}


def container(
    engine: str, *, real_gpus: bool = True, image: str = "nvcr.io/nvidia/pytorch:23.10-py3"
) -> Container:
    spec = {"engine": engine, "image": image, "real_gpus": real_gpus, "mounts": [["/h/data", "/data"]]}
    return Container({"task_id": "train-0123456789abcdef-1", "container": spec}, 0)


COMMON = [
    *(
        "--rm",
        "--name",
        "flow-train-0123456789abcdef-1-0",
        "--label=flow-task=flow-train-0123456789abcdef-1-0",
    ),
    *("--network=host", "--workdir", "/w", "--volume=/h/data:/data"),
    *("--env=FLOW_TASK_DIR", "--env=PATH=/opt/bin", "--env=TOKEN"),
]


@pytest.mark.parametrize(
    ("engine", "wanted"),
    [
        (
            "/usr/bin/docker",
            ["run", *COMMON, '--gpus="device=0,2"', "nvcr.io/nvidia/pytorch:23.10-py3", "echo", "a b"],
        ),
        (
            "/usr/bin/podman",
            [
                *("run", *COMMON, "--device=nvidia.com/gpu=0", "--device=nvidia.com/gpu=2"),
                *("nvcr.io/nvidia/pytorch:23.10-py3", "echo", "a b"),
            ],
        ),
        (
            "/usr/bin/apptainer",
            [
                *("exec", "--containall", "--nv", "--bind=/h/data:/data", "--pwd", "/w"),
                *("docker://nvcr.io/nvidia/pytorch:23.10-py3", "echo", "a b"),
            ],
        ),
    ],
)
def test_each_engine_is_called_in_its_own_words(engine: str, wanted: list[str]) -> None:
    assert container(engine).argv(["echo", "a b"], ENV, "/w", ["0", "2"]) == [engine, *wanted]


@pytest.mark.parametrize("engine", ["docker", "podman", "apptainer", "singularity"])
def test_values_are_in_the_environment_of_the_client_and_not_on_its_command_line(engine: str) -> None:
    one = container(engine)
    assert not [word for word in one.argv(["true"], ENV, "/w", []) if "hunter2" in word]
    passed = one.client_environment(ENV)
    assert "hunter2" in passed.values()
    assert passed["FLOW_TASK_DIR"] == ENV["FLOW_TASK_DIR"], "its process is found without the runner"


def test_simulated_gpus_are_no_devices() -> None:
    for engine in ("docker", "podman", "apptainer"):
        words = container(engine, real_gpus=False).argv(["true"], ENV, "/w", ["0"])
        assert not [word for word in words if "gpu" in word or word == "--nv"]


def test_an_image_file_is_no_registry_name(tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    assert str(image) in container("apptainer", image=str(image)).argv(["true"], ENV, "/w", [])
    assert "oras://x/y" in container("apptainer", image="oras://x/y").argv(["true"], ENV, "/w", [])


def test_apptainers_command_gets_its_variables_by_prefix(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an engine that does what apptainer does to the environment: it passes on what has its prefix."""
    engine = tmp_path / "bin" / "apptainer"
    engine.parent.mkdir()
    engine.write_text(
        "#!/usr/bin/env python3\nimport os, sys\nwords = sys.argv[1:]\n"
        "command = words[words.index('docker://some/image') + 1:]\nprefix = 'APPTAINERENV_'\n"
        "env = {k[len(prefix):]: v for k, v in os.environ.items() if k.startswith(prefix)}\n"
        "os.execvpe(command[0], command, {**env, 'PATH': os.environ['PATH']})\n"
    )
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{engine.parent}:/usr/bin:/bin")
    monkeypatch.setattr("flow_core.runner.inventory.ENGINES", ("apptainer",))
    fields: dict[str, Any] = {"image": "some/image", "env": {"TOKEN": "a b"}, "upload_code": False}
    task = Flow("local").run('echo "$TOKEN $FLOW_NODE_RANK"; exit 4', **fields)
    task.wait(30)
    assert (task.logs(), task.snapshot.exit_code) == ("a b 0\n", 4)
