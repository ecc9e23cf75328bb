"""The matrix of what can happen to a task of FlowGPUOperator, when, and what must have become of it. Only data.

The table in docs/airflow-lifecycle.md is made of this (`python -m tests.airflow table`), and test_matrix.py makes every
cell happen in a real Airflow.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Literal

Mode = Literal["sync", "deferred"]
Moment = Literal["queued", "running", "finished"]
State = Literal["success", "failed", "skipped"]

MODES: tuple[Mode, ...] = ("sync", "deferred")
#: Of the work: it waits for a GPU; it runs; it has ended, but Airflow does not know yet. In sync mode the worker then
#: stands between `execute` and the storing of the XCom, in deferred mode the trigger holds its event back.
MOMENTS: tuple[Moment, ...] = ("queued", "running", "finished")


class Lasts(Enum):
    """How long a moment lasts."""

    LONG = "until the test ends it"
    TO_A_LIMIT = "until Airflow's clock ends it"
    SHORT = "until the trigger no longer holds its event back"


@dataclass(frozen=True)
class Outcome:
    """What a cell ends as."""

    #: The state of the Airflow task.
    state: State
    #: How often the work has started, as it notes itself.
    starts: int
    #: The number of Airflow's last try; None where that depends on how fast something comes back.
    tries: int | None = 1
    #: Whether the result of the last start is the task's XCom; None where Airflow may store it before it ends the task.
    result: bool | None = False
    #: Processes of the work that are left.
    left: int = 0

    def fits(self, seen: Outcome) -> bool:
        """Whether this is what was expected of what has been seen."""
        tries = seen.tries if self.tries is None else self.tries
        result = seen.result if self.result is None else self.result
        return seen == replace(self, tries=tries, result=result)

    def __str__(self) -> str:
        starts = {0: "never started", 1: "started once"}.get(self.starts, f"started {self.starts} times")
        tries = {1: "", None: ", whatever the try"}.get(self.tries, f", try {self.tries}")
        left = f", {self.left} LEFT RUNNING" if self.left else ""
        return f"{self.state}{tries}; {starts}{left}"


def done(*, starts: int = 1, tries: int | None = 1) -> Outcome:
    return Outcome("success", starts=starts, tries=tries, result=True)


def ended(state: State = "failed", *, starts: int) -> Outcome:
    return Outcome(state, starts=starts)


@dataclass(frozen=True)
class Row:
    """Something that happens, and the outcome by mode and moment; a text says why there is no such case."""

    name: str
    title: str
    sync: Cells | str
    deferred: Cells | str
    #: The DAG of each mode, without the mode's name.
    dag: str = ""
    #: It happens to all tasks of this Airflow at once.
    to_all: bool = False
    #: A later try takes the work over.
    adopted: bool = False
    #: It happens to a process on a worker, of a deferred task to the one that takes over from the trigger.
    to_worker: bool = False
    #: It happens by itself, when a time is up.
    limit: bool = False

    @property
    def keeps_work(self) -> bool:
        """Whether the work goes on as if nothing had happened."""
        return self.to_all or self.adopted

    def at(self, mode: Mode, moment: Moment) -> Outcome | str:
        """Return what must come of it then, or why there is no such case."""
        found = self.sync if mode == "sync" else self.deferred
        return found if isinstance(found, str) else found[moment]


@dataclass(frozen=True)
class Cell:
    """A row in one mode at one moment."""

    row: Row
    mode: Mode
    moment: Moment
    expected: Outcome = field(compare=False)

    @property
    def on_worker(self) -> bool:
        """Whether it happens to the process on a worker: that of the try, or the one that takes over from a trigger."""
        return self.mode == "sync" or self.row.to_worker

    @property
    def lasts(self) -> Lasts:
        """How long the task stays at its moment by itself."""
        if self.row.limit:
            return Lasts.TO_A_LIMIT
        return Lasts.LONG if self.moment != "finished" or self.on_worker else Lasts.SHORT

    def __str__(self) -> str:
        return f"{self.row.name}-{self.mode}-{self.moment}"


Cells = dict[Moment, Outcome | str]


def each(queued: Outcome | str, running: Outcome | str, finished: Outcome | str) -> Cells:
    return {"queued": queued, "running": running, "finished": finished}


def ends_as(state: State) -> Cells:
    return each(ended(state, starts=0), ended(state, starts=1), ended(state, starts=1))


_ENDS = ends_as("failed")
_AGAIN = each(done(starts=1, tries=2), done(starts=2, tries=2), done(starts=1, tries=2))
_UNTOUCHED = each(done(), done(), done())
_IN_TIME = each(done(tries=None), done(tries=None), done(tries=None))
_ADOPTED = each(done(tries=2), done(tries=2), done(tries=2))

_WAITS = "no worker has it"
_NO_MACHINE = "no machine has it"

ROWS = (
    Row("mark-failed", "marked failed", _ENDS, _ENDS),
    Row("mark-success", "marked success", ends_as("success"), ends_as("success")),
    Row("clear", "cleared", _AGAIN, _AGAIN),
    Row("run-failed", "DAG run marked failed", _ENDS, _ENDS),
    Row(
        "run-timeout",
        "`dagrun_timeout` passes",
        each(
            ended("skipped", starts=0), ended("skipped", starts=1), Outcome("skipped", starts=1, result=None)
        ),
        ends_as("skipped"),
        dag="run_limited",
        limit=True,
    ),
    Row(
        "execution-timeout",
        "`execution_timeout` passes",
        each(ended(starts=0), ended(starts=1), done()),
        each(ended(starts=0), ended(starts=1), done()),
        dag="limited",
        limit=True,
    ),
    Row(
        "defer-timeout",
        "the `timeout` of `defer` passes",
        "it is never deferred",
        each(ended(starts=0), ended(starts=1), done()),
        dag="times_out",
        limit=True,
    ),
    Row(
        "lose-machine",
        "the work's machine is lost",
        each(_NO_MACHINE, done(starts=2, tries=2), _NO_MACHINE),
        each(_NO_MACHINE, done(starts=2, tries=2), _NO_MACHINE),
    ),
    Row(
        "kill-worker",
        "kill -9 of task and supervisor",
        _ADOPTED,
        each(_WAITS, _WAITS, done(tries=2)),
        adopted=True,
        to_worker=True,
    ),
    Row(
        "give-up",
        "… in the last try",
        _ENDS,
        each(_WAITS, _WAITS, ended(starts=1)),
        dag="last_try",
        to_worker=True,
    ),
    Row("mark-between", "… and marked failed before the retry", _ENDS, _WAITS, dag="late_retry"),
    Row(
        "run-failed-between",
        "… and the DAG run marked failed",
        ends_as("skipped"),
        _WAITS,
        dag="late_retry",
    ),
    Row("kill-triggerer", "kill -9 of the triggerer", _UNTOUCHED, _UNTOUCHED, to_all=True),
    Row("kill-scheduler", "kill -9 of scheduler and workers", _ADOPTED, _UNTOUCHED, to_all=True),
    Row("kill-api-server", "kill -9 of the API server", _IN_TIME, _IN_TIME, dag="patient", to_all=True),
    Row("shutdown", "SIGTERM to scheduler, workers and triggerer", _ADOPTED, _UNTOUCHED, to_all=True),
)


def cells() -> list[Cell]:
    """Return all cells; those that happen to all tasks come last."""
    return [
        Cell(row, mode, moment, outcome)
        for row in sorted(ROWS, key=lambda row: row.to_all)
        for mode in MODES
        for moment in MOMENTS
        if isinstance(outcome := row.at(mode, moment), Outcome)
    ]


#: The cells that continuous integration repeats on SQLite and on the oldest Airflow, all at the same time: in each of
#: them another process of Airflow decides what becomes of the work, and writes it to the database.
REPEATED = (
    "mark-failed-sync-running",
    "mark-failed-deferred-running",
    "clear-sync-running",
    "clear-sync-finished",
    "clear-deferred-running",
    "kill-worker-sync-running",
    "give-up-sync-running",
    "run-failed-between-sync-running",
)


def repeated() -> list[Cell]:
    by_name = {str(cell): cell for cell in cells()}
    return [by_name[name] for name in REPEATED]


def table() -> str:
    """Return the matrix as Markdown, a line for each row and mode."""
    lines = [
        "| what happens | mode | " + " | ".join(_WHEN[moment] for moment in MOMENTS) + " |",
        "|---" * 5 + "|",
    ]
    for row in ROWS:
        for mode in MODES:
            texts = [str(row.at(mode, moment)) for moment in MOMENTS]
            lines.append(f"| {row.title} | {mode} | {' | '.join(texts)} |")
    return "\n".join(lines)


_WHEN = {
    "queued": "the work waits for a GPU",
    "running": "the work runs",
    "finished": "the work has just ended",
}


PAGE = Path(__file__).resolve().parents[2] / "docs" / "airflow-lifecycle.md"
_MARKS = ("<!-- the matrix: python -m tests.airflow table -->", "<!-- end of the matrix -->")


def page_with_table() -> str:
    """Return the page of the documentation as it must be: with this table between its marks."""
    before, _, rest = PAGE.read_text().partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    return f"{before}{_MARKS[0]}\n{table()}\n{_MARKS[1]}{after}"
