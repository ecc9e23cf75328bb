"""What Slurm's tools print, from 22.05 to 26.05, as values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_core.runner import slurm_text
from flow_core.runner.slurm_text import Job


def row(*cells: str) -> str:
    """A line as squeue prints it: each cell padded."""
    return "".join(f"{cell:<20}|" for cell in cells)


def test_a_job_of_the_queue_is_read() -> None:
    text = row("17", "N/A", "RUNNING", "None", "0", "2", "n[1-3]", "gpu", "flow-x")
    (job,) = slurm_text.parse_queue(text)
    assert job == Job("17", "flow-x", None, "RUNNING", "", 0, 0, 2, "n[1-3]", "gpu")


def test_an_element_of_an_array_has_both_numbers() -> None:
    text = row("17", "4", "PENDING", "JobArrayTaskLimit", "0", "0", "", "gpu", "flow-x")
    (job,) = slurm_text.parse_queue(text)
    assert (job.id, job.element, job.reason) == ("17_4", 4, "JobArrayTaskLimit")


@pytest.mark.parametrize(
    ("printed", "code", "signal"),
    [
        ("0", 0, 0),
        ("256", 1, 0),
        ("1792", 7, 0),
        ("9", 0, 9),
        ("137", 0, 9),
        ("7:0", 7, 0),
        ("0:9", 0, 9),
        ("N/A", 0, 0),
    ],
)
def test_an_exit_status_is_read_in_every_spelling(printed: str, code: int, signal: int) -> None:
    text = row("17", "N/A", "FAILED", "NonZeroExitCode", printed, "0", "n1", "gpu", "flow-x")
    (job,) = slurm_text.parse_queue(text)
    assert (job.code, job.signal) == (code, signal)


@pytest.mark.parametrize(
    "line", ["", "squeue: error: something", "CLUSTER: one", "a|b|c", row("x", *"abcdefgh")]
)
def test_other_lines_are_left_out(line: str) -> None:
    ours = row("17", "N/A", "RUNNING", "None", "0", "0", "n1", "gpu", "flow-x")
    assert [job.id for job in slurm_text.parse_queue(f"{line}\n{ours}\n")] == ["17"]


@given(st.text())
def test_nothing_that_is_printed_is_an_exception(text: str) -> None:
    slurm_text.parse_queue(text)
    slurm_text.parse_accounting(text)
    slurm_text.parse_nodes(text)
    slurm_text.parse_gpus(text)
    slurm_text.parse_submitted(text)
    slurm_text.words(text)


def test_the_queue_is_asked_in_one_command_for_ended_jobs_too() -> None:
    command = slurm_text.queue_command([])
    assert command[0] == "squeue" and {"--me", "--all", "--states=all", "--array"} <= set(command)
    assert not any("json" in word for word in command)
    assert "--name=a,b" in slurm_text.queue_command(["a", "b"])


@pytest.mark.parametrize(
    ("line", "job_id", "state", "code", "signal"),
    [
        ("17|COMPLETED|0:0|n1|gpu|flow-x", "17", "COMPLETED", 0, 0),
        ("17|CANCELLED by 1000|0:0|None assigned|gpu|flow-x", "17", "CANCELLED", 0, 0),
        ("17_3|FAILED|7:0|n1|gpu|flow-x", "17_3", "FAILED", 7, 0),
        ("17|OUT_OF_MEMORY|0:125|n[1-2]|gpu|flow|x", "17", "OUT_OF_MEMORY", 0, 125),
    ],
)
def test_the_accounting_is_read(line: str, job_id: str, state: str, code: int, signal: int) -> None:
    (job,) = slurm_text.parse_accounting(f"{line}\n17.batch|FAILED|7:0|n1||batch\n17_[4-9]|PENDING|0:0|||x\n")
    assert (job.id, job.state, job.code, job.signal) == (job_id, state, code, signal)


@pytest.mark.parametrize(
    ("printed", "job"),
    [
        ("17\n", "17"),
        ("17;cluster\n", "17"),
        ("sbatch: a word of the site's\n17\n", "17"),
        ("", None),
        ("no\n", None),
    ],
)
def test_the_number_of_a_submitted_job_is_found(printed: str, job: str | None) -> None:
    assert slurm_text.parse_submitted(printed) == job


TRANSIENT = [
    "Batch job submission failed: Unable to contact slurm controller (connect failure)",
    "Batch job submission failed: Socket timed out on send/recv operation",
    "Batch job submission failed: Rate limit exceeded, please retry momentarily",
    "Batch job submission failed: Slurm backup controller in standby mode",
    "Slurm temporarily unable to accept job, sleeping and retrying",
    "Batch job submission failed: MaxJobCount limit reached",
    "AssocMaxSubmitJobLimit; Batch job submission failed: Job violates accounting/QOS policy (job submit limit, …)",
    "Batch job submission failed: Zero Bytes were transmitted or received",
    "Batch job submission failed: I/O error writing script/environment to file",
]
PERMANENT = [
    "Batch job submission failed: Requested node configuration is not available",
    "invalid partition specified: x; Batch job submission failed: Invalid partition name specified",
    "Batch job submission failed: Invalid account or account/partition combination specified",
    "Batch job submission failed: Invalid qos specification",
    "Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
    "Batch job submission failed: Invalid generic resource (gres) specification",
    "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, …)",
    "unrecognized option '--bogus'",
]


@pytest.mark.parametrize("words", TRANSIENT)
def test_a_refusal_that_may_pass_is_told_from_one_that_stays(words: str) -> None:
    assert slurm_text.transient(words)


@pytest.mark.parametrize("words", PERMANENT)
def test_a_refusal_that_stays_is_told_from_one_that_may_pass(words: str) -> None:
    assert not slurm_text.transient(words)


def test_what_a_tool_said_is_one_line_without_its_own_name() -> None:
    said = "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: no\n"
    assert slurm_text.words(said) == "invalid partition specified: x; Batch job submission failed: no"


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:a100:8", {"a100": 8}),
        ("gpu:8", {"": 8}),
        ("gpu:a100:8(S:0-1)", {"a100": 8}),
        ("gpu:nvidia_a100_80gb_pcie:4(S:0,2),license:3", {"nvidia_a100_80gb_pcie": 4}),
        ("gpu:a100:2(IDX:0-1),gpu:v100:0(IDX:N/A)", {"a100": 2, "v100": 0}),
        ("gpu:2080ti:4", {"2080ti": 4}),
        ("gpu:1g.10gb:7", {"1g.10gb": 7}),
        ("shard:a100:64,mps:400", {}),
        ("(null)", {}),
        ("", {}),
    ],
)
def test_gpus_are_counted_by_type(gres: str, gpus: dict[str, int]) -> None:
    assert slurm_text.parse_gpus(gres) == gpus


def test_a_node_is_read_with_what_is_free() -> None:
    cells = (
        "n1",
        "gpu*",
        "mixed-",
        "10/6/0/16",
        "16000",
        "gpu:a100:8(S:0-1)",
        "gpu:a100:3(IDX:0-2)",
        "a100,nvme",
    )
    (node,) = slurm_text.parse_nodes(row(*cells))
    assert (node.name, node.partition, node.default, node.state) == ("n1", "gpu", True, "mixed")
    assert (node.cpus, node.cpus_idle, node.memory_mb) == (16, 6, 16000)
    assert (node.gpus, node.gpus_used, node.features) == ({"a100": 8}, {"a100": 3}, ["a100", "nvme"])


@given(st.sets(st.tuples(st.integers(1, 9), st.none() | st.integers(0, 40))))
def test_folded_ids_say_the_same(jobs: set[tuple[int, int | None]]) -> None:
    unfolded: set[tuple[int, int | None]] = set()
    for word in slurm_text.fold(
        [str(job) if element is None else f"{job}_{element}" for job, element in jobs]
    ):
        job, _, elements = word.partition("_")
        if not elements:
            unfolded.add((int(job), None))
        for run in filter(None, elements.strip("[]").split(",")):
            first, _, last = run.partition("-")
            unfolded |= {(int(job), element) for element in range(int(first), int(last or first) + 1)}
    assert unfolded == jobs
    assert slurm_text.fold(["7_1", "7_2", "7_5", "9"]) == ["9", "7_[1-2,5]"]


def test_one_setting_of_the_cluster_is_found() -> None:
    text = "MaxArraySize            = 10001\nMaxJobCount             = 20000\n"
    assert slurm_text.parse_setting(text, "MaxArraySize") == "10001"
    assert slurm_text.parse_setting(text, "KillWait") is None
