"""What real Slurms printed, release by release, is read as the same thing. Recorded by `tests.infra.slurm_prints`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flow_core.runner import slurm_states, slurm_text
from flow_core.runner.slurm_text import Job

RELEASES = sorted(Path(__file__).with_name("slurm_prints").glob("*.json"))


@pytest.fixture(params=RELEASES, ids=lambda file: str(file.stem))
def prints(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The answers of one release."""
    answers: dict[str, Any] = json.loads(request.param.read_text())
    return answers


def job(prints: dict[str, Any], name: str, element: int | None = None) -> Job:
    jobs = slurm_text.parse_queue("\n".join(prints["squeue"]))
    (one,) = (job for job in jobs if (job.name, job.element) == (name, element))
    return one


#: By what happened to the job: its state, exit code and signal.
ENDED = {
    "exits-0": ("COMPLETED", 0, 0),
    "exits-7": ("FAILED", 7, 0),
    "killed": ("FAILED", 0, 9),
    "cancelled": ("CANCELLED", 0, 15),
    "cancelled-before": ("CANCELLED", 0, 0),
    "preempted": ("PREEMPTED", 0, 15),
    "time-limit": ("TIMEOUT", 0, 15),
    "never": ("CANCELLED", 0, 0),
}

#: By what happens to the job: its state, reason, nodes and restarts.
LIVE = {
    "two-nodes": ("RUNNING", "", "n[1-2]", 0),
    "requeued": ("RUNNING", "", "n1", 1),
    "suspended": ("SUSPENDED", "", "n1", 0),
    "held": ("PENDING", "JobHeldUser", "", 0),
    "later": ("PENDING", "BeginTime", "", 0),
    "waits": ("PENDING", "Dependency", "", 0),
}


def test_there_are_recordings_of_old_and_new_releases() -> None:
    assert len(RELEASES) >= 3


@pytest.mark.parametrize("name", ENDED)
def test_the_queue_says_how_a_job_ended(prints: dict[str, Any], name: str) -> None:
    one = job(prints, name)
    assert (one.state, one.code, one.signal) == ENDED[name]
    assert slurm_states.ended(one)


#: What the exit record says of a job that was running: reason, exit code and signal.
RECORDS = {
    "exits-7": ("runner-died", 7, None),
    "killed": ("runner-died", None, 9),
    "cancelled": ("cancelled", None, 15),
    "preempted": ("preempted", None, 15),
    "time-limit": ("time-limit", None, 15),
    "node-down": ("node-failed", None, None),
    "never": ("dependency", None, None),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_end_of_a_task_is_the_same_everywhere(prints: dict[str, Any], name: str) -> None:
    facts = dict.fromkeys(("started", "interrupted", "queued", "exit"))
    record = slurm_states.verdict(job(prints, name), {**facts, "owner": {"job": "1"}, "cancel": False}, "")
    assert (record["reason"], record["code"], record["signal"]) == RECORDS[name]


def test_the_signal_that_ended_a_job_is_named_once(prints: dict[str, Any]) -> None:
    facts = dict.fromkeys(("started", "interrupted", "queued", "exit"))
    one = job(prints, "killed")
    message = slurm_states.verdict(one, {**facts, "owner": {"job": one.id}, "cancel": False}, "")["message"]
    assert "SIGKILL" in message and "RaisedSignal" not in message


@pytest.mark.parametrize("name", LIVE)
def test_the_queue_says_where_a_job_is(prints: dict[str, Any], name: str) -> None:
    one = job(prints, name)
    assert (one.state, one.reason, one.nodes, one.restarts) == LIVE[name]
    assert not slurm_states.ended(one)


def test_each_element_of_an_array_stands_in_the_queue(prints: dict[str, Any]) -> None:
    elements = [job(prints, "array", index) for index in range(4)]
    assert [(one.state, one.code) for one in elements] == [
        ("COMPLETED", 0),
        ("FAILED", 3),
        ("RUNNING", 0),
        ("PENDING", 0),
    ]
    assert len({one.id.split("_")[0] for one in elements}) == 1 and elements[3].id.endswith("_3")


@pytest.mark.parametrize("name", ENDED)
def test_the_accounting_says_how_a_job_ended(prints: dict[str, Any], name: str) -> None:
    told = {one.id: one for one in slurm_text.parse_accounting("\n".join(prints["sacct"]))}
    one = told[job(prints, name).id]
    state, code, _ = ENDED[name]
    assert (one.name, one.state, one.code) == (name, state, code)


def test_the_accounting_knows_the_elements_of_an_array(prints: dict[str, Any]) -> None:
    told = {one.id: one for one in slurm_text.parse_accounting("\n".join(prints["sacct"]))}
    ended = told[job(prints, "array", 1).id]
    assert (ended.state, ended.code, ended.element) == ("FAILED", 3, 1)


def test_the_nodes_are_read_with_what_is_free(prints: dict[str, Any]) -> None:
    nodes = slurm_text.parse_nodes("\n".join(prints["sinfo"]))
    assert {(node.name, node.partition) for node in nodes} == {
        (name, partition) for name in ("n1", "n2", "n3") for partition in ("gpu", "spot", "cancelspot")
    }
    default = {node.name: node for node in nodes if node.default}
    assert {node.partition for node in default.values()} == {"gpu"}
    assert [default[name].state for name in ("n1", "n2", "n3")] == ["mixed", "mixed", "drained"]
    assert [default[name].gpus_used["a100"] for name in ("n1", "n2", "n3")] == [3, 3, 0]
    assert {(node.cpus, node.memory_mb, node.gpus["a100"]) for node in nodes} == {(16, 16000, 8)}
    assert default["n2"].cpus_idle == 15


def test_the_limits_and_the_name_of_the_cluster_are_found(prints: dict[str, Any]) -> None:
    config = "\n".join(prints["scontrol show config"])
    assert slurm_text.parse_setting(config, "ClusterName") == "accounted"
    assert slurm_text.parse_setting(config, "MaxArraySize") == "10001"


def test_the_number_of_a_new_job_is_found(prints: dict[str, Any]) -> None:
    assert slurm_text.parse_submitted(prints["sbatch"]) == job(prints, "wrap").id


def test_what_sbatch_refuses_is_refused_for_good(prints: dict[str, Any]) -> None:
    for what, said in prints["refused"].items():
        words = slurm_text.words(said)
        assert words and not words.startswith("sbatch") and not slurm_text.transient(words), what


def test_a_controller_that_is_gone_may_come_back(prints: dict[str, Any]) -> None:
    assert slurm_text.transient(slurm_text.words(prints["no controller"]))
