"""A cell of the matrix as it happens: held work in a DAG run, brought to its moment, and watched to its end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flow_core import Flow
from tests.airflow.harness import ENDED, Airflow, TaskRun, until
from tests.airflow.matrix import Cell, Outcome

#: What Airflow says about a task instance.
Info = dict[str, Any]


def pids(trail: Path) -> list[int]:
    """Return the process ids of the work that has started, in order."""
    lines = trail.read_text().splitlines() if trail.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("start ")]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def let_end(trail: Path) -> None:
    """Have the work come to its end."""
    _mark(trail, "go")


def kill_worker(task: TaskRun) -> None:
    """Kill the process of an Airflow task, and the one that supervises it, as a lost machine does."""
    worker = until("Airflow knows the worker's process", lambda: task.info["pid"])
    supervisor = _parent(worker)
    for one in (supervisor, worker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def lose_machine(pid: int) -> None:
    """Kill a process of some work and whatever else carries the same task's name, as a machine that is switched off."""
    mine = next(one for one in _environment(pid) if one.startswith(b"FLOW_TASK_DIR="))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and mine in _environment(int(entry.name)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


@dataclass
class Case:
    """A cell in a DAG run of its own."""

    cell: Cell
    task: TaskRun
    trail: Path
    flow: Flow
    flow_task_id: str = ""

    @classmethod
    def begin(cls, cell: Cell, airflow: Airflow, flow: Flow, folder: Path) -> Case:
        trail = folder / str(cell)
        gpu = "1xa100" if cell.moment == "queued" else None
        dag_id = "_".join(part for part in ("held", cell.mode, cell.row.dag) if part)
        if cell.moment == "finished" and cell.on_worker:
            _mark(trail, "hold")
        if cell.moment == "finished" and cell.mode == "sync":
            _mark(trail, "go")
        return cls(cell, airflow.trigger(dag_id, trail=str(trail), gpu=gpu).task("work"), trail, flow)

    # -- to its moment

    def arrived(self, info: Info) -> bool:
        """Whether the moment has come."""
        moment, state = self.cell.moment, info["state"]
        if moment == "finished" and self.cell.on_worker:
            if state == "deferred":
                _mark(self.trail, "go")
            return Path(f"{self.trail}.at-gate").exists()
        if state != self._waiting:
            return False
        if moment == "finished":
            _mark(self.trail, "go")
            return bool(pids(self.trail)) and not self.alive()
        self.flow_task_id = self.task.xcom("flow_task_id") or ""
        return bool(self.flow_task_id) and (moment == "queued" or bool(pids(self.trail)))

    @property
    def _waiting(self) -> str:
        """The state in which Airflow shows the task while the work is under way."""
        return "running" if self.cell.mode == "sync" else "deferred"

    # -- what happens

    def act(self) -> None:
        match self.cell.row.name:
            case "mark-failed":
                self.task.mark("failed")
            case "mark-success":
                self.task.mark("success")
            case "clear":
                self.task.run.clear("work")
            case "run-failed":
                self.task.run.mark("failed")
            case "lose-machine":
                lose_machine(pids(self.trail)[0])
            case "kill-worker" | "give-up" | "mark-between" | "run-failed-between":
                kill_worker(self.task)

    def acted_between(self, info: Info) -> bool:
        """Whether what happens between two tries has happened; do it when the first has been given up."""
        name = self.cell.row.name
        if not name.endswith("between"):
            return True
        if info["state"] != "up_for_retry":
            return False
        (self.task if name == "mark-between" else self.task.run).mark("failed")
        return True

    def go_on(self) -> None:
        """Let the worker go on, unless something is still to happen to it."""
        if not self.cell.row.limit or self.cell.expected.result:
            self._open_gate()

    def _open_gate(self) -> None:
        Path(f"{self.trail}.hold").unlink(missing_ok=True)

    # -- to its end

    def left_the_queue(self, _info: Info) -> bool:
        """Whether work that was queued, and is not to go on, has been taken out of the queue."""
        if self.cell.moment != "queued" or self.cell.row.keeps_work:
            return True
        return self.flow.poll([self.flow_task_id])[self.flow_task_id].status.final

    def ended(self, info: Info) -> bool:
        """Whether all is over. Lets the work end where it is meant to, and only when that is due."""
        if self.cell.expected.result and self._work_may_end(info):
            _mark(self.trail, "go")
        if info["state"] not in ENDED:
            return False
        self._open_gate()
        return not self.alive()

    def _work_may_end(self, info: Info) -> bool:
        if not self.cell.row.keeps_work:
            return len(pids(self.trail)) >= self.cell.expected.starts
        return info["try_number"] >= (self.cell.expected.tries or 1) and info["state"] in (
            self._waiting,
            *ENDED,
        )

    def alive(self) -> list[int]:
        return [pid for pid in pids(self.trail) if alive(pid)]

    def outcome(self) -> Outcome:
        info, started, xcom = self.task.info, pids(self.trail), self.task.xcom()
        return Outcome(
            state=info["state"],
            starts=len(started),
            tries=info["try_number"],
            result=xcom is not None and xcom["pid"] == started[-1],
            left=len(self.alive()),
        )

    def log(self) -> str:
        """Return what Airflow shows of each try."""
        tries = range(1, self.task.info["try_number"] + 1)
        return "\n".join(f"--- try {number}\n{self.task.log(number)}" for number in tries)

    def clean_up(self) -> None:
        """Leave nothing that could disturb another case, whatever has become of this one."""
        _mark(self.trail, "go")
        self._open_gate()
        if self.task.run.state() not in ("success", "failed"):
            self.task.run.mark("failed")


def all_of(what: str, cases: Iterable[Case], asked: Callable[[Case, Info], bool], timeout_s: float) -> None:
    """Wait until each case has once given the answer yes. Airflow is asked about all of them at once."""
    waiting = list(cases)
    deadline = time.monotonic() + timeout_s
    while waiting:
        airflow = waiting[0].task.run.airflow
        infos = airflow.task_instances([case.task.run.run_id for case in waiting])
        waiting = [case for case in waiting if not asked(case, infos[case.task.run.run_id])]
        if waiting and time.monotonic() > deadline:
            left = ", ".join(f"{case.cell} ({case.task.state()})" for case in waiting)
            raise AssertionError(f"not within {timeout_s:g} s: {what}: {left}")
        time.sleep(0.5)


def _mark(trail: Path, what: str) -> None:
    Path(f"{trail}.{what}").touch()
