"""Calls on warm workers, beside floors and peers: ``make bench-sessions``.

Systems that leave each other alone are measured in turn in one process: ours and the pools. Ray, Dask and executorlib
keep threads and servers busy, which slows the floor they are divided by, so each has a process of its own with floor
samples of its own. Ray and Dask get a network namespace that has only `lo`, and a process namespace with which
everything that they start ends; where these cannot be made, the table says so.

Absolute times are this machine's at this moment; what can be compared are the ratios of one run.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks import memory, pages, peers, report, rows
from tests.benchmarks.ours import Ours

ROOT = Path(__file__).resolve().parents[2]
BLOCK_S = 120.0
"""No round of a block begins later than this, so that the whole takes a quarter of an hour at most."""
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


@dataclass(frozen=True)
class Block:
    """Systems that are measured in one process."""

    name: str
    kinds: tuple[type[peers.System], ...]
    apart: bool = False  # in namespaces of its own

    def command(self) -> list[str]:
        """What its process is started with."""
        own = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        return [*(own + user if self.apart else []), sys.executable, "-m", "tests.benchmarks.sessions"]


BLOCKS = {
    block.name: block
    for block in (
        Block("light", (peers.Manager, peers.Pool, peers.ProcessPool, peers.Loky, Ours)),
        Block("executorlib", (peers.Executorlib,)),
        Block("ray", (peers.Ray,), apart=True),
        Block("dask", (peers.Dask,), apart=True),
    )
}


def main() -> None:
    """Measure, print the table, write the records and, where asked, the page of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"at most; none begins after {BLOCK_S:g} s of a block"
    )
    parser.add_argument("--blocks", nargs="*", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--docs", type=Path, help="write the tables into this Markdown file")
    parser.add_argument("--part", nargs=2, metavar=("BLOCK", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        name, what = options.part
        part(name, what, options.rounds)
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    records = collect(options.blocks, options.rounds, console)
    for table in report.tables(records):
        console.print(table)
    console.print(pages.machine())
    if options.json:
        options.json.write_text(json.dumps({"machine": pages.machine(), "records": records}, indent=1))
    if options.docs:
        report.write(options.docs, records)


# --- the parent -----------------------------------------------------------------------------------------------


def collect(blocks: list[str], rounds: int, console: Console) -> list[dict[str, Any]]:
    """Run every block in a process of its own; one that cannot run gives a record that says why."""
    records: list[dict[str, Any]] = []
    for name in blocks:
        kinds = [kind.__name__ for kind in BLOCKS[name].kinds if kind is not peers.Manager]
        for what in ("rows", *kinds):
            with console.status(f"{name}: {what}"):
                records += run(BLOCKS[name], what, rounds)
    return records


def run(block: Block, what: str, rounds: int) -> list[dict[str, Any]]:
    """One process: the rows of a block, or the memory of one of its systems."""
    with tempfile.TemporaryDirectory(prefix="fb-", ignore_cleanup_errors=True) as folder:
        records, errors = Path(folder, "records"), Path(folder, "errors")
        # The folder's name stays short: sockets lie below it, and a socket's path has at most 107 bytes.
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": folder,
            "FLOW_BENCH_RECORDS": str(records),
            memory.MARK: secrets.token_hex(8),
        }
        with errors.open("w") as stderr:
            command = [*block.command(), "--rounds", str(rounds), "--part", block.name, what]
            code = watched(command, env=environ, stdout=stderr, stderr=stderr)
        found = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
        if code:
            last = (errors.read_text().strip() or f"exit code {code}").splitlines()[-1]
            last = f"stopped after {3 * BLOCK_S:g} s" if code == -signal.SIGKILL else last
            systems = ", ".join(kind.name for kind in block.kinds if what in {"rows", kind.__name__})
            rows_or_memory = "calls" if what == "rows" else "memory"
            found.append({"failed": f"{systems}: {rows_or_memory}", "why": last})
        return found


def watched(command: list[str], **how: Any) -> int:
    """Run a process and return its exit code; one that hangs is killed with all that it has started."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **how) as process:
        try:
            return process.wait(3 * BLOCK_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


# --- a block's process ----------------------------------------------------------------------------------------


def part(name: str, what: str, rounds: int) -> None:
    """Measure one block, or the memory of one of its systems; append records to the file that the parent named."""
    block = BLOCKS[name]
    if block.apart:
        loopback_up()
    with open(os.environ["FLOW_BENCH_RECORDS"], "a") as file:

        def record(value: dict[str, Any]) -> None:
            file.write(json.dumps({"block": name, **value}) + "\n")
            file.flush()

        if what == "rows":
            rows.measure(list(block.kinds), rounds, lambda sample: record(sample.record()), within_s=BLOCK_S)
        else:
            (kind,) = (kind for kind in block.kinds if kind.__name__ == what)
            record({"memory": kind.name, "bytes": memory.measure(kind)})


def loopback_up() -> None:
    """Start the only interface of a fresh network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


if __name__ == "__main__":
    main()
