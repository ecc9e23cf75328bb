"""What each of Slurm's states means for a task."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_core.models import TaskStatus
from flow_core.runner import slurm_states
from flow_core.runner.slurm_text import Job


def job(state: str, **more: Any) -> Job:
    values = {"id": "17", "name": "flow-x", "element": None, "reason": "", "code": 0, "signal": 0}
    return Job(**{**values, "state": state, "restarts": 0, "nodes": "n1", "partition": "gpu", **more})


def facts(**more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("owner", "started", "interrupted", "queued", "job", "exit"))
    return {**empty, "cancel": False, "claimed": more.get("owner") is not None, **more}


RUNNING = {"owner": {"job": "17", "incarnation": 0}, "started": {"incarnation": 0}}

#: Every state that Slurm has had from 22.05 to 26.05: what a task is then; an end is "reason" alone.
STATES = {
    "PENDING": "pending",
    "CONFIGURING": "provisioning",
    "POWER_UP_NODE": "provisioning",
    "RUNNING": "running",
    "COMPLETING": "running",
    "STAGE_OUT": "running",
    "SIGNALING": "running",
    "RESIZING": "running",
    "UPDATE_DB": "running",
    "SUSPENDED": "paused",
    "STOPPED": "paused",
    "REQUEUE_HOLD": "paused",
    "SPECIAL_EXIT": "paused",
    "RESV_DEL_HOLD": "paused",
    "REQUEUED": "preempted",
    "REQUEUE_FED": "preempted",
    "EXPEDITING": "preempted",
    "REVOKED": None,
    "LAUNCH_FAILED": None,
    "RECONFIG_FAIL": None,
    "SOMETHING_NEW": None,
}
ENDS = {
    "COMPLETED": "runner-died",
    "FAILED": "runner-died",
    "CANCELLED": "cancelled",
    "TIMEOUT": "time-limit",
    "DEADLINE": "time-limit",
    "OUT_OF_MEMORY": "out-of-memory",
    "NODE_FAIL": "node-failed",
    "BOOT_FAIL": "node-failed",
    "PREEMPTED": "preempted",
}


@pytest.mark.parametrize(("state", "status"), STATES.items())
def test_a_state_that_is_no_end_has_a_status_or_leaves_the_last_known_one(
    state: str, status: str | None
) -> None:
    known = {} if state in ("PENDING", "CONFIGURING") else RUNNING
    standing = slurm_states.standing(job(state), facts(**known))
    assert not slurm_states.ended(job(state))
    assert standing.status == status and state in standing.message
    assert status is None or not TaskStatus(status).final


@pytest.mark.parametrize(("state", "reason"), ENDS.items())
def test_an_end_without_a_record_has_its_reason(state: str, reason: str) -> None:
    assert slurm_states.ended(job(state))
    record = slurm_states.verdict(job(state, signal=9), facts(**RUNNING), "")
    assert record["reason"] == reason and "17" in record["message"]


@given(st.text(min_size=1))
def test_a_state_that_nobody_knows_is_no_end(state: str) -> None:
    assert slurm_states.ended(job(state)) == (state in ENDS)


def test_a_job_that_runs_has_not_started_the_task_before_its_record_says_so() -> None:
    assert slurm_states.standing(job("RUNNING"), facts()).status == "provisioning"
    again = slurm_states.standing(job("RUNNING", restarts=1), facts(**RUNNING))
    assert again.status == "provisioning"


@pytest.mark.parametrize(("restarts", "known"), [(1, {}), (0, RUNNING), (1, RUNNING)])
def test_a_job_that_waits_to_run_again_is_preempted(restarts: int, known: dict[str, Any]) -> None:
    assert slurm_states.standing(job("PENDING", restarts=restarts), facts(**known)).status == "preempted"


@pytest.mark.parametrize(
    "reason", ["JobHeldUser", "JobHeldAdmin", "job requeued in held state", "JobHoldMaxRequeue"]
)
def test_a_job_that_somebody_must_release_is_paused(reason: str) -> None:
    assert (
        slurm_states.standing(job("PENDING", reason=reason, restarts=1), facts(**RUNNING)).status == "paused"
    )


def test_restarts_are_counted_from_whoever_knows() -> None:
    assert slurm_states.preemptions(None, facts()) == 0
    assert slurm_states.preemptions(job("PENDING", restarts=3), facts(**RUNNING)) == 3
    assert slurm_states.preemptions(None, facts(started={"incarnation": 2})) == 2
    record = slurm_states.verdict(job("TIMEOUT", restarts=2), facts(**RUNNING), "")
    assert record["preemptions"] == 2


def test_a_plain_failure_that_was_a_memory_kill_is_one() -> None:
    said = "slurmstepd: error: Step 17.batch exceeded memory limit (300M > 60M), being killed"
    record = slurm_states.verdict(job("FAILED", reason="JobLaunchFailure", signal=9), facts(**RUNNING), said)
    assert record["reason"] == "out-of-memory"


def test_a_killed_runner_is_named_with_its_signal_and_not_as_a_launch_failure() -> None:
    record = slurm_states.verdict(job("FAILED", reason="JobLaunchFailure", signal=9), facts(**RUNNING), "")
    assert (record["reason"], record["signal"]) == ("runner-died", 9) and "SIGKILL" in record["message"]


def test_a_script_that_ends_before_the_task_starts_says_what_it_printed() -> None:
    record = slurm_states.verdict(job("FAILED", code=1), facts(), "module: command not found\n")
    assert record["reason"] == "start-failed" and "module: command not found" in record["message"]


@pytest.mark.parametrize("reason", ["DependencyNeverSatisfied", "Dependency"])
def test_a_dependency_that_failed_is_named(reason: str) -> None:
    assert slurm_states.verdict(job("CANCELLED", reason=reason), facts(), "")["reason"] == "dependency"


@pytest.mark.parametrize("state", ENDS)
def test_what_was_asked_for_is_a_cancellation_however_it_ended(state: str) -> None:
    record = slurm_states.verdict(job(state), facts(**{**RUNNING, "cancel": True}), "")
    assert record["reason"] == "cancelled"


def test_a_job_that_nobody_knows_any_more_is_a_dead_runner_unless_it_was_cancelled() -> None:
    assert slurm_states.verdict(None, facts(**RUNNING, job="17"), "")["reason"] == "runner-died"
    noted = facts(**RUNNING, job="17", interrupted={"signal": 15, "run_s": 2.5, "incarnation": 0})
    record = slurm_states.verdict(None, noted, "")
    assert "SIGTERM" in record["message"] and record["run_s"] == 2.5
    assert slurm_states.verdict(None, facts(cancel=True, job="17"), "")["reason"] == "cancelled"
