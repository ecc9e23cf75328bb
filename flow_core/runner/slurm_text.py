"""What Slurm's tools print, as values. Pure. Standard library only, Python 3.8+.

Text formats, never JSON: `squeue --json` ignores filters in 22.05 and changes its types from release to release, while
these fields are the same from 22.05 to 26.05 (what each release printed is kept in tests/providers/slurm_prints).
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: (field of `squeue --Format`, room for it). A value that is longer is cut there, so the room is generous.
_QUEUE = (
    ("ArrayJobID", 20),
    ("ArrayTaskID", 12),
    ("State", 20),
    ("Reason", 120),
    ("exit_code", 14),
    ("RestartCnt", 8),
    ("NodeList", 400),
    ("Partition", 80),
    ("Name", 160),
)
_ACCOUNTING = ("JobID", "State", "ExitCode", "NodeList", "Partition", "JobName")
_NODES = (
    ("NodeList", 120),
    ("Partition", 80),
    ("StateLong", 24),
    ("CPUsState", 40),
    ("Memory", 20),
    ("Gres", 300),
    ("GresUsed", 400),
    ("Features", 200),
)

_ID = re.compile(r"[0-9]+(_[0-9]+)?")


class Job(NamedTuple):
    """One job, or one element of an array, as Slurm tells it."""

    id: str
    """"123", or "123_4" for the element 4 of an array."""
    name: str
    element: int | None
    """The element's index, None for a job that is no array."""
    state: str
    reason: str
    code: int
    signal: int
    restarts: int
    nodes: str
    """The nodes it has or had, in Slurm's own short form."""
    partition: str


class Node(NamedTuple):
    """One node in one partition."""

    name: str
    partition: str
    default: bool
    """Whether jobs that name no partition come here."""
    state: str
    cpus: int
    cpus_idle: int
    memory_mb: int
    gpus: dict[str, int]
    """Number of GPUs by type; "" where the cluster has given them none."""
    gpus_used: dict[str, int]
    features: list[str]


# -- squeue and sacct


def queue_command(names: list[str], user: str = "--me") -> list[str]:
    """Ask for all jobs of this user that Slurm still knows, ended ones too; or for those with these names only."""
    chosen = [*([user] if user else []), *(["--name=" + ",".join(names)] if names else [])]
    shape = ["--noheader", "--array", "--Format=" + _wide(_QUEUE)]
    return ["squeue", "--all", "--states=all", *chosen, *shape]


def parse_queue(text: str) -> list[Job]:
    """Read the answer to `queue_command`. Lines that are none of ours (a job's name may hold anything) are left out."""
    jobs = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < len(_QUEUE) or not cells[0].isdigit():
            continue
        array, task, state, reason, ended, restarts, nodes, partition, name = cells[:9]
        index = int(task) if task.isdigit() else None
        code, number = _wait_status(ended)
        jobs.append(
            Job(
                id=array if index is None else f"{array}_{index}",
                name=name,
                element=index,
                state=_state(state),
                reason="" if reason in ("None", "(null)", "N/A") else reason,
                code=code,
                signal=number,
                restarts=int(restarts) if restarts.isdigit() else 0,
                nodes=_nothing(nodes),
                partition=partition,
            )
        )
    return jobs


def accounting_command(ids: list[str]) -> list[str]:
    """Ask the accounting for jobs that the queue has forgotten."""
    wanted = "--jobs=" + ",".join(ids)
    return [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        wanted,
        "--format=" + ",".join(_ACCOUNTING),
    ]


def parse_accounting(text: str) -> list[Job]:
    """Read the answer to `accounting_command`."""
    jobs = []
    for line in text.splitlines():
        cells = line.split("|", len(_ACCOUNTING) - 1)
        if len(cells) < len(_ACCOUNTING) or not _ID.fullmatch(cells[0]):
            continue
        task_id, state, ended, nodes, partition, name = cells
        code, number = _pair(ended)
        jobs.append(
            Job(
                id=task_id,
                name=name,
                element=int(task_id.split("_")[1]) if "_" in task_id else None,
                state=_state(state),
                reason="",
                code=code,
                signal=number,
                restarts=0,
                nodes=_nothing(nodes),
                partition=partition,
            )
        )
    return jobs


def _wide(fields: tuple[tuple[str, int], ...]) -> str:
    return ",".join(f"{name}:{room}|" for name, room in fields)


def _state(text: str) -> str:
    """'CANCELLED by 1000' and 'CANCELLED+' are states too."""
    return text.split(" ", maxsplit=1)[0].rstrip("+").upper()


