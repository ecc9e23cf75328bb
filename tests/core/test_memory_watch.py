"""Which deaths by SIGKILL are put down to the kernel's out-of-memory killer, whose count all of a machine share."""

from __future__ import annotations

import pytest

from flow_core.runner import proc


class Machine:
    def __init__(self) -> None:
        self.kills, self.now = 7, 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(proc, "oom_kills", lambda: machine.kills)
    monkeypatch.setattr(proc, "time", machine)
    return machine


def test_a_death_at_the_time_of_a_kill_is_told_as_that_and_each_kill_counts_once(machine: Machine) -> None:
    watch = proc.MemoryWatch()
    assert not watch.has_struck()
    machine.kills += 2
    assert [watch.has_struck() for _ in range(3)] == [True, True, False]


def test_what_somebody_elses_process_died_of_long_ago_is_no_reason(machine: Machine) -> None:
    watch = proc.MemoryWatch()
    machine.kills += 1
    for _ in range(4):
        machine.now += 4
        watch.look()
    assert not watch.has_struck()


@pytest.mark.parametrize("late_s", [0.0, 1.0, 4.9])
def test_a_death_that_is_noticed_late_is_still_told_as_that(machine: Machine, late_s: float) -> None:
    watch = proc.MemoryWatch()
    for _ in range(10):
        machine.now += 2
        watch.look()
    machine.kills += 1
    machine.now += late_s
    watch.look()
    assert watch.has_struck()


def test_the_kernels_own_count_is_read() -> None:
    assert proc.oom_kills() >= 0
