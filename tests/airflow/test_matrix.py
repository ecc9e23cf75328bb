"""Everything that can happen to a task, in each mode, at each moment: counted by what the work itself writes down.

What must come of it stands in matrix.py. Cells that do not disturb each other happen at the same time. All of them are
tested on PostgreSQL and with AIRFLOW_TEST_MATRIX=whole, the most telling ones on SQLite too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flow_core import Flow
from tests.airflow.harness import Airflow, until
from tests.airflow.held import Case, all_of
from tests.airflow.matrix import PAGE, Cell, Lasts, Outcome, cells, page_with_table, repeated

pytestmark = pytest.mark.timeout(900)

_WHOLE = (
    os.environ.get("AIRFLOW_TEST_DATABASE") == "postgresql"
    or os.environ.get("AIRFLOW_TEST_MATRIX") == "whole"
)
CELLS = cells() if _WHOLE else repeated()


class Matrix:
    """Makes a batch of cells happen when the first of them is asked for."""

    def __init__(self, airflow: Airflow, flow: Flow, folder: Path) -> None:
        self.airflow, self.flow, self.folder = airflow, flow, folder
        self._outcomes: dict[str, Outcome] = {}
        self._logs: dict[str, str] = {}
        self._tried: set[str] = set()

    def outcome(self, cell: Cell) -> Outcome:
        if str(cell) not in self._tried:
            batch = [other for other in CELLS if _together(cell, other)]
            self._tried.update(str(other) for other in batch)
            self._run(batch)
        assert str(cell) in self._outcomes, "its batch has failed: see the first test of it"
        return self._outcomes[str(cell)]

    def log(self, cell: Cell) -> str:
        return self._logs.get(str(cell), "")

    def _run(self, batch: list[Cell]) -> None:
        until("no DAG run is under way", self.airflow.idle, 180)
        cases: list[Case] = []
        try:
            with self._gpus_taken() as give_back:
                for wave in waves(batch):
                    begun = [Case.begin(cell, self.airflow, self.flow, self.folder) for cell in wave]
                    cases += begun
                    all_of("the cells are at their moment", begun, Case.arrived, 180)
                self._act(cases)
                for case in cases:
                    case.go_on()
                all_of("the work has left the queue", cases, Case.left_the_queue, 90)
                give_back()
                with contextlib.suppress(AssertionError):  # the outcomes show it
                    all_of("the cells have ended", cases, Case.ended, 180)
                time.sleep(3)  # whatever starts once too often starts now
            for case in cases:
                self._outcomes[str(case.cell)] = case.outcome()
                self._logs[str(case.cell)] = case.log()
        finally:
            for case in cases:
                case.clean_up()

    def _act(self, cases: list[Case]) -> None:
        first = cases[0].cell.row
        if first.to_all:
            happens(self.airflow, first.name)
        else:
            for case in cases:
                case.act()
            all_of("what happens between two tries has happened", cases, Case.acted_between, 90)

    @contextlib.contextmanager
    def _gpus_taken(self) -> Iterator[Callable[[], None]]:
        """All GPUs are somebody else's until the end, or until they are given back."""
        other = self.flow.run(["sleep", "900"], gpu="4xa100", upload_code=False)
        until("the GPUs are taken", lambda: self.flow.get_task(other.task_id).is_running, 60)
        try:
            yield other.cancel
        finally:
            other.cancel()


def happens(airflow: Airflow, what: str) -> None:
    match what:
        case "kill-triggerer":
            airflow.control("kill", "triggerer")
            airflow.control("start", "triggerer")
        case "kill-scheduler":
            airflow.control("kill", "scheduler")
            airflow.control("start", "scheduler")
        case "kill-api-server":
            airflow.control("kill", "api-server")
            airflow.control("start", "api-server")
            until("the API answers", airflow.healthy, 240)
        case "shutdown":
            for name in ("scheduler", "triggerer"):
                airflow.control("shut", name)
            for name in ("scheduler", "triggerer"):
                airflow.control("start", name)


def _together(one: Cell, other: Cell) -> bool:
    return one.row == other.row or not (one.row.to_all or other.row.to_all)


def waves(batch: list[Cell]) -> Iterator[list[Cell]]:
    """Share the cells out so that each comes to its moment soon after it has begun; whose moment passes comes last."""
    for lasting in (Lasts.LONG, Lasts.TO_A_LIMIT, Lasts.SHORT):
        rest = [cell for cell in batch if cell.lasts is lasting]
        for first in range(0, len(rest), 8):
            yield rest[first : first + 8]


@pytest.fixture(scope="module")
def matrix(airflow: Airflow, flow: Flow, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(airflow, flow, tmp_path_factory.mktemp("matrix"))


def test_the_page_shows_what_is_tested() -> None:
    assert PAGE.read_text() == page_with_table(), "write it anew: python -m tests.airflow table"


@pytest.mark.every_airflow
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_what_becomes_of_the_work(matrix: Matrix, cell: Cell) -> None:
    seen = matrix.outcome(cell)
    assert cell.expected.fits(seen), f"{seen}, and not {cell.expected}\n{matrix.log(cell)}"
