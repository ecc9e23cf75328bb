"""Bad moments: cancels at once, forks, other PID namespaces, nested tasks, interrupted calls, broken machines."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow, Task, TaskStatus
from flow_core.errors import ProviderUnavailable
from flow_core.ids import TaskId
from flow_core.models import SpecFile
from flow_core.runner import machine, proc, slots
from flow_core.runner import task as records
from flow_core.runner.main import Runner
from tests.conftest import processes_under


@pytest.fixture
def flow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flow:
    work = tmp_path / "project"
    work.mkdir()
    monkeypatch.chdir(work)
    return Flow("local")


@pytest.fixture
def half(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A task whose submitter died before it launched a runner."""
    with monkeypatch.context() as patch:
        patch.setattr(machine.Launch, "__init__", lambda *_: None)
        patch.setattr(machine.Launch, "go", lambda *_: None)
        return flow.run("true", upload_code=False)


def folder(home: Path, task: Task) -> Path:
    parsed = TaskId.parse(task.task_id)
    return home / "tasks" / parsed.digest / str(parsed.attempt)


def claim_of(home: Path, task: Task) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder(home, task) / "claimed").read_text())
    return record


def until(seen: Callable[[], object], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not seen():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def running(flow: Flow, command: str, **fields: Any) -> Task:
    """Start a task that prints `ready` when it is where the test wants it."""
    task = flow.run(command, upload_code=False, **fields)
    until(lambda: "ready" in task.logs())
    return task


# -- cancel


def test_two_who_cancel_a_half_submitted_task_do_not_signal_each_other(
    flow: Flow, half: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: signals.append(number))
    finish = records.finish

    def second_cancel_comes_first(path: str, record: dict[str, Any]) -> bool:
        monkeypatch.setattr(records, "finish", finish)
        flow.cancel([half.task_id])
        return finish(path, record)

    monkeypatch.setattr(records, "finish", second_cancel_comes_first)
    try:
        flow.cancel([half.task_id])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signals == []
    assert half.status is TaskStatus.CANCELLED


def test_a_cancel_that_was_interrupted_between_claim_and_record_still_counts(
    flow: Flow, half: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            flow.cancel([half.task_id])
    assert half.status is TaskStatus.CANCELLED


# -- forks of the submitting process


@pytest.fixture
def fork() -> Iterator[Callable[[], None]]:
    """Fork this process, as a host's multiprocessing may do at any moment in another thread; the child stays."""
    children: list[int] = []

    def forked() -> None:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        children.append(pid)

    yield forked
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def is_free(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def forking(action: Callable[..., Any], fork: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        answer = action(*args, **kwargs)
        fork()
        return answer

    return wrapped


def test_a_fork_while_a_ticket_is_taken_keeps_neither_the_turn_nor_the_ticket(
    tmp_path: Path, fork: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", forking(os.rename, fork))
        name, ticket = slots.take_ticket(str(tmp_path), "label")
    assert is_free(tmp_path / ".turn"), "or nobody could submit while the child lives"
    slots.hand_over(ticket)
    until(
        lambda: is_free(tmp_path / name)
    )  # the child drops its copy, or the queue would stand still while it lives


def test_a_fork_while_gpus_are_counted_keeps_none(
    tmp_path: Path, fork: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0").touch()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", forking(fcntl.flock, fork))
        assert slots.busy(str(tmp_path), ["0"]) == []
    assert is_free(tmp_path / "0")


def test_a_fork_while_a_task_is_cancelled_does_not_keep_its_lock(
    flow: Flow, home: Path, half: Task, fork: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records, "finish", forking(records.finish, fork))
        half.cancel()
    assert is_free(folder(home, half) / "alive"), "or the next attempt would wait while the child lives"


# -- submits that cannot be finished


def test_an_interpreter_that_is_gone_is_told_by_submit(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ProviderUnavailable, match="/nowhere/python"):
        flow.run("true", upload_code=False)


def test_a_queue_that_cannot_be_written_is_told_by_submit(flow: Flow, home: Path) -> None:
    home.mkdir()
    (home / "queue").write_text("no folder")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ProviderUnavailable, match="could not be started"):
        flow.run("true", gpu="a100", upload_code=False)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_task_that_no_runner_takes_ends_and_is_not_started_later(
    flow: Flow, home: Path, half: Task
) -> None:
    assert half.status is TaskStatus.PENDING
    spec = folder(home, half) / "spec.json"
    old = json.loads(spec.read_text())
    spec.write_text(json.dumps({**old, "submitted_at": old["submitted_at"] - records.UNCLAIMED_S - 1}))
    half.refresh()
    assert (half.status, half.snapshot.reason) == (TaskStatus.FAILED, "runner-died")
    machine.launch(str(home.resolve()), half.task_id)
    assert half.logs() == ""
    assert records.claim(str(folder(home, half))) is None


def test_a_claim_whose_content_a_loss_of_power_took_is_one_of_an_earlier_boot(
    flow: Flow, home: Path, half: Task
) -> None:
    (folder(home, half) / "unclaimed").rename(
        folder(home, half) / "claimed"
    )  # still the blanks that kept its place
    half.refresh()
    assert (half.status, half.snapshot.reason) == (TaskStatus.FAILED, "reboot")
    half.cancel()
    assert half.snapshot.reason == "reboot"


# -- who belongs to whom


def test_a_task_outlives_the_task_that_submitted_it(flow: Flow, home: Path) -> None:
    code = "from flow_core import run; print(run('sleep 1.5; echo done', upload_code=False).task_id)"
    names = ("FLOW_LOCAL_HOME", "FLOW_CONFIG")
    outer = flow.run(
        [sys.executable, "-c", code],
        env={**{name: os.environ[name] for name in names}, "PYTHONPATH": str(Path(__file__).parents[2])},
        upload_code=False,
    )
    outer.wait(30)
    assert outer.status is TaskStatus.COMPLETED
    inner = flow.get_task(outer.logs().strip())
    assert inner.status is not TaskStatus.FAILED
    assert outer.completed_at is not None and inner.created_at is not None
    inner.wait(30)
    assert (inner.status, inner.logs()) == (TaskStatus.COMPLETED, "done\n")
    assert inner.completed_at is not None and outer.completed_at < inner.completed_at


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a PID namespace takes root")
def test_a_look_from_another_pid_namespace_does_not_bury_a_living_task(flow: Flow, home: Path) -> None:
    def look() -> str:
        code = f"from flow_core import get_task; print(get_task({task.task_id!r}).status)"
        away = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
        return subprocess.run(away, capture_output=True, text=True, check=True).stdout.strip()

    task = running(flow, "echo ready; sleep 100")
    assert look() == "running"
    for pid in sorted(processes_under(home), key=lambda pid: pid == claim_of(home, task)["pid"]):
        os.kill(pid, signal.SIGKILL)
    until(lambda: is_free(folder(home, task) / "alive"))
    assert look() == "failed"


def test_a_gpu_is_not_free_while_a_child_that_closed_all_its_files_lives(flow: Flow, home: Path) -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '100']); print('ready', p.pid, flush=True); p.wait()"
    task = running(flow, f'{sys.executable} -c "{code}"; true', gpu="2xa100")
    child = proc.identity(int(task.logs().split()[1]))
    runner = claim_of(home, task)
    (guard,) = (
        pid
        for pid in processes_under(home)
        if pid != runner["pid"] and b"runner" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(guard, signal.SIGSTOP)  # so that there is time to look
    os.kill(runner["pid"], signal.SIGKILL)
    until(lambda: proc.state(runner) == "gone")
    devices = str(home.resolve() / "gpus")
    assert proc.state(child) == "alive"
    assert slots.busy(devices, ["0", "1"]) == ["0", "1"]
    os.kill(guard, signal.SIGCONT)
    until(lambda: slots.busy(devices, ["0", "1"]) == [])
    assert proc.state(child) == "gone"


# -- the runner at bad moments


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_runner_does_not_spin_while_it_waits_for_its_orphans_to_end(flow: Flow, home: Path) -> None:
    task = running(flow, "(trap '' TERM; echo ready; while :; do sleep 0.2; done) & wait")
    pid = claim_of(home, task)["pid"]
    task.cancel()
    until(lambda: task.snapshot.reason == "cancelling")
    time.sleep(0.1)
    begin, used = time.monotonic(), cpu_s(pid)
    until(lambda: time.monotonic() - begin > 2)
    assert cpu_s(pid) - used < 0.7
    for left in processes_under(home):
        os.kill(left, signal.SIGKILL)


def test_signals_that_the_submitter_blocks_are_not_blocked_in_its_tasks(flow: Flow, home: Path) -> None:
    holder = running(flow, "echo ready; sleep 100", gpu="2xa100")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        waiting = flow.run("true", gpu="a100", upload_code=False)
        runs = flow.run("grep SigBlk /proc/self/status", upload_code=False)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    until((folder(home, waiting) / "claimed").exists)
    waiting.cancel()
    waiting.wait(10)
    assert waiting.status is TaskStatus.CANCELLED
    runs.wait(30)
    assert int(runs.logs().split()[1], 16) == 0
    holder.cancel()


def test_nothing_is_left_when_the_folder_is_removed_and_the_runner_killed(flow: Flow, home: Path) -> None:
    task = running(flow, "setsid sleep 100 & echo ready; wait")
    pid = claim_of(home, task)["pid"]
    shutil.rmtree(folder(home, task))
    os.kill(pid, signal.SIGKILL)
    until(lambda: not processes_under(home))


def test_runners_that_died_while_they_waited_are_buried_at_once(flow: Flow, home: Path) -> None:
    holder = running(flow, "echo ready; sleep 100", gpu="2xa100")
    waiting = [flow.run("true", gpu="a100", upload_code=False) for _ in range(10)]
    until(lambda: all((folder(home, task) / "claimed").exists() for task in waiting))
    for task in waiting:
        os.kill(claim_of(home, task)["pid"], signal.SIGKILL)
    until(lambda: all(proc.state(claim_of(home, task)) == "gone" for task in waiting))
    begin = time.monotonic()
    seen = flow.poll([task.task_id for task in waiting])
    assert time.monotonic() - begin < 10  # and not one after the other, nor after a time of grace
    assert {one.reason for one in seen.values()} == {"runner-died"}
    holder.cancel()


def test_code_that_cannot_be_unpacked_is_a_failed_start(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flow, "upload", lambda *_: (SpecFile(name="code.tar.gz", data=b"no archive"),))
    task = flow.run("true")
    task.wait(30)
    assert (task.status, task.snapshot.reason) == (TaskStatus.FAILED, "start-failed")
    assert "code.tar.gz is damaged" in str(task.message)


# -- machines that are not as they should be


def test_a_task_ends_although_its_container_engine_has_vanished(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "podman"
    engine.write_text('#!/bin/sh\nrm -f "$0"\necho ran\n')
    engine.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    task = Flow("local").run("true", image="image", upload_code=False)
    task.wait(30)
    assert task.status is TaskStatus.COMPLETED


def test_two_who_sweep_at_once_both_submit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Flow("local", local={"retention_days": 0})
    flow.run("true", upload_code=False).wait(30)
    (home / ".swept").unlink()
    rename = os.rename

    def other_first(path: str, target: str) -> None:
        if ".old-" in target:
            rename(path, Path(path).with_name("swept by the other"))
        rename(path, target)

    monkeypatch.setattr(os, "rename", other_first)
    flow.run("true", upload_code=False).wait(30)


def test_what_an_earlier_sweep_could_not_remove_does_not_stop_the_next(home: Path) -> None:
    flow = Flow("local", local={"retention_days": 0})
    old = flow.run("true", upload_code=False)
    old.wait(30)
    (folder(home, old).with_name(".old-1") / "locked").mkdir(parents=True)
    (home / ".swept").unlink()
    flow.run("true", upload_code=False).wait(30)
    assert flow.poll([old.task_id])[old.task_id].status is TaskStatus.LOST


def test_drafts_of_killed_submits_are_swept(home: Path, flow: Flow) -> None:
    task = flow.run("true", upload_code=False)
    draft, fresh = (folder(home, task).with_name(name) for name in (".new-killed", ".new-fresh"))
    for path in (draft, fresh):
        path.mkdir()
        (path / "job.json").write_text("secret")
    os.utime(draft, (1, 1))
    (home / ".swept").unlink()
    flow.run("true", upload_code=False)
    assert (draft.exists(), fresh.exists()) == (False, True)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="drops a capability of root")
def test_root_that_may_not_mount_gets_its_volume_as_a_link(home: Path) -> None:
    code = (
        "from flow_core import run; t = run('cd volumes/v && echo hi > x', volumes=[{'name': 'v'}], upload_code=False);"
        "t.wait(30); print(t.status, t.message)"
    )
    less = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", code]
    assert subprocess.run(less, capture_output=True, text=True, check=True).stdout == "completed None\n"


def test_the_start_time_of_a_process_does_not_depend_on_the_time_zone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = proc._start_time_by_ps(os.getpid())
    assert before
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert proc._start_time_by_ps(os.getpid()) == before


def test_a_call_that_waits_runs_the_file_as_it_was_when_it_was_submitted(flow: Flow) -> None:
    module = Path("module.py")
    module.write_text("def value():\n    return 1\n")
    holder = running(flow, "echo ready; sleep 100", gpu="2xa100")
    call = flow.invoke_async(module, "value", gpu="a100")
    module.write_text("def value():\n    return 2\n")
    holder.cancel()
    assert call.get_result(30) == 1


def test_an_invoke_that_is_interrupted_while_it_submits_leaves_nothing_running(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("module.py").write_text("import time\n\ndef wait():\n    time.sleep(100)\n")
    go = machine.Launch.go

    def interrupted(self: machine.Launch) -> None:
        go(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(machine.Launch, "go", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flow.invoke("module.py", "wait")
    (task,) = flow.list_tasks()
    task.wait(30)
    assert task.status is TaskStatus.CANCELLED


def test_a_look_without_a_free_descriptor_says_nothing_about_the_task(flow: Flow) -> None:
    task = flow.run("true", upload_code=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(ProviderUnavailable, match="Too many open files"):
            flow.poll([task.task_id])
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    task.wait(30)
    assert task.status is TaskStatus.COMPLETED


def test_a_final_snapshot_is_whole_however_quick_the_task_was(
    flow: Flow, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = running(flow, "echo ready; sleep 100", gpu="2xa100")
    task = flow.run("true", gpu="a100", upload_code=False)
    until((folder(home, task) / "claimed").exists)
    read = records.read_json

    def slowly(path: str, name: str) -> dict[str, Any] | None:
        record = read(path, name)
        if name == "started.json" and record is None:
            holder.cancel()
            until((folder(home, task) / "exit.json").exists)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(records, "read_json", slowly)
        first = flow.poll([task.task_id])[task.task_id]
    assert not first.status.final or first == flow.poll([task.task_id])[task.task_id]


@pytest.mark.parametrize("file", ["/proc/sys/kernel/random/boot_id", "/proc/{pid}/stat"])
def test_a_living_task_is_not_buried_because_the_system_refused_one_look(
    flow: Flow, home: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    task = running(flow, "echo ready; sleep 100")
    refused = file.format(pid=claim_of(home, task)["pid"])

    def refusing(path: str, *args: Any) -> Any:
        if path == refused:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return open(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(proc, "open", refusing, raising=False)
        with pytest.raises(ProviderUnavailable):
            flow.poll([task.task_id])
    assert flow.poll([task.task_id])[task.task_id].status is TaskStatus.RUNNING
    task.cancel()


def test_the_next_attempt_buries_the_one_before_when_all_who_looked_after_it_are_killed(
    flow: Flow, home: Path
) -> None:
    first = flow.run(
        "(trap '' TERM; echo ready; exec sleep 100) & wait", upload_code=False, idempotency_key="k"
    )
    until(lambda: "ready" in first.logs())
    first.cancel()
    second = flow.run("true", upload_code=False, idempotency_key="k")
    assert second.task_id != first.task_id
    until((folder(home, second) / "claimed").exists)
    runner = claim_of(home, first)["pid"]
    mark = f"FLOW_TASK_DIR={folder(home.resolve(), first)}".encode()
    ours = [
        pid for pid in processes_under(home) if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    python = [pid for pid in ours if b"runner" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert runner in python
    for pid in sorted(python, key=lambda pid: pid == runner):  # the guard first
        os.kill(pid, signal.SIGKILL)
    second.wait(30)
    assert second.status is TaskStatus.COMPLETED
    assert first.status is TaskStatus.CANCELLED


def test_a_cancel_between_the_claim_and_the_queue_is_a_cancel(tmp_path: Path) -> None:
    (tmp_path / "cancel").touch()
    with open(tmp_path / "alive", "w") as alive:
        runner = Runner(str(tmp_path), alive.fileno())
        runner._on_signal(signal.SIGTERM, None)
        assert runner.run(None)["reason"] == "cancelled"
