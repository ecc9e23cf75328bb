"""One job per task whatever is lost on the way: answers, submitters, time. And no runner that starts it twice."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from flow_core import Flow
from flow_core.errors import ConfigError, ProviderUnavailable, SpecRejected
from flow_core.models import TaskStatus
from tests.infra.lab import until
from tests.infra.slurm import Cluster


@pytest.fixture
def sbatch(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a script in sbatch's place; `$real` is the true one. Returns a file that the script may write to."""
    shelf, noted = tmp_path / "bin", tmp_path / "noted"
    shelf.mkdir()
    noted.touch()
    real = slurm_cluster.lab.inside("sh", "-c", "command -v sbatch").strip()
    monkeypatch.setenv("PATH", f"{shelf}:{os.environ['PATH']}")

    def put(text: str) -> Path:
        script = shelf / "sbatch"
        script.write_text(f"#!/bin/sh\nreal={real}\nnoted={noted}\n{text}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return noted

    return put


def jobs(cluster: Cluster) -> set[str]:
    """Every job that Slurm still knows, and every element of an array, whether it has started or not."""
    return set(cluster.command("squeue", "-h", "-r", "-t", "all", "-o", "%i").split())


LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def test_a_job_whose_number_was_lost_is_found_by_its_name(
    flow: Flow, slurm_cluster: Cluster, sbatch: Callable[[str], Path]
) -> None:
    before = jobs(slurm_cluster)
    sbatch(f'"$real" "$@" >/dev/null; echo "{LOST}" >&2; exit 1')
    task = flow.run("echo once", upload_code=False, idempotency_key="key")
    again = flow.run("echo once", upload_code=False, idempotency_key="key")
    assert again.task_id == task.task_id and len(jobs(slurm_cluster) - before) == 1
    task.wait(timeout=60)
    assert task.logs() == "once\n"


def test_a_job_that_was_taken_after_the_deadline_is_found_by_its_name(
    flow_with: Callable[..., Flow], slurm_cluster: Cluster, sbatch: Callable[[str], Path]
) -> None:
    before = jobs(slurm_cluster)
    sbatch('"$real" "$@"; exec sleep 1000')
    task = flow_with(command_timeout_s=2).run("echo once", upload_code=False)
    assert len(jobs(slurm_cluster) - before) == 1
    task.wait(timeout=60)
    assert task.logs() == "once\n"


def test_what_slurm_did_not_take_is_submitted_by_the_next_call(
    flow: Flow, slurm_cluster: Cluster, sbatch: Callable[[str], Path]
) -> None:
    before = jobs(slurm_cluster)
    sbatch(f'echo "{LOST}" >&2; exit 1')
    with pytest.raises(ProviderUnavailable, match="Socket timed out"):
        flow.run("echo once", upload_code=False, idempotency_key="key")
    waiting = flow.find("key")
    assert waiting is not None and waiting.status == "pending" and not jobs(slurm_cluster) - before
    sbatch('exec "$real" "$@"')
    task = flow.run("echo once", upload_code=False, idempotency_key="key")
    assert task.task_id == waiting.task_id and len(jobs(slurm_cluster) - before) == 1
    task.wait(timeout=60)
    assert task.logs() == "once\n"


def test_a_task_that_slurm_got_twice_starts_once(
    flow: Flow, slurm_cluster: Cluster, sbatch: Callable[[str], Path]
) -> None:
    before = jobs(slurm_cluster)
    sbatch('"$real" "$@" >/dev/null; "$real" "$@" >/dev/null; "$real" "$@"')
    task = flow.run('echo start >> "$FLOW_TASK_DIR/starts"; sleep 0.3', upload_code=False)
    task.wait(timeout=60)
    assert len(jobs(slurm_cluster) - before) == 3
    until(lambda: not slurm_cluster.job_ids(), "the end of all three")
    assert flow.engine.collect(task.task_id, "starts") == b"start\n"
    assert task.status == "completed"


def test_a_duplicate_that_waits_while_the_first_one_runs_does_not_hide_it(
    flow: Flow, slurm_cluster: Cluster, sbatch: Callable[[str], Path]
) -> None:
    sbatch('"$real" "$@" >/dev/null; exec "$real" --hold "$@"')
    task = flow.run("echo ready; sleep 1000", upload_code=False)
    until(lambda: task.status == "running", "the first one to run")
    (held,) = slurm_cluster.command("squeue", "-h", "-t", "pending", "-o", "%A").split()
    slurm_cluster.command("scancel", held)
    until(lambda: held not in slurm_cluster.job_ids(), "the duplicate's end")
    assert flow.poll([task.task_id])[task.task_id].status is TaskStatus.RUNNING
    task.cancel()
    assert flow.wait([task.task_id], timeout=60)[task.task_id].status is TaskStatus.CANCELLED


def test_a_refusal_has_slurms_own_words_and_leaves_nothing(flow: Flow, slurm_cluster: Cluster) -> None:
    for settings, words in (
        ({"region": "nowhere"}, "Invalid partition name specified"),
        ({"instance_type": "16xa100"}, "Requested node configuration is not available"),
    ):
        with pytest.raises(SpecRejected, match=words):
            flow.run("true", upload_code=False, idempotency_key="key", **settings)
    assert flow.find("key") is None and flow.list_tasks() == [] and slurm_cluster.job_ids() == []


def test_a_machine_without_slurm_says_what_to_do(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match=r"slurm\.host"):
            flow.run("true", upload_code=False)
    assert flow.list_tasks() == []


def test_the_environment_of_the_submitter_does_not_travel(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "SBATCH_PARTITION", "SLURM_JOB_ID", "TMPDIR"):
        monkeypatch.setenv(name, "secret")
    task = flow.run("env", upload_code=False)
    task.wait(timeout=60)
    assert "secret" not in task.logs() and "SLURM_JOB_PARTITION=gpu\n" in task.logs()


@pytest.mark.parametrize("moment", ["created", "queued"])
def test_a_submit_that_was_interrupted_is_finished_by_the_next(
    flow: Flow, slurm_cluster: Cluster, sbatch: Callable[[str], Path], moment: str
) -> None:
    """The submitter dies before sbatch, or after it and before it has noted the job's number."""
    before = jobs(slurm_cluster)
    sbatch("kill -9 $PPID" if moment == "created" else '"$real" "$@" >/dev/null; kill -9 $PPID')
    child = os.fork()
    if child == 0:
        flow.run("echo once", upload_code=False, idempotency_key="key")
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    sbatch('exec "$real" "$@"')
    task = flow.run("echo once", upload_code=False, idempotency_key="key")
    assert len(jobs(slurm_cluster) - before) == 1
    task.wait(timeout=60)
    assert task.logs() == "once\n"


def test_an_interrupted_array_is_finished_element_by_element(
    flow: Flow, slurm_cluster: Cluster, sbatch: Callable[[str], Path]
) -> None:
    for text, more in (("kill -9 $PPID", 3), ('"$real" "$@" >/dev/null; kill -9 $PPID', 0)):
        sbatch(text)
        key = f"map of {more}"
        child = os.fork()
        if child == 0:
            flow.run_many(
                ['echo start >> "$FLOW_TASK_DIR/starts"'] * 3, upload_code=False, idempotency_key=key
            )
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
        sbatch('exec "$real" "$@"')
        before = jobs(slurm_cluster)
        tasks = flow.run_many(
            ['echo start >> "$FLOW_TASK_DIR/starts"'] * 3, upload_code=False, idempotency_key=key
        )
        assert len(jobs(slurm_cluster) - before) == more
        seen = flow.wait([task.task_id for task in tasks], timeout=60)
        assert {one.status for one in seen.values()} == {TaskStatus.COMPLETED}
        for task in tasks:
            assert flow.engine.collect(task.task_id, "starts") == b"start\n"
