"""What a task finds on the nodes that Slurm has given it, and how one gets there beside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow
from flow_core.errors import ValidationError
from flow_core.models import TaskStatus
from flow_core.testing import NASTY
from tests.infra.lab import until
from tests.infra.slurm import Cluster
from tests.infra.ssh import Client, Sshd

SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def environments(flow: Flow, nodes: int, **fields: Any) -> list[dict[str, str]]:
    task = flow.run([sys.executable, "-c", SHOW], upload_code=False, num_instances=nodes, **fields)
    task.wait(timeout=90)
    assert task.status == "completed", task.logs()
    return [json.loads(task.logs(node=node)) for node in range(nodes)]


@pytest.mark.parametrize("spelling", ["gres", "gpus-per-node"])
def test_the_gpus_are_those_that_slurm_gave(flow_with: Callable[..., Flow], spelling: str) -> None:
    (env,) = environments(flow_with(gpu_directive=spelling), 1, instance_type="3xa100")
    assert len(env["CUDA_VISIBLE_DEVICES"].split(",")) == int(env["FLOW_NUM_GPUS"]) == 3


def test_a_task_without_gpus_sees_none(flow: Flow) -> None:
    (env,) = environments(flow, 1)
    assert (env["CUDA_VISIBLE_DEVICES"], env["FLOW_NUM_GPUS"]) == ("", "0")


def test_every_node_has_both_families_of_variables(flow: Flow, slurm_cluster: Cluster) -> None:
    nodes = environments(flow, 3, instance_type="2xa100")
    for rank, env in enumerate(nodes):
        assert [
            env[name] for name in ("FLOW_NODE_RANK", "RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_NODEID")
        ] == [str(rank)] * 5
        assert [
            env[name] for name in ("FLOW_NUM_NODES", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES")
        ] == ["3"] * 4
        assert len(env["CUDA_VISIBLE_DEVICES"].split(",")) == 2
        assert env["LOCAL_RANK"] == "0" and not any(name.startswith("FLOW_GANG") for name in env)
    assert [env["SLURMD_NODENAME"] for env in nodes] == ["n1", "n2", "n3"]
    for name in ("MASTER_ADDR", "MASTER_PORT", "FLOW_MAIN_IP", "SLURM_JOB_ID"):
        assert len({env[name] for env in nodes}) == 1


def test_the_nodes_of_a_task_and_its_gpus_are_shown(flow: Flow) -> None:
    task = flow.run("sleep 1000", upload_code=False, num_instances=2, instance_type="2xa100", ports=[8888])
    until(lambda: len(flow.poll([task.task_id])[task.task_id].hosts) == 2, "both nodes")
    seen = flow.poll([task.task_id])[task.task_id]
    assert (seen.status, seen.region, len(seen.gpus)) == (TaskStatus.RUNNING, "gpu", 4)
    assert seen.endpoints == {"8888": f"http://{seen.hosts[0]}:8888"}


def test_a_node_that_is_killed_fails_the_task_and_ends_the_others(flow: Flow) -> None:
    task = flow.run(
        'test "$FLOW_NODE_RANK" = 1 && kill -9 $$; sleep 1000', upload_code=False, num_instances=3
    )
    seen = flow.wait([task.task_id], timeout=60)[task.task_id]
    assert (seen.status, seen.reason, seen.signal) == (TaskStatus.FAILED, "killed", 9)
    assert "node 1 of 3" in seen.message


def test_cancelling_a_task_on_many_nodes_gives_each_its_grace(flow_with: Callable[..., Flow]) -> None:
    flow = flow_with(kill_grace_s=1.5)
    task = flow.run(
        "trap 'echo bye; exit 1' TERM; echo ready; while :; do sleep 0.05; done",
        upload_code=False,
        num_instances=3,
    )
    until(lambda: all("ready" in task.logs(node=node) for node in range(3)), "all nodes")
    task.cancel()
    assert flow.wait([task.task_id], timeout=60)[task.task_id].status is TaskStatus.CANCELLED
    assert all("bye" in task.logs(node=node) for node in range(3))


def test_a_requeued_task_on_many_nodes_starts_on_all_of_them_again(
    flow: Flow, slurm_cluster: Cluster
) -> None:
    shell = 'echo start; until test -e "$FLOW_TASK_DIR/go"; do sleep 0.05; done'
    task = flow.run(shell, upload_code=False, num_instances=2)
    until(lambda: all(task.logs(node=node) == "start\n" for node in range(2)), "both nodes")
    slurm_cluster.requeue(slurm_cluster.job_ids()[0])
    until(lambda: all(task.logs(node=node) == "start\n" * 2 for node in range(2)), "both nodes again")
    Path(flow.provider.site.home, "tasks", *task.task_id.split("-")[-2:], "go").touch()  # type: ignore[attr-defined]
    seen = flow.wait([task.task_id], timeout=60)[task.task_id]
    assert (seen.status, seen.preemptions) == (TaskStatus.COMPLETED, 1)


def test_the_set_up_runs_before_the_task_in_the_same_shell(flow_with: Callable[..., Flow]) -> None:
    setup = "export GREETING='it is set up'\nulimit -c 0\nunset HOME"
    (env,) = environments(flow_with(setup=setup), 1)
    assert env["GREETING"] == "it is set up" and "HOME" not in env


def test_modules_are_loaded_by_a_login_shell(
    flow_with: Callable[..., Flow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "login home"
    home.mkdir()
    (home / ".bash_profile").write_text('module() { test "$2" != none && export LOADED="$LOADED<$1 $2>"; }\n')
    monkeypatch.setenv("HOME", str(home))
    (env,) = environments(flow_with(modules=["cuda/12.4", "it's odd"]), 1)
    assert env["LOADED"] == "<load cuda/12.4><load it's odd>"
    task = flow_with(modules=["none"]).run("echo not reached", upload_code=False)
    seen = flow_with().wait([task.task_id], timeout=60)[task.task_id]
    assert (seen.status, seen.reason, task.logs()) == (TaskStatus.FAILED, "start-failed", "")


def test_a_set_up_that_fails_says_what_it_printed(flow_with: Callable[..., Flow]) -> None:
    flow = flow_with(setup="echo the reason is here >&2; exit 7")
    task = flow.run("echo not reached", upload_code=False)
    seen = flow.wait([task.task_id], timeout=60)[task.task_id]
    assert (seen.status, seen.reason, seen.exit_code) == (TaskStatus.FAILED, "start-failed", 7)
    assert "the reason is here" in seen.message and "exit code 7" in seen.message


def test_slurms_own_books_agree_with_the_exit_code(flow: Flow, slurm_cluster: Cluster) -> None:
    for code in (0, 7):
        task = flow.run(f"exit {code}", upload_code=False)
        task.wait(timeout=60)
        until(lambda: not slurm_cluster.job_ids(), "Slurm to notice")
        queue = slurm_cluster.command("squeue", "-h", "-t", "all", "-o", "%A %j").splitlines()
        job = next(line.split()[0] for line in queue if task.task_id in line)
        assert slurm_cluster.job(job)["ExitCode"] == f"{code}:0"


@pytest.mark.parametrize("text", [text for text in NASTY if text.strip() and text.isprintable()])
def test_an_options_value_reaches_slurm_unchanged(
    flow_with: Callable[..., Flow], slurm_cluster: Cluster, text: str
) -> None:
    task = flow_with(directives={"comment": text, "hold": True}).run("true", upload_code=False)
    queue = slurm_cluster.command("squeue", "-h", "-t", "all", "-o", "%j|%k").splitlines()
    assert next(line.split("|", 1)[1] for line in queue if task.task_id in line).strip() == text.strip()


def test_slurms_limit_is_longer_than_the_tasks(flow: Flow, slurm_cluster: Cluster) -> None:
    flow.run("sleep 1000", upload_code=False, max_run_time_hours=0.5)
    assert slurm_cluster.command("squeue", "-h", "-o", "%l") == "36:00"


def test_what_is_free_is_listed_by_partition(flow: Flow) -> None:
    def free(kind: str) -> int | None:
        found = flow.provider.find_instances()
        return next(one.available for one in found if (one.region, one.instance_type) == ("gpu", kind))

    assert free("8xa100") == 3
    flow.run("sleep 1000", upload_code=False, instance_type="1xa100")
    until(lambda: free("8xa100") == 2, "one node to be less than free")
    assert free("1xa100") == 23


# -- beside a task


def test_a_command_runs_beside_the_task_with_its_environment(
    flow: Flow, capfd: pytest.CaptureFixture[str]
) -> None:
    task = flow.run(
        "sleep 1000", upload_code=False, num_instances=2, instance_type="2xa100", env={"MINE": "it's"}
    )
    until(lambda: len(flow.poll([task.task_id])[task.task_id].hosts) == 2, "both nodes")
    for node in range(2):
        code = flow.provider.shell.run(  # type: ignore[union-attr]
            task.task_id,
            'echo "$MINE $FLOW_NODE_RANK $CUDA_VISIBLE_DEVICES $SLURMD_NODENAME"; exit 5',
            node=node,
        )
        out = capfd.readouterr().out
        assert (code, out) == (5, f"it's {node} 0,1 n{node + 1}\n")


def test_a_command_runs_beside_the_task_through_a_login_node(
    slurm_login: Sshd, ssh_client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "host": "ada@login",
        "home": str(slurm_login.lab.home / "ada" / "flow shell"),
        "memory": "100M",
    }
    flow = Flow("slurm", slurm=settings, ssh={"config": str(ssh_client.config)})
    task = flow.run("sleep 1000", upload_code=False, env={"MINE": "it's"})
    until(lambda: flow.poll([task.task_id])[task.task_id].status is TaskStatus.RUNNING, "its start")
    code = flow.provider.shell.run(task.task_id, 'echo "$MINE $USER"; echo no >&2; exit 5')  # type: ignore[union-attr]
    assert (code, capfd.readouterr().out) == (5, "it's ada\n")
    task.cancel()


def test_a_shell_beside_the_task_has_our_terminal(flow: Flow) -> None:
    task = flow.run("sleep 1000", upload_code=False)
    until(lambda: flow.poll([task.task_id])[task.task_id].status is TaskStatus.RUNNING, "its start")
    child, terminal = pty.fork()
    if child == 0:
        os.environ["SHELL"] = "/bin/sh"
        os._exit(flow.provider.shell.run(task.task_id, None))  # type: ignore[union-attr]
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    os.write(terminal, b"stty size; echo rank $FLOW_NODE_RANK on $SLURMD_NODENAME; exit 7\n")
    said = b""
    with contextlib.suppress(OSError):  # what a terminal says when nobody is left at its other end
        while piece := os.read(terminal, 4096):
            said += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, said
    assert b"33 99" in said and b"rank 0 on n1" in said


def test_there_is_no_shell_beside_a_task_that_does_not_run(flow: Flow) -> None:
    task = flow.run("true", upload_code=False)
    task.wait(timeout=60)
    with pytest.raises(ValidationError, match="not running"):
        flow.provider.shell.run(task.task_id, "true")  # type: ignore[union-attr]


# -- containers, by stand-ins for the engines


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program of this name first on the PATH, which travels to the nodes."""
    shelf = tmp_path / "bin"
    shelf.mkdir()
    monkeypatch.setenv("PATH", f"{shelf}:{os.environ['PATH']}")

    def put(name: str, text: str) -> None:
        (shelf / name).write_text(text)
        (shelf / name).chmod(0o755 | stat.S_IXUSR)

    return put


