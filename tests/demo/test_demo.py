"""The demo: what its table says, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

from example_dags import demo
from example_dags.hosts.outcome import Outcome
from flow_core.models import Snapshot, TaskStatus
from tests.conftest import processes_under

DEMO = Path(demo.__file__)

OUTCOME = Outcome(
    version="1.0",
    results=[{"setting": {"C": 1.0}, "accuracy": 0.9, "fold_accuracies": [0.9], "seconds": 1.0}],
    report={"setting": {"C": 1.0}, "test_accuracy": 0.9639, "confusion": [[1]], "picture": "/a.png"},
    started=100.0,
    ended=110.0,
)


def ran(start: float, end: float) -> Snapshot:
    times = [datetime.fromtimestamp(seconds, timezone.utc) for seconds in (start, end)]
    return Snapshot(
        task_id="t", name="t", status=TaskStatus.COMPLETED, started_at=times[0], ended_at=times[1]
    )


def row(host: str, outcome: Outcome = OUTCOME) -> demo.Row:
    return demo.Row(host, outcome, tasks=4, start_up_s=2.0, busy_s=8.0)


@pytest.mark.parametrize(
    ("spans", "busy"),
    [
        ([], 0),
        ([(101, 103), (105, 106)], 3),
        ([(101, 105), (102, 103)], 4),
        ([(104, 106), (101, 105)], 5),
        ([(90, 101)], 1),
    ],
    ids=["none", "apart", "inside", "overlap", "began before the run"],
)
def test_the_time_in_which_any_task_ran_counts_once(spans: list[tuple[float, float]], busy: float) -> None:
    assert demo.busy([ran(*span) for span in spans], OUTCOME) == pytest.approx(busy)


def test_the_table_has_a_line_for_every_host() -> None:
    lines = demo.table([row("plain"), row("dagster")]).splitlines()
    assert len(lines) == 6
    assert {len(line) for line in lines} == {len(lines[0])}
    assert [cell.strip() for cell in lines[4].split("│")[1:-1]] == [
        "dagster", "1.0", "4", "0.9639", "2.0 s", "10.0 s", "8.0 s", "500 ms",
    ]  # fmt: skip


def test_hosts_that_disagree_are_an_error_and_times_do_not_count() -> None:
    later = replace(OUTCOME, started=0.0, report={**OUTCOME.report, "picture": "/b.png"})
    demo.check([row("plain"), row("dagster", later)])
    other = replace(OUTCOME, report={**OUTCOME.report, "confusion": [[2]]})
    with pytest.raises(demo.DemoError, match="dagster and plain disagree"):
        demo.check([row("plain"), row("dagster", other)])


def start(folder: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        str(DEMO),
        "--host",
        "plain",
        "--folder",
        str(folder),
        "--pictures",
        str(folder),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_host_runs_and_leaves_a_table_and_a_picture(tmp_path: Path) -> None:
    process = start(tmp_path)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    assert "│ plain │" in out
    assert "0.9639" in out
    assert "GPUs " in out
    assert (tmp_path / "digits-plain.png").read_bytes().startswith(b"\x89PNG")
    assert not processes_under(tmp_path)


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    with demo.hold(tmp_path):
        out = start(tmp_path).communicate(timeout=60)[0]
    assert "another demo works in" in out
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    until(lambda: processes_under(tmp_path) or process.poll() is not None)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, out
    until(lambda: not processes_under(tmp_path))
    assert not any(str(tmp_path) in line for line in all_command_lines())


def test_a_host_that_fails_shows_the_end_of_its_log_and_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys; print('==> trying', flush=True); sys.exit('the reason')"
    with (tmp_path / "log").open("w") as log, pytest.raises(demo.DemoError, match="the reason") as caught:
        demo.watch_script([sys.executable, "-c", script], log.fileno(), tmp_path)
    assert str(tmp_path) in str(caught.value)


def all_command_lines() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                found.append((entry / "cmdline").read_text())
            except OSError:
                continue
    return found