def _nothing(text: str) -> str:
    return "" if text in ("(null)", "None assigned", "N/A", "None") else text


def _wait_status(text: str) -> tuple[int, int]:
    """Read an exit status, which squeue prints as wait(2) has it: (exit code, signal)."""
    if ":" in text:
        return _pair(text)
    status = int(text) if text.isdigit() else 0
    return (status >> 8) & 0xFF, status & 0x7F


def _pair(text: str) -> tuple[int, int]:
    """Read 'code:signal'."""
    code, _, number = text.partition(":")
    return int(code) if code.isdigit() else 0, int(number) if number.isdigit() else 0


def fold(ids: list[str]) -> list[str]:
    """Write jobs in Slurm's short form, one word for each array: ['7_1', '7_2', '7_5', '9'] as ['9', '7_[1-2,5]']."""
    folded: list[str] = []
    elements: dict[str, set[int]] = {}
    for one in ids:
        array, found, element = one.partition("_")
        if found:
            elements.setdefault(array, set()).add(int(element))
        else:
            folded.append(one)
    for array, numbers in elements.items():
        runs: list[list[int]] = []
        for number in sorted(numbers):
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        said = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
        folded.append(f"{array}_[{said}]")
    return folded


# -- sbatch


def parse_submitted(text: str) -> str | None:
    """Return the job's id from what `sbatch --parsable` printed ('123', '123;cluster'), None where there is none."""
    for line in text.splitlines():
        if re.fullmatch(r"[0-9]+(;.*)?", line.strip()):
            return line.strip().split(";")[0]
    return None


#: Words that say that asking again later can help. Everything else that a reachable controller refuses stays refused.
_TRANSIENT = re.compile(
    r"slurm controller|standby mode|rate limit|timed out|timeout|time out|connection|communication"
    r"|message (send|receive)|transport endpoint|temporarily|try again|retry|zero bytes|unexpected message"
    r"|authentication error|MaxJobCount|MaxSubmit|nodes are busy|shutting down|I/O error|no space left"
    r"|munge|socket|resource temporarily",
    re.IGNORECASE,
)


def transient(words: str) -> bool:
    """Whether a refusal may be another one later."""
    return _TRANSIENT.search(words) is not None


def words(text: str) -> str:
    """Return what a tool said on stderr without its own name, in one line."""
    lines = (re.sub(r"^\S+: (error: |fatal: )?", "", line.strip()) for line in text.splitlines())
    return "; ".join(dict.fromkeys(line for line in lines if line))


# -- sinfo


def nodes_command() -> list[str]:
    """Ask for every node in every partition."""
    return ["sinfo", "--noheader", "--Node", "--Format=" + _wide(_NODES)]


def parse_nodes(text: str) -> list[Node]:
    """Read the answer to `nodes_command`."""
    nodes = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < len(_NODES):
            continue
        name, partition, state, cpus, memory, gres, used, features = cells[: len(_NODES)]
        _allocated, idle, _other, total = (
            [int(part) for part in cpus.split("/") if part.isdigit()] + [0] * 4
        )[:4]
        nodes.append(
            Node(
                name=name,
                partition=partition.rstrip("*"),
                default=partition.endswith("*"),
                state=state.rstrip("*~#!%$@^-+").lower(),
                cpus=total,
                cpus_idle=idle,
                memory_mb=int(memory.rstrip("+")) if memory.rstrip("+").isdigit() else 0,
                gpus=parse_gpus(gres),
                gpus_used=parse_gpus(used),
                features=[word for word in re.split(r"[,&|]", _nothing(features)) if word],
            )
        )
    return nodes


_GPU = re.compile(r"(?:^|,)gpu:(?:(?P<type>[^:,()]+):)?(?P<count>[0-9]+)(?:\([^)]*\))?(?=,|$)")


def parse_gpus(gres: str) -> dict[str, int]:
    """Read 'gpu:a100:8(S:0-1),gpu:2,license:3' as the number of GPUs by type; "" is the type of those without one."""
    counts: dict[str, int] = {}
    for match in _GPU.finditer(gres):
        kind = match["type"] or ""
        counts[kind] = counts.get(kind, 0) + int(match["count"])
    return counts


# -- scontrol


def parse_setting(text: str, name: str) -> str | None:
    """Return one value of `scontrol show config`."""
    match = re.search(rf"^{re.escape(name)}\s*=\s*(\S+)", text, re.MULTILINE)
    return match[1] if match else None