def test_an_image_is_run_by_apptainer_on_the_node(flow: Flow, stand_in: Callable[[str, str], None]) -> None:
    stand_in(
        "apptainer",
        '#!/bin/sh\nfor word; do echo "<$word>"; done; env | grep -E "^APPTAINERENV_(MINE|FLOW_TASK_ID)"\n',
    )
    task = flow.run(
        "true", upload_code=False, image="pytorch/pytorch", env={"MINE": "it's"}, instance_type="a100"
    )
    task.wait(timeout=60)
    said = task.logs()
    assert {"<exec>", "<--nv>", "<docker://pytorch/pytorch>", "<true>"} <= set(said.split("\n"))
    assert "APPTAINERENV_MINE=it's" in said and f"APPTAINERENV_FLOW_TASK_ID={task.task_id}" in said


def test_an_image_is_run_by_pyxis_through_srun(
    flow_with: Callable[..., Flow],
    stand_in: Callable[[str, str], None],
    slurm_cluster: Cluster,
    tmp_path: Path,
) -> None:
    real = slurm_cluster.lab.inside("sh", "-c", "command -v srun").strip()
    take = f'case "$word" in *container*) echo "$word" >> {tmp_path}/said;; *) set -- "$@" "$word";; esac'
    take = f"for word; do {take}; shift; done"
    stand_in("srun", f'#!/bin/bash\n{take}\nexec {real} "$@"\n')
    flow = flow_with(container="pyxis", python="/usr/bin/python3")
    task = flow.run(["sh", "-c", "echo inside"], upload_code=False, image="nvcr.io#nvidia/pytorch:24.05-py3")
    task.wait(timeout=60)
    assert task.logs() == "inside\n"
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0] == "--container-image=nvcr.io#nvidia/pytorch:24.05-py3"
    assert any(
        line.startswith("--container-mounts=") and task.task_id.split("-")[-2] in line for line in said
    )


def test_nothing_of_a_task_is_left_on_the_nodes(flow: Flow, slurm_cluster: Cluster) -> None:
    task = flow.run("sleep 1000 & setsid sleep 1000 & exit 3", upload_code=False, num_instances=2)
    task.wait(timeout=60)
    until(lambda: not slurm_cluster.job_ids(), "the job's end")
    marker = f"FLOW_TASK_ID={task.task_id}".encode()
    left = [path for path in Path("/proc").glob("[0-9]*/environ") if marker in _read(path).split(b"\0")]
    assert left == [], subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=False).stdout


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
