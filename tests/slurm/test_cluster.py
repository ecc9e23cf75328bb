"""The test clusters are what the tests take them for."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.infra import lab as labs
from tests.infra.slurm import AccountedCluster, Cluster
from tests.infra.ssh import Client, Sshd


def sbatch(*options: str, script: str) -> str:
    command = ["sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def until(cluster: Cluster, job: str, state: str) -> dict[str, str]:
    labs.until(
        lambda: cluster.job(job).get("JobState") == state, f"job {job} to be {state}: {cluster.job(job)}"
    )
    return cluster.job(job)


def test_a_job_runs_on_two_nodes_with_its_gpus(slurm_cluster: Cluster, tmp_path: Path) -> None:
    script = f"srun -o '{tmp_path}/%t' sh -c 'hostname; echo $CUDA_VISIBLE_DEVICES'"
    job = sbatch("--nodes=2", "--gres=gpu:3", script=script)
    until(slurm_cluster, job, "COMPLETED")
    assert sorted((tmp_path / rank).read_text() for rank in "01") == ["n1\n0,1,2\n", "n2\n0,1,2\n"]


def test_a_killed_shell_and_a_downed_node_end_their_jobs(slurm_cluster: Cluster) -> None:
    job = sbatch(script="sleep 100")
    until(slurm_cluster, job, "RUNNING")
    labs.until(lambda: bool(slurm_cluster.processes(job)), "its processes")
    slurm_cluster.kill_shell(job, signal.SIGKILL)
    assert until(slurm_cluster, job, "FAILED")["ExitCode"] == "0:9"
    job = sbatch("--nodelist=n2", "--no-requeue", script="sleep 100")
    until(slurm_cluster, job, "RUNNING")
    slurm_cluster.set_down("n2")
    until(slurm_cluster, job, "NODE_FAIL")
    slurm_cluster.resume_node("n2")


def test_jobs_run_on_without_a_controller(slurm_cluster: Cluster, tmp_path: Path) -> None:
    done = tmp_path / "done"
    job = sbatch(script=f"while ! test -e '{tmp_path}/go'; do sleep 0.05; done; touch '{done}'")
    until(slurm_cluster, job, "RUNNING")
    with slurm_cluster.without_controller():
        (tmp_path / "go").touch()
        labs.until(done.exists, "the job's end")
    until(slurm_cluster, job, "COMPLETED")


def test_a_crashed_node_comes_back(slurm_cluster: Cluster) -> None:
    job = sbatch("--nodelist=n3", script="sleep 100")
    until(slurm_cluster, job, "RUNNING")
    labs.until(lambda: bool(slurm_cluster.processes(job)), "its processes")
    slurm_cluster.crash_node("n3")
    assert slurm_cluster.processes(job) == []
    slurm_cluster.resume_node("n3")


def test_without_accounting_sacct_says_so(slurm_cluster: Cluster) -> None:
    run = subprocess.run(["sacct"], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "accounting storage is disabled" in run.stderr


def test_accounting_remembers_a_job(slurm_cluster_with_accounting: AccountedCluster) -> None:
    job = sbatch("--gres=gpu:1", script="exit 3")
    wanted = f"{job}|FAILED|3:0"
    ask = ["sacct", "-nXP", "-o", "jobid,state,exitcode", "-j", job]
    labs.until(lambda: subprocess.check_output(ask, text=True).strip() == wanted, wanted)


def test_a_user_submits_from_the_login_node(
    slurm_login: Sshd, slurm_cluster: Cluster, ssh_client: Client
) -> None:
    command = "sbatch --wait --output=out --wrap 'id -un; pwd; hostname' >/dev/null; cat out"
    run = subprocess.run(
        ["ssh", "-F", str(ssh_client.config), "login", command], capture_output=True, text=True, check=False
    )
    user, home, node = run.stdout.split()
    assert (user, home) == ("ada", str(slurm_cluster.lab.home / "ada"))
    assert node in ("n1", "n2", "n3")


def test_paths_are_short_enough_for_sockets(slurm_cluster: Cluster) -> None:
    assert len(os.fspath(slurm_cluster.folder / "mysql.sock")) < 60
