"""What this machine's Slurm prints when it is asked as the provider asks: kept for the tests of the parsers.

``python -m tests.infra.slurm_prints`` has one job of each kind in a cluster of its own and writes the answers to
`tests/providers/slurm_prints/VERSION.json`; ``python -m tests.infra.debian trixie .venvs/core/bin/python -m
tests.infra.slurm_prints`` does it with a newer Slurm. A job's name says what has happened to it.
"""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from pathlib import Path

from flow_core.runner import slurm_text
from tests.infra import lab as labs
from tests.infra import packages
from tests.infra.lab import Lab
from tests.infra.slurm import AccountedCluster

FOLDER = Path(__file__).resolve().parents[1] / "providers" / "slurm_prints"
FOREVER = "sleep 1000"
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED")
EAT = "python3 -c 'import time; x = bytearray(300_000_000); time.sleep(1000)'"

#: What sbatch refuses.
REFUSED = {
    "no such partition": ("sbatch", "--partition=nowhere", "--wrap=true"),
    "too many GPUs": ("sbatch", "--gres=gpu:a100:16", "--wrap=true"),
    "no such GPU": ("sbatch", "--gres=gpu:h100:1", "--wrap=true"),
    "too much memory": ("sbatch", "--mem=1T", "--wrap=true"),
    "no such feature": ("sbatch", "--constraint=none", "--wrap=true"),
    "no such option": ("sbatch", "--bogus", "--wrap=true"),
}


class Scene:
    """A cluster in which one job of each kind is made."""

    def __init__(self, cluster: AccountedCluster) -> None:
        self.cluster = cluster
        self.jobs: dict[str, str] = {}

    def sbatch(self, name: str, script: str, *options: str) -> str:
        common = ["sbatch", "--parsable", "--output=/dev/null", "--mem=60M", f"--job-name={name}"]
        self.jobs[name] = self.cluster.command(*common, *options, f"--wrap={script}")
        return self.jobs[name]

    def until(self, name: str, *states: str) -> None:
        """Wait for a state; scontrol's word, since it is not what is recorded."""

        def there() -> bool:
            return self.cluster.job(self.jobs[name]).get("JobState") in states

        labs.until(there, f"{name} to be {states}: {self.cluster.job(self.jobs[name])}", within_s=240)

    def running(self, name: str, script: str, *options: str) -> str:
        job = self.sbatch(name, script, *options)
        self.until(name, "RUNNING")
        labs.until(lambda: bool(self.cluster.processes(job)), f"the processes of {name}")
        return job

    def ended(self) -> None:
        """Make the jobs that have ended."""
        cluster = self.cluster
        self.sbatch("time-limit", FOREVER, "--time=1")
        self.sbatch("out-of-memory", EAT)
        self.sbatch("exits-0", "true")
        self.sbatch("exits-7", "exit 7")
        cluster.kill_shell(self.running("killed", FOREVER))
        cluster.command("scancel", self.running("cancelled", FOREVER))
        cluster.command("scancel", self.sbatch("cancelled-before", FOREVER, "--hold"))
        self.running("preempted", FOREVER, "--partition=cancelspot", "--nodelist=n2", "--exclusive")
        better = self.sbatch("better", FOREVER, "--nodelist=n2", "--exclusive")
        self.until("preempted", "PREEMPTED")
        cluster.command("scancel", better)
        self.running("node-down", FOREVER, "--nodelist=n3", "--no-requeue")
        cluster.set_down("n3")
        self.until("node-down", "NODE_FAIL")
        cluster.resume_node("n3")
        failed = self.sbatch("fails", "exit 1", "--hold")
        self.sbatch("never", FOREVER, f"--dependency=afterok:{failed}", "--kill-on-invalid-dep=yes")
        cluster.command("scontrol", "release", failed)
        for name in self.jobs:
            self.until(name, *ENDS)

    def live(self) -> None:
        """Make the jobs that go on."""
        cluster = self.cluster
        self.running("two-nodes", FOREVER, "--nodes=2", "--gres=gpu:a100:3", "--nodelist=n1,n2")
        cluster.requeue(self.running("requeued", FOREVER, "--nodelist=n1"))
        self.until("requeued", "PENDING")
        self.until("requeued", "RUNNING")
        cluster.command("scontrol", "suspend", self.running("suspended", FOREVER, "--nodelist=n1"))
        self.sbatch("held", FOREVER, "--hold")
        self.sbatch("later", FOREVER, "--begin=now+1hour")
        self.sbatch("waits", FOREVER, f"--dependency=afterany:{self.jobs['two-nodes']}")
        self.sbatch("too-big", FOREVER, "--nodes=3", "--exclusive")
        script = "case $SLURM_ARRAY_TASK_ID in 0) exit 0;; 1) exit 3;; *) sleep 1000;; esac"
        self.sbatch("array", script, "--array=0-3%1")
        asked = ["squeue", "-h", "-r", "-t", "all", "-n", "array", "-o", "%K %T"]
        labs.until(
            lambda: "2 RUNNING" in cluster.command(*asked), "the array's element 2 to run", within_s=120
        )
        cluster.command("scontrol", "update", "nodename=n3", "state=drain", "reason=test")


def record(cluster: AccountedCluster) -> Path:
    """Write down what the tools print; return the file."""
    scene = Scene(cluster)
    scene.ended()
    scene.live()
    accounting = slurm_text.accounting_command(sorted(scene.jobs.values(), key=int))
    array = scene.jobs["array"]
    # The accounting hears of everything in turn, and of this last.
    labs.until(
        lambda: f"{array}_2|RUNNING" in cluster.command(*accounting), "the accounting to know", within_s=120
    )
    config = cluster.command("scontrol", "show", "config").splitlines()
    prints = {
        "sbatch": cluster.command("sbatch", "--parsable", "--output=/dev/null", "--hold", "--wrap=true"),
        "squeue": cluster.command(*slurm_text.queue_command([])).splitlines(),
        "sacct": cluster.command(*accounting).splitlines(),
        "sinfo": cluster.command(*slurm_text.nodes_command()).splitlines(),
        "scontrol show config": [line for line in config if line.startswith(("Cluster", "Max"))],
        "refused": {what: complaint(cluster, *argv) for what, argv in REFUSED.items()},
    }
    cluster.stop_controller()
    prints["no controller"] = complaint(cluster, "squeue")
    version = cluster.command("slurmctld", "-V").split()[-1]
    file = FOLDER / f"{version}.json"
    file.write_text(json.dumps(prints, indent=1) + "\n")
    return file


def complaint(cluster: AccountedCluster, *argv: str) -> str:
    """Return what a tool says on stderr."""
    env = [f"{name}={value}" for name, value in cluster.env.items()]
    run = subprocess.run(cluster.lab.command("env", *env, *argv), capture_output=True, text=True, check=False)
    return run.stderr


def main() -> None:
    packages.install(packages.SSH, packages.SLURM, packages.ACCOUNTING)
    with closing(Lab()) as lab, lab.entered():
        print(record(AccountedCluster(lab, min_job_age_s=300)))


if __name__ == "__main__":
    main()
