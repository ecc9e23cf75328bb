"""What the local provider promises beyond the contract: GPUs, queue, volumes, environment, and who died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from flow_core import Flow, Task, TaskStatus
from flow_core.errors import (
    SpecRejected,
    TaskExecutionError,
    ValidationError,
    VolumeError,
    VolumeNotFoundError,
    WorkerDiedError,
)
from flow_core.ids import TaskId
from flow_core.models import TaskConfig, TaskSpec
from flow_core.runner import proc, slots
from tests.conftest import processes_under


@pytest.fixture
def flow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flow:
    work = tmp_path / "project"
    work.mkdir()
    monkeypatch.chdir(work)
    return Flow("local")


def folder(home: Path, task: Task) -> Path:
    parsed = TaskId.parse(task.task_id)
    return home / "tasks" / parsed.digest / str(parsed.attempt)


def until(seen: Callable[[], object], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not seen():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


# -- GPUs


def test_gpus_are_shared_out_by_count_and_shown_to_the_command(flow: Flow) -> None:
    both = flow.run('echo "$CUDA_VISIBLE_DEVICES $FLOW_NUM_GPUS"', gpu="2xa100")
    both.wait(30)
    assert both.logs() == "0,1 2\n"
    assert both.snapshot.gpus == ("0", "1")
    none = flow.run('echo "[$CUDA_VISIBLE_DEVICES]"')
    none.wait(30)
    assert none.logs() == "[]\n", "a task that asks for no GPU sees none"


def test_a_task_waits_while_the_gpus_are_taken_and_starts_when_they_are_free(flow: Flow) -> None:
    holder = flow.run("echo ready; sleep 100", gpu="2xa100")
    until(lambda: "ready" in holder.logs())
    waiting = flow.run("true", gpu="a100")
    time.sleep(0.1)
    assert (waiting.status, waiting.snapshot.reason) == (TaskStatus.PENDING, "queued")
    holder.cancel()
    waiting.wait(30)
    assert waiting.status is TaskStatus.COMPLETED


def test_a_waiter_that_dies_steps_out_of_the_queue(flow: Flow, home: Path) -> None:
    holder = flow.run("echo ready; sleep 100", gpu="2xa100")
    until(lambda: "ready" in holder.logs())
    first, second, third = (flow.run("true", gpu="a100") for _ in range(3))
    until(lambda: all((folder(home, one) / "claimed").exists() for one in (first, second, third)))
    os.kill(json.loads((folder(home, second) / "claimed").read_text())["pid"], signal.SIGKILL)
    first.cancel()
    holder.cancel()
    third.wait(30)
    assert third.status is TaskStatus.COMPLETED
    assert (second.status, second.snapshot.reason) == (TaskStatus.FAILED, "runner-died")
    assert first.status is TaskStatus.CANCELLED


def test_a_gpu_is_not_free_while_any_process_of_its_task_lives(flow: Flow, home: Path) -> None:
    holder = flow.run("(trap '' TERM; sleep 1.0; echo gone) & echo ready; wait", gpu="2xa100")
    until(lambda: "ready" in holder.logs())
    claim = json.loads((folder(home, holder) / "claimed").read_text())
    devices = ["0", "1"]
    assert slots.busy(str(home.resolve() / "gpus"), devices) == devices
    for guard in processes_under(home):  # first what would clean up, then the runner itself: the worst order
        if guard != claim["pid"] and b"runner" in Path(f"/proc/{guard}/cmdline").read_bytes():
            os.kill(guard, signal.SIGKILL)
    os.kill(claim["pid"], signal.SIGKILL)
    until(lambda: proc.state(claim) == "gone")
    if processes_under(home):
        assert slots.busy(str(home.resolve() / "gpus"), devices) == devices
    after = flow.run("true", gpu="2xa100")
    assert holder.snapshot.reason == "runner-died"  # looking at it buries what is left
    after.wait(30)
    assert after.status is TaskStatus.COMPLETED


def test_more_gpus_than_there_are_is_rejected_in_words(flow: Flow) -> None:
    with pytest.raises(SpecRejected, match=r"asks for 8 GPUs, and this machine has 2") as caught:
        flow.run("true", gpu="h100")
    assert "FLOW_LOCAL_GPUS=8" in str(caught.value)
    with pytest.raises(SpecRejected, match="on each of 3 nodes, 3 in all"):
        flow.run("true", gpu="a100", num_instances=3)


def test_without_gpus_and_without_a_declaration_a_gpu_task_is_rejected(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLOW_LOCAL_GPUS")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(SpecRejected, match="this machine has none"):
        Flow("local").run("true", gpu="a100")


def test_four_ranks_share_the_gpus_and_find_each_other(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_LOCAL_GPUS", "4")
    ranks = "$RANK/$WORLD_SIZE $FLOW_NODE_RANK/$FLOW_NUM_NODES"
    show = f'echo "{ranks} $CUDA_VISIBLE_DEVICES $MASTER_ADDR:$MASTER_PORT $FLOW_MAIN_IP"'
    task = Flow("local").run(show, gpu="a100", num_instances=4)
    task.wait(30)
    lines = [task.logs(node=node).split() for node in range(4)]
    assert [line[:3] for line in lines] == [[f"{n}/4", f"{n}/4", str(n)] for n in range(4)]
    assert len({line[3] for line in lines}) == 1
    assert {line[4] for line in lines} == {"127.0.0.1"}


@pytest.mark.timeout(300)
def test_500_tasks_on_4_gpus_all_finish_in_arrival_order_and_never_share(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOW_LOCAL_GPUS", "4")
    flow = Flow("local")
    tasks = [flow.run(["true"], gpu="a100", upload_code=False) for _ in range(500)]
    seen = flow.engine.wait([task.task_id for task in tasks], timeout=240)
    assert {one.status for one in seen.values()} == {TaskStatus.COMPLETED}
    starts = [json.loads((folder(home, task) / "started.json").read_text()) for task in tasks]
    granted = [start["granted_at"] for start in starts]
    assert granted == sorted(granted), "in order of arrival"
    for device in "0123":
        spans = sorted(
            (start["granted_at"], json.loads((folder(home, task) / "exit.json").read_text())["ended_at"])
            for task, start in zip(tasks, starts, strict=True)
            if start["gpus"] == [device]
        )
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), "one task at a time"
    until(lambda: not processes_under(home))


# -- who died


def test_a_killed_runner_is_told_and_nothing_of_the_task_is_left(flow: Flow, home: Path) -> None:
    task = flow.run("sleep 100 & setsid sleep 100 & echo ready; wait", gpu="a100")
    until(lambda: "ready" in task.logs())
    os.kill(json.loads((folder(home, task) / "claimed").read_text())["pid"], signal.SIGKILL)
    until(lambda: not processes_under(home))  # with nobody looking at the task
    assert (task.status, task.snapshot.reason) == (TaskStatus.FAILED, "runner-died")
    with pytest.raises(WorkerDiedError) as caught:
        task.result()
    assert caught.value.retryable


def test_a_reboot_is_told_from_a_dead_runner(flow: Flow, home: Path) -> None:
    task = flow.run("echo ready; sleep 100")
    until(lambda: "ready" in task.logs())
    claim = folder(home, task) / "claimed"
    record = json.loads(claim.read_text())
    claim.write_text(json.dumps({**record, "boot": "another boot"}))
    assert task.snapshot.reason == "reboot"
    os.kill(record["pid"], signal.SIGTERM)


def test_a_pid_that_was_used_again_does_not_look_alive(flow: Flow, home: Path) -> None:
    task = flow.run("echo ready; sleep 100")
    until(lambda: "ready" in task.logs())
    claim = folder(home, task) / "claimed"
    record = json.loads(claim.read_text())
    claim.write_text(json.dumps({**record, "pid": os.getpid()}))  # lives, but started at another time
    assert task.snapshot.reason == "runner-died"
    until(lambda: proc.state(record) == "gone")


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    until(lambda: Path(f"/proc/{child.pid}/stat").read_text().split()[2] == "Z")
    assert proc.start_time(child.pid) is None
    child.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk takes a mount, and that takes root")
def test_on_a_full_disk_the_task_still_ends_and_a_lost_result_is_no_success(
    home: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    try:
        flow = Flow("local", local={"home": str(disk / "home"), "gpus": 0})
        fill = f"cat /dev/zero > {disk}/fill; cat /dev/zero > {disk}/more; exit 3"
        task = flow.run(fill, upload_code=False)
        task.wait(30)
        assert (task.status, task.snapshot.exit_code) == (TaskStatus.FAILED, 3)
        (disk / "fill").unlink(missing_ok=True)
        (tmp_path / "value.py").write_text(
            f"def value():\n    try:\n        open({str(disk / 'fill')!r}, 'wb').write(b'x' * (1 << 23))\n"
            "    except OSError:\n        return 'x' * 100_000\n"
        )
        call = flow.invoke_async(tmp_path / "value.py", "value")
        with pytest.raises(TaskExecutionError) as caught:
            call.get_result(30)
        assert call.status is TaskStatus.FAILED
        assert "space" in str(caught.value)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_names_for_one_attempt_are_one_task(flow: Flow) -> None:
    """Two processes may race with the same key and different task names: the first name is shown, both are answered."""
    task = flow.run("echo once", name="first", upload_code=False)
    other = task.task_id.replace("first", "second")
    second = TaskConfig(name="second", command="echo twice", instance_type="cpu")
    flow.provider.submit(TaskSpec.from_config(second), task_id=other)
    task.wait(30)
    assert flow.poll([other])[other].status is TaskStatus.COMPLETED
    assert flow.get_task(other).logs() == "once\n"


# -- the submitter


def test_a_task_outlives_its_terminal_and_is_followed_in_another(
    flow: Flow, home: Path, tmp_path: Path
) -> None:
    steps = "for i in 1 2 3; do echo step $i; sleep 0.2; done"
    start = f"from flow_core import run; print(run('{steps}', upload_code=False).task_id)"
    first = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, check=True, start_new_session=True
    )
    task_id = first.stdout.strip()
    follow = (
        f"from flow_core import get_task\nt = get_task({task_id!r})\n"
        "for line in t.logs(follow=True): print(line, end='')\nprint(t.status.value)"
    )
    second = subprocess.run([sys.executable, "-c", follow], capture_output=True, text=True, check=True)
    assert second.stdout == "step 1\nstep 2\nstep 3\ncompleted\n"


def test_the_environment_of_a_task_is_the_machines_and_not_the_submitters(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://secret")
    task = flow.run("env", env={"MINE": "yes"})
    task.wait(30)
    lines = task.logs(tail=1000).splitlines()
    assert "MINE=yes" in lines
    assert not [line for line in lines if "secret" in line]
    assert any(line.startswith("HOME=") for line in lines)


def test_python_on_the_path_is_the_configured_one(flow: Flow) -> None:
    task = flow.run(["python", "-c", "import sys; print(sys.prefix)"])
    task.wait(30)
    assert task.logs().strip() == sys.prefix


def test_files_of_a_task_are_readable_by_their_owner_alone(flow: Flow, home: Path) -> None:
    task = flow.run("true", env={"TOKEN": "secret"})
    task.wait(30)
    assert home.stat().st_mode & 0o077 == 0
    assert (folder(home, task) / "job.json").stat().st_mode & 0o077 == 0


def test_no_value_of_a_variable_is_in_a_process_list(flow: Flow, home: Path) -> None:
    task = flow.run("echo ready; sleep 100", env={"TOKEN": "hunter2"})
    until(lambda: "ready" in task.logs())
    for pid in processes_under(home):
        assert b"hunter2" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert "hunter2" not in repr(task.config)


# -- code, volumes, images


def test_the_current_folder_travels_and_flowignore_is_honoured(flow: Flow) -> None:
    Path("train.py").write_text("print('trained')")
    Path("big.bin").write_text("x")
    Path(".flowignore").write_text("*.bin\n")
    task = flow.run("python train.py && ls")
    task.wait(30)
    assert task.logs().split() == ["trained", "train.py"]
    bare = flow.run("ls", upload_code=False)
    bare.wait(30)
    assert bare.logs() == ""


def test_a_volume_persists_between_tasks(flow: Flow) -> None:
    first = flow.run('echo kept > "$FLOW_VOLUME_MY_DATA/x"', volumes=[{"name": "my-data", "size_gb": 1}])
    first.wait(30)
    second = flow.run("cat volumes/my-data/x", volumes=[{"name": "my-data"}])
    second.wait(30)
    assert second.logs() == "kept\n"
    assert [volume.name for volume in flow.list_volumes()] == ["my-data"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_volume_is_mounted_where_it_is_asked_for_and_nobody_else_sees_it(
    flow: Flow, tmp_path: Path
) -> None:
    target = tmp_path / "mounted"
    volume = flow.create_volume(1, "checkpoints")
    task = flow.run(
        f"echo here > {target}/x; cat {target}/x",
        volumes=[{"volume_id": volume.volume_id, "mount_path": str(target)}],
    )
    task.wait(30)
    assert task.logs() == "here\n"
    assert not (target / "x").exists()


def test_a_volume_in_use_is_not_deleted_and_an_unknown_one_is_named(flow: Flow) -> None:
    flow.create_volume(1, "busy")
    task = flow.run("echo ready; sleep 100", volumes=[{"name": "busy"}])
    until(lambda: "ready" in task.logs())
    with pytest.raises(VolumeError, match=task.task_id):
        flow.delete_volume("busy")
    task.cancel()
    task.wait(30)
    flow.delete_volume("busy")
    assert flow.list_volumes() == []
    with pytest.raises(VolumeNotFoundError, match="'busy'"):
        flow.delete_volume("busy")


def test_a_volume_can_be_mounted_to_a_running_task(flow: Flow) -> None:
    flow.create_volume(1, "late")
    task = flow.run("echo ready; while [ ! -d volumes/late ]; do sleep 0.02; done; echo seen")
    until(lambda: "ready" in task.logs())
    flow.mount_volume("late", task.task_id)
    task.wait(30)
    assert task.logs() == "ready\nseen\n"
    with pytest.raises(ValidationError, match="not running"):
        flow.mount_volume("late", task.task_id)


def test_an_image_without_an_engine_is_refused_and_never_run_bare(
    flow: Flow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SpecRejected, match="needs a container engine"):
        flow.run("true", image="ubuntu:24.04")


# -- shell


def test_a_shell_runs_beside_the_task_with_its_environment(
    flow: Flow, capfd: pytest.CaptureFixture[str]
) -> None:
    task = flow.run("echo ready; sleep 100", gpu="a100", env={"MINE": "yes"})
    until(lambda: "ready" in task.logs())
    assert task.shell('echo "$MINE $CUDA_VISIBLE_DEVICES"; exit 4') == 4
    assert capfd.readouterr().out == "yes 0\n"
    task.cancel()
    task.wait(30)
    with pytest.raises(ValidationError, match="not running"):
        task.ssh("true")


def test_ended_tasks_are_swept_after_the_retention_time(home: Path) -> None:
    flow = Flow("local", local={"retention_days": 0})
    old = flow.run("true", upload_code=False)
    old.wait(30)
    (home / ".swept").unlink()
    flow.run("true", upload_code=False).wait(30)
    assert flow.poll([old.task_id])[old.task_id].status is TaskStatus.LOST


def test_the_log_of_the_runners_does_not_grow_for_ever(home: Path) -> None:
    flow = Flow("local")
    flow.run("true", upload_code=False).wait(30)
    log = home / "runner.log"
    assert log.read_bytes() == b""
    log.write_bytes(b"a warning of some start-up file\n" * 100_000)
    (home / ".swept").unlink()
    flow.run("true", upload_code=False).wait(30)
    assert log.read_bytes() == b""
