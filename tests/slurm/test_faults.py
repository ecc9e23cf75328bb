"""What can happen to a Slurm job, and what its task then says: the right status, the right reason, nothing twice.

Every task appends a line per start to a file that all nodes share, so that a doubled or lost start shows.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flow_core import config, providers
from flow_core.engine import Engine
from flow_core.errors import ProviderUnavailable
from flow_core.ids import TaskId, random_key
from flow_core.models import Snapshot, TaskConfig, TaskSpec, TaskStatus
from flow_core.providers.spi import Provider
from tests.infra import notice
from tests.infra.lab import until
from tests.infra.slurm import Cluster

PATIENCE_S = 180.0


class Bench:
    """A provider on the test cluster, and tasks whose starts are counted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.ids: list[str] = []

    def provider(self, **settings: Any) -> Provider:
        home = str(self.folder / "home")
        common = {"home": home, "kill_grace_s": 1.0, "memory": "200M", **settings}
        return providers.load(config.load(provider="slurm", slurm=common))

    def start(self, provider: Provider, then: str, **fields: Any) -> str:
        task_id = str(TaskId.first("fault", random_key()))
        provider.submit(self.spec(task_id, then, **fields), task_id=task_id)
        return task_id

    def spec(self, task_id: str, then: str, **fields: Any) -> TaskSpec:
        fields.setdefault("instance_type", "cpu")
        counted = f"echo start >> '{self.file(task_id, 'starts')}'; {then}"
        return TaskSpec.from_config(TaskConfig(shell=counted, **fields))

    def file(self, task_id: str, name: str) -> Path:
        return self.folder / f"{name}-{task_id}"

    def starts(self, task_id: str) -> int:
        file = self.file(task_id, "starts")
        return file.read_text().count("start") if file.exists() else 0

    def started(self, task_id: str, times: int = 1) -> str:
        """Wait until a task has started so often; return its job."""
        try:
            until(lambda: self.starts(task_id) >= times, f"start {times} of {task_id}", within_s=PATIENCE_S)
        except AssertionError as error:
            queue = self.cluster.command("squeue", "-t", "all", "-o", "%A %j %T %r %N")
            nodes = self.cluster.command("sinfo", "-N", "-o", "%N %T %E")
            raise AssertionError(f"{error}\n{queue}\n{nodes}\n{self.cluster.log('slurmctld')}") from None
        return self.job(task_id)

    def job(self, task_id: str) -> str:
        queue = self.cluster.command("squeue", "-h", "-t", "all", "-o", "%A %j").splitlines()
        return next(line.split()[0] for line in queue if task_id in line)

    def end(self, provider: Provider, task_id: str) -> Snapshot:
        return Engine(provider).wait([task_id], timeout=PATIENCE_S)[task_id]

    def noticed(
        self, provider: Provider, task_id: str, fault: str, seen: Callable[[Snapshot], bool] | None = None
    ) -> Snapshot:
        """Wait until the provider shows it (an end, if nothing else is asked for), and note how long that took."""
        begin = time.monotonic()
        while True:
            snapshot = provider.poll([task_id])[task_id]
            if seen(snapshot) if seen else snapshot.status.final:
                break
            assert time.monotonic() - begin < PATIENCE_S, snapshot
            time.sleep(0.05)
        notice.record(
            "slurm", fault, "poll", time.monotonic() - begin, f"{snapshot.status} {snapshot.reason}"
        )
        return snapshot


