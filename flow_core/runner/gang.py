"""One task on many nodes: `srun` starts a runner on each, and both ends talk through its standard streams.

The runner of the batch script leads. Each node's runner starts one rank, and writes one line of JSON when that has
started and one when it has ended. The leader's one line asks all nodes to stop; so does its death, which closes the
stream. Nothing here goes through the shared file system, which may be seconds late. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from typing import Any

from . import proc
from .main import Runner
from .ranks import Rank, free_port, start_rank
from .spawn import Gate, StartFailed

#: The port for the ranks' own rendezvous, told to all nodes.
_PORT = "FLOW_GANG_PORT"


class NodeRank(Rank):
    """A rank on another node, as far as the leader knows it: its own report, or the end of `srun` without one."""

    def __init__(self, index: int, gang: Gang) -> None:
        super().__init__(index, -1, None)
        self.report: dict[str, Any] | None = None
        self.gang = gang

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return self.status is not None and self.verdict[:2] != ("exit", 0)

    @property
    def verdict(self) -> tuple[str, int | None, int | None, str]:
        """(reason, code, signal, message) of its end."""
        if self.report is None:
            return "node-failed", None, None, "it has ended without a word"
        report = self.report
        return report["reason"], report["code"], report["signal"], report["message"]

    def kill(self, number: int) -> None:
        """Have the node's runner do it; only a leader that is out of patience ends `srun`."""
        if number == signal.SIGKILL:
            self.gang.kill()


class Gang:
    """All ranks of a task, behind one `srun`."""

    def __init__(self, folder: str, job: dict[str, Any]) -> None:
        nodes = job["num_instances"]
        runner = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        argv = [
            *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"),
            *("--wait=0", "--export=ALL", "--mpi=none", "--cpu-bind=none"),  # all CPUs of each node
            *job["srun"],
            *(job["node_python"] or sys.executable, "-I", "-S", runner, "node", folder),
        ]
        port = job["env"].get("MASTER_PORT") or str(free_port())
        try:
            self._srun = subprocess.Popen(
                argv,
                env={**os.environ, _PORT: port},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise StartFailed(f"srun could not be started: {error}") from error
        assert self._srun.stdin is not None and self._srun.stdout is not None
        self._orders, self._said = self._srun.stdin, b""
        self.reports = self._srun.stdout.fileno()
        os.set_blocking(self.reports, False)
        self.ended = False
        self.peak_kb = 0
        self.ranks = [NodeRank(index, self) for index in range(nodes)]
        self._started: dict[int, dict[str, Any]] = {}

    @property
    def hosts(self) -> list[str]:
        """The nodes' names by rank."""
        return [self._started[index]["host"] for index in sorted(self._started)]

    @property
    def gpus(self) -> list[str]:
        """The GPUs' names by rank."""
        return [gpu for index in sorted(self._started) for gpu in self._started[index]["gpus"]]

    def listen(self) -> bool:
        """Take in what the nodes have reported; return whether the last of them has just started."""
        before = len(self._started)
        while not self.ended:
            try:
                piece = os.read(self.reports, 65536)
            except BlockingIOError:
                break
            self.ended = not piece
            self._said += piece
        *lines, self._said = self._said.split(b"\n")
        for line in lines:
            self._take(line)
        if self.ended:
            for rank in self.ranks:
                rank.status = rank.status if rank.status is not None else 255 << 8
        return before < len(self._started) == len(self.ranks)

    def _take(self, line: bytes) -> None:
        try:
            report = json.loads(line.decode())
            rank = self.ranks[report["rank"]]
        except (ValueError, KeyError, TypeError, IndexError):  # a prolog, or a library that prints
            os.write(2, line + b"\n")
            return
        if "reason" not in report:
            self._started[rank.index] = report
            return
        rank.report = report
        rank.status = 0 if (report["reason"], report["code"]) == ("exit", 0) else 1 << 8
        self.peak_kb = max(self.peak_kb, report["peak_kb"])

    def kill(self) -> None:
        """End `srun`; the scheduler ends its steps with the job."""
        try:
            os.killpg(self._srun.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def stop(self, grace_s: float) -> None:
        """Ask all nodes to end what is left of their ranks."""
        try:
            self._orders.write(b"%g\n" % grace_s)
            self._orders.close()
        except (OSError, ValueError):  # they have ended, or were asked before
            pass


class NodeRunner(Runner):
    """The runner of one rank."""

    def __init__(self, folder: str, rank: int) -> None:
        super().__init__(folder, None)
        from .batch import inherited

        self.rank = rank
        self.order: bytes | None = None
        self.job["env"] = {**inherited(self.job["python"]), **self.job["env"]}
        self.job["max_run_time_s"] = None  # the leader's clock counts
        self.job["main_address"] = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"

    def asked_to_stop(self) -> bool:
        """Whether the leader has asked for it, or is gone."""
        return self.order is not None

    @property
    def grace_s(self) -> float:
        """How long what is left of the rank may take to end."""
        try:
            return float(self.order or b"")
        except ValueError:
            return float(self.job["kill_grace_s"])

    def _sleep(self, seconds: float) -> None:
        ready = select.select([self._bell] if self.order is not None else [self._bell, 0], [], [], seconds)[0]
        if 0 in ready:
            self.order = os.read(0, 64)
        try:
            os.read(self._bell, 512)
        except BlockingIOError:
            pass

    def bury(self) -> bool:
        """End what a killed runner left behind."""
        proc.kill_members(self.folder)
        return True

    def work(self) -> dict[str, Any]:
        """Run the rank and return the report of its end."""
        from .batch import granted_gpus, node_name

        gpus = granted_gpus()
        proc.adopt_orphans()
        self.protect()
        cwd = os.path.join(self.folder, "work", self.job["working_dir"] or ".")
        port = os.environ[_PORT]
        try:
            gate = Gate()
            self.ranks = [start_rank(self.folder, self.job, self.rank, gate, gpus=gpus, port=port, cwd=cwd)]
            gate.open()
            self.ranks[0].confirm()
            self.tell({"host": node_name(), "gpus": gpus})
            outcome = self.watch()
        except StartFailed as error:
            outcome = ("start-failed", 127, None, str(error))
        self.stop(self.grace_s if outcome[0] in ("cancelled", "runner-died") else 1.0)
        reason, code, number, message = outcome
        return {"reason": reason, "code": code, "signal": number, "message": message, "peak_kb": self.peak_kb}

    def tell(self, report: dict[str, Any]) -> None:
        """Write one line to the leader."""
        os.write(1, json.dumps({"rank": self.rank, **report}).encode() + b"\n")


def main(argv: list[str]) -> int:
    """Run the rank that `srun` has given this process; the leader hears how it ended."""
    runner = NodeRunner(argv[0], int(os.environ["SLURM_PROCID"]))
    runner.listen()
    runner.tell(runner.work())
    if runner.guard is not None:
        runner.guard.dismiss()
    return 0
