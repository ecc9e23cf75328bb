"""A real Slurm in a lab: controller, three nodes with simulated GPUs, and accounting if wanted.

Each node has its own processes, host name and boot id, so it can crash like a machine; the file system and the network
are the lab's. The timings are those of a test: what takes minutes on a cluster takes seconds here.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.infra import lab as labs
from tests.infra.lab import Lab

GPUS = 8
NODES = ("n1", "n2", "n3")

_SLURM_CONF = """\
ClusterName={name}
SlurmctldHost=controller(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: 121 s with the default of 120.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmctldTimeout=30
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdTimeout=10
SlurmdParameters=config_overrides
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=2,bf_window=1440,batch_sched_delay=0,defer_batch
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=2
UnkillableStepTimeout=20
InactiveLimit=0
MinJobAge={min_job_age_s}
MaxJobCount=20000
FirstJobId=1
MaxArraySize=10001
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
{accounting}
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=24:00:00 PriorityTier=10 State=UP
PartitionName=spot Nodes=ALL MaxTime=24:00:00 PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=cancelspot Nodes=ALL MaxTime=24:00:00 PriorityTier=1 PreemptMode=CANCEL GraceTime=5 State=UP
"""


class Cluster:
    """One cluster. `env` is what a process needs to speak with it from inside the lab's network."""

    def __init__(self, lab: Lab, *, name: str = "plain", port: int = 26817, min_job_age_s: int = 300) -> None:
        self.lab, self.name, self.port = lab, name, port
        self.folder = lab.folder / name
        self.env: Mapping[str, str] = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.partitions = ("gpu", "spot", "cancelspot")
        self._pids: dict[str, int] = {}
        for part in ("state", "dev", "log", "spool"):
            (self.folder / part).mkdir(parents=True)
        self._write(min_job_age_s)
        self._start_munge()
        self._before_controller()
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.until_idle()

    def _write(self, min_job_age_s: int) -> None:
        for index in range(GPUS):  # the minor and major number of /dev/null: a device that anybody may open
            os.mknod(self.folder / "dev" / f"nvidia{index}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        resources = f"CPUs=16 RealMemory=16000 Gres=gpu:a100:{GPUS} State=UNKNOWN"
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={self._node_port(node)} {resources}"
            for node in NODES
        ]
        (self.folder / "slurm.conf").write_text(
            _SLURM_CONF.format(
                name=self.name,
                folder=self.folder,
                port=self.port,
                min_job_age_s=min_job_age_s,
                accounting=self._accounting(),
                nodes="\n".join(nodes),
            )
        )
        gres = f"NodeName=n[1-{len(NODES)}] Name=gpu Type=a100 File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)
        (self.folder / "cgroup.conf").write_text("ConstrainRAMSpace=no\nConstrainDevices=no\n")

    def _accounting(self) -> str:
        return "AccountingStorageType=accounting_storage/none"

    def _before_controller(self) -> None:
        """Start what the controller needs."""

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        options = {
            "key-file": key,
            "socket": self.folder / "munge.sock",
            "pid-file": self.folder / "munged.pid",
            "log-file": self.folder / "log" / "munged.log",
            "seed-file": self.folder / "munge.seed",
            "num-threads": 2,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._daemon("munged", "munged", "--force", "--foreground", *arguments)
        labs.until((self.folder / "munge.sock").exists, "munged's socket")

    def _daemon(self, name: str, *argv: str) -> None:
        self._pids[name] = self.lab.start(*argv, log=self.folder / "log" / f"{name}.out", env=self.env)

    # -- asking it

    def command(self, *argv: str) -> str:
        """Run one of Slurm's tools; return what it printed."""
        return self.lab.inside("env", *(f"{name}={value}" for name, value in self.env.items()), *argv).strip()

    def node_states(self) -> dict[str, str]:
        """State of each node as sinfo has it: idle, mixed, allocated, down, drained …"""
        lines = self.command("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def until_idle(self, *, within_s: float = 60.0) -> None:
        """Wait until every node is up and nothing runs."""

        def idle() -> bool:
            states = self.node_states()
            return len(states) == len(NODES) and set(states.values()) == {"idle"}

        labs.until(idle, "three idle nodes", within_s=within_s)

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of a job as scontrol shows them; empty where it does not know the job."""
        try:
            shown = self.command("scontrol", "show", "job", "-o", job_id)
        except AssertionError:
            return {}
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def processes(self, job_id: str) -> list[int]:
        """The living processes of a job's steps, as pids seen from here; Slurm's own stepd is not one of them."""
        needle = f"SLURM_JOB_ID={job_id}".encode()
        found = []
        for pid in labs.pids():
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                mine = needle in environ and f"SLURM_CONF={self.env['SLURM_CONF']}".encode() in environ
                stepd = Path(f"/proc/{pid}/comm").read_text().strip() == "slurmstepd"
                if mine and not stepd and labs.alive(pid):
                    found.append(pid)
        return found

    def shell(self, job_id: str) -> int:
        """The pid of a job's batch shell: the process that the stepd started."""
        ours = self.processes(job_id)
        return next(pid for pid in ours if labs.parent(pid) not in ours)

    # -- what can happen to a job

    def kill_shell(self, job_id: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a job's batch shell alone."""
        os.kill(self.shell(job_id), number)

    def requeue(self, job_id: str) -> None:
        """Put a running job back into the queue, as an administrator does."""
        self.command("scontrol", "requeue", job_id)

    # -- what can happen to a node

    def start_node(self, node: str) -> None:
        """Boot a node, unless it runs."""
        if node in self._pids and labs.alive(self._pids[node]):
            return
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        script = self.folder / f"{node}.sh"
        boot_id = labs.new_boot_id(self.folder / f"{node}.boot_id")
        script.write_text(f"set -e\nhostname {node}\n{boot_id}slurmd -D -N {node} &\nwait\n")
        isolate = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        log = self.folder / "log" / f"{node}.out"
        launcher = self.lab.start(*isolate, "sh", str(script), log=log, env=self.env)
        self._pids[node] = labs.child_of(launcher, log=log)

    def crash_node(self, node: str) -> None:
        """Power loss of a node: slurmd, every stepd and every job process there are gone at once."""
        labs.kill(self._pids[node])

    def kill_slurmd(self, node: str) -> None:
        """Kill -9 of a node's slurmd and of its stepds, which leaves the jobs' own processes without a keeper."""
        for pid in labs.namespace_members(self._pids[node]):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() in ("slurmd", "slurmstepd"):
                    os.kill(pid, signal.SIGKILL)

    def set_down(self, node: str) -> None:
        """Declare a node down, as an administrator does: its jobs end at once."""
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def resume_node(self, node: str) -> None:
        """Bring a node back, whatever was done to it. After return it takes jobs."""
        self.start_node(node)

        def ready() -> bool:
            state = self.node_states().get(node, "")
            if state.startswith(("down", "drain")):
                with contextlib.suppress(AssertionError):  # it may have healed by itself meanwhile
                    self.command("scontrol", "update", f"nodename={node}", "state=resume")
            return state in ("idle", "mixed", "allocated") and self._listens(node)

        labs.until(ready, f"{node} to take jobs")

    def _listens(self, node: str) -> bool:
        """Whether a node's slurmd takes connections: the controller notices a crash late, and a start early."""
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self._node_port(node)), timeout=5).close()
            return True
        return False

    def _node_port(self, node: str) -> int:
        return self.port + 10 + NODES.index(node)

    # -- what can happen to the controller

    def start_controller(self) -> None:
        """Start slurmctld, unless it runs. After return it answers."""
        pid = self._pids.get("slurmctld")
        if pid is None or not labs.alive(pid):
            start = 'hostname controller; exec slurmctld -D "$@"'
            isolate = ["unshare", "--uts"]
            self._daemon("slurmctld", *isolate, "sh", "-c", start, "slurmctld")
        labs.until(self._controller_answers, f"slurmctld\n{self.log('slurmctld')}")

    def _controller_answers(self) -> bool:
        with contextlib.suppress(AssertionError):
            return "is UP" in self.command("timeout", "2", "scontrol", "ping")
        return False

    def stop_controller(self) -> None:
        """Stop slurmctld: Slurm's tools then hang until they give up. Jobs run on."""
        labs.kill(self._pids["slurmctld"], signal.SIGTERM)

    def crash_controller(self) -> None:
        """Kill -9 of slurmctld: it forgets the jobs of its last seconds, but will not give their numbers again.

        Else a slurmd refuses to start a number that it has had, its node is drained and the job held until an
        administrator looks.
        """
        last = max(map(int, self.command("squeue", "-h", "-t", "all", "-o", "%A").split()), default=0)
        labs.kill(self._pids["slurmctld"])
        conf = self.folder / "slurm.conf"
        conf.write_text(re.sub(r"FirstJobId=\d+", f"FirstJobId={last + 1}", conf.read_text()))

    def freeze_controller(self) -> None:
        """Stop slurmctld where it is: connections are taken and nothing is answered."""
        os.kill(self._pids["slurmctld"], signal.SIGSTOP)

    def thaw_controller(self) -> None:
        """Let slurmctld go on."""
        os.kill(self._pids["slurmctld"], signal.SIGCONT)

    # -- in between

    def log(self, name: str) -> str:
        """The last lines of a daemon's log."""
        file = self.folder / "log" / f"{name}.log"
        return file.read_text()[-2000:] if file.exists() else ""

    def job_ids(self) -> list[str]:
        """The jobs that have not ended."""
        return self.command("squeue", "-h", "-o", "%A").split()

    def tidy(self) -> None:
        """Undo every fault and end every job. After return three nodes are idle.

        It happens after every test, and most leave little to do: each question costs a process or two.
        """
        if labs.alive(self._pids["slurmctld"]):
            self.thaw_controller()
        self.start_controller()
        states = self.node_states()
        ill = [node for node in NODES if states.get(node) != "idle" or not labs.alive(self._pids[node])]
        for node in ill:
            self.resume_node(node)
        left = self.job_ids()
        if left:
            for user in ("root", labs.USER):
                self.command("scancel", "--quiet", "-u", user)
            labs.until(lambda: not self.job_ids(), "the end of cancelled jobs")
        if ill or left:
            self.until_idle()

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Have no controller for a while."""
        self.stop_controller()
        try:
            yield
        finally:
            self.start_controller()


_DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=controller
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CommitDelay=1
"""


class AccountedCluster(Cluster):
    """A cluster with slurmdbd on MariaDB; finished jobs leave the queue soon, so that only accounting knows them."""

    # Slurm keeps ended jobs for at least 2 s; a purge comes around every 30 s or so.
    def __init__(
        self, lab: Lab, *, name: str = "accounted", port: int = 26917, min_job_age_s: int = 2
    ) -> None:
        super().__init__(lab, name=name, port=port, min_job_age_s=min_job_age_s)

    def _accounting(self) -> str:
        return "\n".join(
            (
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={self.port + 1}",
                f"AccountingStoragePass={self.folder}/munge.sock",
                "AccountingStorageTRES=gres/gpu",
            )
        )

    def _before_controller(self) -> None:
        self._start_database()
        conf = self.folder / "slurmdbd.conf"
        conf.write_text(_DBD_CONF.format(folder=self.folder, port=self.port + 1, database_port=self.port + 2))
        conf.chmod(0o600)
        self._daemon("slurmdbd", "unshare", "--uts", "sh", "-c", "hostname controller; exec slurmdbd -D")
        labs.until(self._answers, "slurmdbd")
        for words in (f"cluster {self.name}", f"account flow Cluster={self.name}", "user root Account=flow"):
            self.command("sacctmgr", "-i", "add", *words.split())
        self.command("sacctmgr", "-i", "add", "user", labs.USER, "Account=flow")

    def _answers(self) -> bool:
        with contextlib.suppress(AssertionError):
            self.command("timeout", "2", "sacctmgr", "-n", "show", "cluster")
            return True
        return False

    def _start_database(self) -> None:
        data, socket = self.folder / "mysql", self.folder / "mysql.sock"
        install = [
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
        ]
        self.lab.inside("mariadb-install-db", *install, "--skip-test-db")
        options = {
            "datadir": data,
            "socket": socket,
            "bind-address": "127.0.0.1",
            "port": self.port + 2,
            "pid-file": self.folder / "mysqld.pid",
            "innodb-flush-log-at-trx-commit": 0,
            "innodb-lock-wait-timeout": 900,  # slurmdbd asks for it
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._daemon("mariadbd", "mariadbd", "--no-defaults", "--user=root", *arguments)
        client = ["mariadb", "--no-defaults", "-uroot", f"--socket={socket}"]
        labs.until(lambda: self._runs(*client, "-e", "select 1"), "the database")
        users = [f"slurm@'{host}'" for host in ("localhost", "127.0.0.1")]
        statements = ["create database slurm_acct_db"]
        statements += [f"create user {user} identified by 'slurm'" for user in users]
        statements += [f"grant all on slurm_acct_db.* to {user}" for user in users]
        self.lab.inside(*client, "-e", "; ".join(statements))

    def _runs(self, *argv: str) -> bool:
        with contextlib.suppress(AssertionError):
            self.lab.inside(*argv)
            return True
        return False