@pytest.fixture
def bench(slurm_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(slurm_cluster, own_settings(tmp_path, monkeypatch, slurm_cluster))


def own_settings(folder: Path, patch: pytest.MonkeyPatch, cluster: Cluster) -> Path:
    """Let nothing of the user's configuration count, and Slurm's tools find the cluster; return the folder."""
    for name in [name for name in os.environ if name.startswith("FLOW_")]:
        if name != notice.VARIABLE:
            patch.delenv(name)
    (folder / "config.yaml").write_text("{}")
    patch.setenv("FLOW_CONFIG", str(folder / "config.yaml"))
    for name, value in cluster.env.items():
        patch.setenv(name, value)
    return folder


def ready(bench: Bench, task_id: str) -> str:
    """Shell lines of a task that runs until it is told to end."""
    return f"echo ready; until test -e '{bench.file(task_id, 'go')}'; do sleep 0.05; done; echo done"


FOREVER = "echo ready; sleep 1000"

# --- what ends a job -------------------------------------------------------------------------------------------------


def test_a_killed_batch_shell_is_a_failure_and_leaves_no_process(bench: Bench) -> None:
    provider = bench.provider()
    task_id = bench.start(provider, FOREVER)
    job = bench.started(task_id)
    bench.cluster.kill_shell(job, signal.SIGKILL)
    seen = bench.noticed(provider, task_id, "kill -9 of the batch shell")
    assert (seen.status, seen.reason) == (TaskStatus.FAILED, "runner-died")
    assert "SIGKILL" in seen.message
    until(lambda: not bench.cluster.processes(job), "the end of the job's processes")
    assert bench.starts(task_id) == 1


def test_an_end_is_seen_also_while_another_task_is_polled(bench: Bench) -> None:
    """The queue is asked every 2 s for a whole process: not only for the task whose poll happens to be due."""
    provider = bench.provider()
    other, task_id = bench.start(provider, FOREVER), bench.start(provider, FOREVER)
    bench.started(other)
    job = bench.started(task_id)
    provider.poll([task_id])
    bench.cluster.kill_shell(job)

    record = bench.folder / "home" / "tasks" / TaskId.parse(task_id).digest / "1" / "exit.json"

    def written() -> bool:
        provider.poll([other])
        return record.exists()

    until(written, "the record of a task that nobody polls")
    assert provider.poll([task_id])[task_id].reason == "runner-died"


def test_more_memory_than_asked_for_is_out_of_memory(bench: Bench) -> None:
    provider = bench.provider(memory="60M")
    eat = "python3 -c 'import time; x = bytearray(300_000_000); print(len(x), flush=True); time.sleep(1000)'"
    task_id = bench.start(provider, eat)
    bench.started(task_id)
    seen = bench.noticed(provider, task_id, "more memory than asked for")
    assert (seen.status, seen.reason) == (TaskStatus.FAILED, "out-of-memory")
    assert bench.starts(task_id) == 1


def test_the_tasks_own_time_limit_is_kept_to_the_second(bench: Bench) -> None:
    provider = bench.provider()
    task_id = bench.start(provider, FOREVER, max_run_time_hours=1 / 3600)
    bench.started(task_id)
    seen = bench.noticed(provider, task_id, "max_run_time_hours of 1 s")
    assert (seen.status, seen.reason) == (TaskStatus.FAILED, "time-limit")


def test_scancel_by_hand_is_a_cancellation(bench: Bench) -> None:
    provider = bench.provider()
    task_id = bench.start(provider, FOREVER)
    bench.cluster.command("scancel", bench.started(task_id))
    seen = bench.noticed(provider, task_id, "scancel by somebody else")
    assert (seen.status, seen.reason) == (TaskStatus.CANCELLED, "cancelled")
    assert bench.starts(task_id) == 1


def test_a_dependency_that_can_never_be_satisfied_is_named(bench: Bench) -> None:
    failed = bench.cluster.command("sbatch", "--parsable", "--output=/dev/null", "--hold", "--wrap", "exit 1")
    provider = bench.provider(directives={"dependency": f"afterok:{failed}"})
    task_id = bench.start(provider, FOREVER)
    assert provider.poll([task_id])[task_id].status is TaskStatus.PENDING
    bench.cluster.command("scontrol", "release", failed)
    seen = bench.noticed(provider, task_id, "a dependency that has failed")
    assert (seen.status, seen.reason) == (TaskStatus.FAILED, "dependency")
    assert bench.starts(task_id) == 0


# --- what starts a job again -----------------------------------------------------------------------------------------


def test_a_requeued_job_goes_on_under_the_same_task(bench: Bench) -> None:
    provider = bench.provider()
    task_id = str(TaskId.first("fault", random_key()))
    provider.submit(bench.spec(task_id, ready(bench, task_id)), task_id=task_id)
    bench.cluster.requeue(bench.started(task_id))
    waits = bench.noticed(provider, task_id, "requeue", lambda seen: seen.status is TaskStatus.PREEMPTED)
    assert not waits.status.final
    bench.started(task_id, times=2)
    bench.file(task_id, "go").touch()
    seen = bench.end(provider, task_id)
    assert (seen.status, seen.preemptions) == (TaskStatus.COMPLETED, 1)
    assert bench.starts(task_id) == 2
    assert provider.read_log(task_id).data.decode().count("done") == 1


def test_a_preempted_job_goes_on_when_its_nodes_are_free(bench: Bench) -> None:
    provider = bench.provider(directives={"exclusive": None}, partition="spot")
    task_id = str(TaskId.first("fault", random_key()))
    provider.submit(bench.spec(task_id, ready(bench, task_id)), task_id=task_id)
    bench.started(task_id)
    wanted = ["--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1000"]
    better = bench.cluster.command("sbatch", "--parsable", *wanted)
    bench.noticed(provider, task_id, "preemption, requeued", lambda seen: seen.status is TaskStatus.PREEMPTED)
    bench.cluster.command("scancel", better)
    bench.started(task_id, times=2)
    bench.file(task_id, "go").touch()
    seen = bench.end(provider, task_id)
    assert (seen.status, seen.preemptions) == (TaskStatus.COMPLETED, 1)
    assert bench.starts(task_id) == 2


def test_a_preempted_job_that_is_not_started_again_has_failed(bench: Bench) -> None:
    provider = bench.provider(directives={"exclusive": None}, partition="cancelspot")
    task_id = bench.start(provider, FOREVER)
    bench.started(task_id)
    bench.cluster.command("sbatch", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1000")
    seen = bench.noticed(provider, task_id, "preemption, cancelled")
    assert (seen.status, seen.reason) == (TaskStatus.FAILED, "preempted")
    assert bench.starts(task_id) == 1


@pytest.mark.parametrize("requeue", [True, False], ids=["requeued", "not requeued"])
def test_a_node_that_is_declared_down(bench: Bench, requeue: bool) -> None:
    provider = bench.provider(requeue=requeue, directives={"nodelist": "n2"})
    task_id = str(TaskId.first("fault", random_key()))
    provider.submit(bench.spec(task_id, ready(bench, task_id)), task_id=task_id)
    bench.started(task_id)
    bench.cluster.set_down("n2")
    if not requeue:
        seen = bench.noticed(provider, task_id, "node down, not requeued")
        assert (seen.status, seen.reason) == (TaskStatus.FAILED, "node-failed")
        assert bench.starts(task_id) == 1
        return
    bench.noticed(provider, task_id, "node down, requeued", lambda seen: seen.status is TaskStatus.PREEMPTED)
    bench.cluster.resume_node("n2")
    bench.started(task_id, times=2)
    bench.file(task_id, "go").touch()
    seen = bench.end(provider, task_id)
    assert (seen.status, seen.preemptions) == (TaskStatus.COMPLETED, 1)
    assert bench.starts(task_id) == 2


# --- what Slurm takes its time for -----------------------------------------------------------------------------------


@dataclass
class Row:
    """A task to which something happens that Slurm notices late: `shown` is what it then said, `ended` how it ended."""

    fault: str
    settings: dict[str, Any]
    shown: Snapshot | None = None
    ended: Snapshot | None = None
    starts: int = 0
    task_id: str = field(default_factory=lambda: str(TaskId.first("fault", random_key())))

    @property
    def goes_on(self) -> bool:
        return bool(self.settings.get("requeue"))


# Slurm looks at time limits every half a minute, and takes SlurmdTimeout (10 s here, 300 s by default) and some more to
# give up a silent node. All rows happen at once.


@pytest.fixture(scope="module")
def rows(_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Row]]:
    rows = {"time limit": Row("Slurm's own time limit", {"directives": {"time": "1", "nodelist": "n1"}})}
    for how, node in (("slurmd and stepd killed", "n2"), ("node without power", "n3")):
        for words, requeue in (("requeued", True), ("not requeued", False)):
            name = f"{how}, {words}"
            rows[name] = Row(name, {"requeue": requeue, "directives": {"nodelist": node}})
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(_cluster, own_settings(tmp_path_factory.mktemp("slowly"), patch, _cluster))
        try:
            happen(bench, rows)
            yield rows
        finally:
            _cluster.tidy()


def happen(bench: Bench, rows: dict[str, Row]) -> None:
    for row in rows.values():
        spec = bench.spec(row.task_id, ready(bench, row.task_id))
        bench.provider(**row.settings).submit(spec, task_id=row.task_id)
    jobs = [bench.started(row.task_id) for row in rows.values()]
    # The least limit is a minute, and so this one comes to an end now.
    bench.cluster.command("scontrol", "update", f"jobid={jobs[0]}", "endtime=now")
    begin = time.monotonic()
    bench.cluster.kill_slurmd("n2")
    bench.cluster.crash_node("n3")
    assert not any(bench.cluster.processes(job) for job in jobs[3:]), "what ran on n3 is gone"
    provider = bench.provider()
    while left := [row for row in rows.values() if row.shown is None]:
        assert time.monotonic() - begin < PATIENCE_S, left
        for row in left:
            seen = provider.poll([row.task_id])[row.task_id]
            if seen.status.final or seen.status is TaskStatus.PREEMPTED:
                row.shown = seen
                outcome = f"{seen.status} {seen.reason}"
                notice.record("slurm", row.fault, "poll", time.monotonic() - begin, outcome)
        time.sleep(0.1)
    for row in rows.values():
        if row.goes_on:
            bench.cluster.resume_node("n2")
            bench.cluster.resume_node("n3")
            bench.started(row.task_id, times=2)
            bench.file(row.task_id, "go").touch()
        row.ended, row.starts = bench.end(provider, row.task_id), bench.starts(row.task_id)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_slurms_own_time_limit_is_a_time_limit(rows: dict[str, Row]) -> None:
    row = rows["time limit"]
    assert row.ended is not None
    assert (row.ended.status, row.ended.reason, row.starts) == (TaskStatus.FAILED, "time-limit", 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["slurmd and stepd killed", "node without power"])
def test_a_job_whose_node_is_gone_goes_on_elsewhere_or_later(rows: dict[str, Row], how: str) -> None:
    row = rows[f"{how}, requeued"]
    assert row.shown is not None and row.shown.status is TaskStatus.PREEMPTED
    assert row.ended is not None
    assert (row.ended.status, row.ended.preemptions, row.starts) == (TaskStatus.COMPLETED, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["slurmd and stepd killed", "node without power"])
def test_a_job_whose_node_is_gone_has_failed_where_it_may_not_be_requeued(
    rows: dict[str, Row], how: str
) -> None:
    row = rows[f"{how}, not requeued"]
    assert row.ended is not None
    assert (row.ended.status, row.ended.reason, row.starts) == (TaskStatus.FAILED, "node-failed", 1)


# --- without a controller --------------------------------------------------------------------------------------------

CONTROLLER = {
    "stopped": (Cluster.stop_controller, Cluster.start_controller),
    "killed": (Cluster.crash_controller, Cluster.start_controller),
    "frozen": (Cluster.freeze_controller, Cluster.thaw_controller),
}


#: Nobody answers, so that each tool takes as long as it may.
COMMAND_TIMEOUT_S = 1.0


@pytest.mark.parametrize("how", list(CONTROLLER))
@pytest.mark.timeout(400)
def test_without_a_controller_nothing_is_lost_and_nothing_hangs(bench: Bench, how: str) -> None:
    begin, end = CONTROLLER[how]
    provider, impatient = bench.provider(), bench.provider(command_timeout_s=COMMAND_TIMEOUT_S)
    running, unwanted, fresh = (str(TaskId.first("fault", random_key())) for _ in range(3))
    provider.submit(bench.spec(running, ready(bench, running)), task_id=running)
    provider.submit(bench.spec(unwanted, FOREVER), task_id=unwanted)
    for task_id in (running, unwanted):
        bench.started(task_id)
    begin(bench.cluster)
    questions: dict[str, Callable[[], Any]] = {
        "submit": lambda: impatient.submit(bench.spec(fresh, "echo done"), task_id=fresh),
        "poll": lambda: impatient.poll([running])[running],
        "read_log": lambda: impatient.read_log(running),
        "cancel": lambda: impatient.cancel([unwanted]),
    }
    fault = f"controller {how}, command_timeout_s of {COMMAND_TIMEOUT_S:g} s"
    asked = {what: ask(fault, what, question) for what, question in questions.items()}
    assert isinstance(asked["submit"], ProviderUnavailable)
    assert isinstance(asked["poll"], ProviderUnavailable) or not asked["poll"].status.final
    assert asked["read_log"].data == b"ready\n"
    bench.file(running, "go").touch()
    until(lambda: b"done" in provider.read_log(running).data, "the end of the work, without a controller")
    end(bench.cluster)
    if asked["cancel"] is not None:
        provider.cancel([unwanted])
    seen = bench.end(provider, running)
    assert (seen.status, bench.starts(running)) == (TaskStatus.COMPLETED, 1)
    seen = bench.end(provider, unwanted)
    assert (seen.status, seen.reason, bench.starts(unwanted)) == (TaskStatus.CANCELLED, "cancelled", 1)
    for _ in range(2):
        provider.submit(bench.spec(fresh, "echo done"), task_id=fresh)
    assert bench.end(provider, fresh).status is TaskStatus.COMPLETED
    assert bench.starts(fresh) == 1


def ask(fault: str, what: str, question: Callable[[], Any]) -> Any:
    """Return the answer, or the error that came in its place; note how long it took."""
    begin = time.monotonic()
    answer: Any
    try:
        answer = question()
    except Exception as error:
        answer = error
    notice.record("slurm", fault, what, time.monotonic() - begin, type(answer).__name__)
    return answer
