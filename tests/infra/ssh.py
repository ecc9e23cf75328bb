"""Real sshd: one on the loopback of a lab, and machines of their own on a network without a way out.

A machine has its own processes, host name, accounts, /home, /tmp, /var/tmp, /run and boot id, and Debian's Python. It
does not see this checkout. What it shares with the tests is the read-only part of a machine: /usr, /lib, /etc.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.infra import lab as labs
from tests.infra.lab import USER, Lab

_ROOT = Path(__file__).resolve().parents[2]
LOOPBACK_PORT = 2222

#: sshd's own defaults hold for MaxSessions (10) and MaxStartups (10:30:100): users meet them too.
_SSHD = """\
HostKey {etc}/host_key
AuthorizedKeysFile {etc}/authorized_keys
PidFile none
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
AcceptEnv LANG LC_*
Subsystem sftp internal-sftp
"""

_NVIDIA_SMI = """\
#!/usr/bin/python3
# Answers --query-gpu=… --format=csv,noheader,nounits for {count} GPUs.
import sys
query = next((one for one in sys.argv if one.startswith("--query-gpu=")), "")
for index in range({count}):
    known = {{"index": str(index), "name": "{model}", "uuid": f"GPU-{{index:08x}}", "memory.total": "81559"}}
    print(", ".join(known.get(field, "[N/A]") for field in query.partition("=")[2].split(",")))
"""


class Client:
    """What a user has: a key, the hosts' keys, and a configuration that names the hosts. `home` serves as $HOME."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / ".ssh"
        self.folder.mkdir(parents=True, mode=0o700)
        self.key = self.folder / "id_ed25519"
        keygen(self.key)
        self.config = self.folder / "config"
        self.known_hosts = self.folder / "known_hosts"

    def learn(self, alias: str, address: str, port: int, host_key: str) -> None:
        """Add a host under an alias."""
        lines = [f"Host {alias}", f"HostName {address}", f"Port {port}", f"User {USER}"]
        lines += [f"IdentityFile {self.key}", f"UserKnownHostsFile {self.known_hosts}"]
        with self.config.open("a") as file:
            file.write("\n  ".join(lines) + "\n")
        names = [alias, address] if port == 22 else [f"[{address}]:{port}"]
        with self.known_hosts.open("a") as file:
            file.write(f"{','.join(names)} {' '.join(host_key.split()[:2])}\n")


def keygen(path: Path) -> str:
    """Make a key without a passphrase; return its public half."""
    labs.output(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)])
    return path.with_suffix(".pub").read_text()


class Sshd:
    """An sshd on the lab's loopback; it shares the lab's files, which are this machine's, and its accounts."""

    def __init__(
        self, lab: Lab, client: Client, *, name: str = "lo", port: int = LOOPBACK_PORT, more: str = ""
    ) -> None:
        self.lab, self.name, self.host, self.port, self.user = lab, name, "127.0.0.1", port, USER
        self.folder = lab.folder / f"sshd-{name}"
        self._write(client, more)
        self.log = self.folder / "sshd.log"
        self.pid = 0
        self.start()

    def _write(self, client: Client, more: str) -> None:
        self.folder.mkdir()
        self.host_key = keygen(self.folder / "host_key")
        (self.folder / "authorized_keys").write_text(client.key.with_suffix(".pub").read_text())
        listen = f"ListenAddress {self.host}\nPort {self.port}\n"
        (self.folder / "sshd_config").write_text(f"{listen}{_SSHD.format(etc=self.folder)}{more}\n")
        client.learn(self.name, self.host, self.port, self.host_key)

    def start(self) -> None:
        """Start it, unless it runs. After return it takes connections."""
        if self.pid and labs.alive(self.pid):
            return
        config = str(self.folder / "sshd_config")
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists; its service would make it
        self.pid = self.lab.start("/usr/sbin/sshd", "-D", "-e", "-f", config, log=self.log)
        _wait_for_banner(self.lab, self.host, self.port)

    def stop(self) -> None:
        """Take no more connections; those that are open stay."""
        labs.kill(self.pid, signal.SIGTERM)


class Machine:
    """One machine: `name`, `address`, and what can happen to it."""

    def __init__(self, lab: Lab, client: Client, number: int, *, gpus: int) -> None:
        self.name, self.address = f"h{number}", f"{labs.NET}.{10 + number}"
        self._lab, self._link = lab, f"v{number}"
        self.folder = lab.folder / self.name
        self._disturbed = False  # whether connections may have been cut off from their clients
        self._write(client, gpus)
        # The network outlives the machine's processes, as a machine's address does: a new connection to a crashed
        # machine is refused at once. `cut` it as well, and it is silent.
        self._net = subprocess.Popen(
            ["nsenter", f"--net=/proc/{lab.init}/ns/net", "unshare", "--net", "cat"],
            stdin=subprocess.PIPE,  # it ends when we do
            stdout=subprocess.DEVNULL,
        )
        self._plug_in()
        self.init = 0
        self.boot()

    def _write(self, client: Client, gpus: int) -> None:
        hosts = {f"h{number}": f"{labs.NET}.{10 + number}" for number in range(1, 10)}
        labs.write_accounts(self.folder / "etc", Path("/home"), hosts, homes=self.folder / "home")
        ssh = self.folder / "etc" / "ssh"
        ssh.mkdir()
        self.host_key = keygen(ssh / "host_key")
        (ssh / "authorized_keys").write_text(client.key.with_suffix(".pub").read_text())
        (ssh / "sshd_config").write_text(_SSHD.format(etc="/etc/ssh"))
        (self.folder / "var-tmp").mkdir()
        (self.folder / "var-tmp").chmod(0o1777)
        (self.folder / "bin").mkdir()
        if gpus:
            tool = self.folder / "bin" / "nvidia-smi"
            tool.write_text(_NVIDIA_SMI.format(count=gpus, model="NVIDIA A100-SXM4-80GB"))
            tool.chmod(0o755)
        client.learn(self.name, self.address, 22, self.host_key)

    def _plug_in(self) -> None:
        in_lab = ["nsenter", f"--net=/proc/{self._lab.init}/ns/net", "ip"]
        in_own = ["nsenter", f"--net=/proc/{self._net.pid}/ns/net", "ip"]
        lab_net = os.readlink(f"/proc/{self._lab.init}/ns/net")
        own = f"/proc/{self._net.pid}/ns/net"
        labs.until(lambda: os.readlink(own) not in (lab_net, os.readlink("/proc/self/ns/net")), "a network")
        pair = [self._link, "type", "veth", "peer", "name", "eth0", "netns", str(self._net.pid)]
        labs.output([*in_lab, "link", "add", *pair])
        labs.output([*in_lab, "link", "set", self._link, "master", labs.BRIDGE, "up"])
        labs.output([*in_own, "addr", "add", f"{self.address}/24", "dev", "eth0"])
        for device in ("eth0", "lo"):
            labs.output([*in_own, "link", "set", device, "up"])

    # -- its life

    @property
    def running(self) -> bool:
        """Whether it has booted and not crashed since."""
        return self.init != 0 and labs.alive(self.init)

    def boot(self) -> None:
        """Start it, unless it runs: a new boot id, empty /tmp and /run, the same disk. After return sshd answers."""
        if self.running:
            return
        script = self.folder / "boot.sh"
        script.write_text(self._boot_script())
        isolate = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        log = self.folder / "console.log"
        launcher = self._lab.start(*isolate, "sh", str(script), log=log, net=self._net.pid)
        self.init = labs.child_of(launcher, log=log)
        _wait_for_banner(self._lab, "127.0.0.1", 22, net=self._net.pid)

    def _boot_script(self) -> str:
        volatile = "".join(
            f"mount -t tmpfs -o mode={mode} none {path}\n"
            for path, mode in (("/tmp", 1777), ("/run", 755), ("/dev/shm", 1777))
        )
        binds = "".join(
            f"mount --bind {self.folder / own} {path}\n"
            for own, path in (("home", "/home"), ("etc/ssh", "/etc/ssh"), ("bin", "/usr/local/bin"))
        )
        demo = _ROOT / ".venvs" / "demo"  # stands for the Python of a GPU machine
        tools = "mount -t tmpfs -o mode=755 none /srv\n"
        if demo.exists():
            tools += f"mkdir /srv/demo\nmount --bind {demo} /srv/demo\n"
        terminals = "mount -t devpts -o newinstance,ptmxmode=0666,gid=5 none /dev/pts\n"
        terminals += "mount --bind /dev/pts/ptmx /dev/ptmx\n"
        own = labs.own_files(self.folder)
        # The project is out of sight: where it lies in /tmp it is so already. The last mount hides this script.
        last = f"if [ -d {_ROOT} ]; then mount -t tmpfs none {_ROOT}; fi\n"
        last += f"mount --bind {self.folder}/var-tmp /var/tmp\n"
        start = "mkdir /run/sshd\n/usr/sbin/sshd -D -E /var/log/sshd.log &\nwait\n"
        return f"set -e\nhostname {self.name}\n{own}{tools}{volatile}{binds}{terminals}{last}{start}"

    def crash(self) -> None:
        """Power loss: every process is gone at once. New connections are refused."""
        labs.kill(self.init)
        labs.until(lambda: not labs.namespace_members(self.init), f"the end of {self.name}")

    def reboot(self) -> None:
        """Crash and start again."""
        self.crash()
        self.boot()

    def freeze(self) -> None:
        """Stop every process; the kernel still acknowledges what arrives. `thaw` undoes it."""
        self._disturbed = True
        labs.signal_all(self.init, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let every process go on."""
        labs.signal_all(self.init, signal.SIGCONT)

    # -- its network

    def cut(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told. `heal` undoes it."""
        self._cable("down")

    def heal(self) -> None:
        """Plug the cable in again."""
        self._cable("up")

    def _cable(self, state: str) -> None:
        self._disturbed = True
        lab_net = f"--net=/proc/{self._lab.init}/ns/net"
        labs.output(["nsenter", lab_net, "ip", "link", "set", self._link, state])

    def reject(self) -> None:
        """Answer every packet to sshd with a reset, also those of open connections. `clear` undoes it."""
        self._disturbed = True
        rule = ["INPUT", "-p", "tcp", "--dport", "22", "-j", "REJECT", "--reject-with", "tcp-reset"]
        self._iptables("-A", *rule)

    def clear(self) -> None:
        """Take packets again."""
        self._iptables("-F", "INPUT")

    def _iptables(self, *arguments: str) -> None:
        labs.output(["nsenter", f"--net=/proc/{self._net.pid}/ns/net", "iptables", "-w", *arguments])

    # -- looking into it

    def run(self, command: str, *, user: str = USER) -> str:
        """Run a shell command on it, not through sshd; return what it printed."""
        return self._lab.inside("runuser", "-u", user, "--", "sh", "-c", command, target=self.init)

    def connections(self) -> int:
        """How many clients are connected to its sshd."""
        listing = self._lab.inside(
            "ss", "-Htn", "state", "established", "sport", "=", ":22", target=self.init
        )
        return len(listing.splitlines())

    def devices(self) -> str:
        """The counters of its network devices: /proc/net/dev."""
        return labs.output(
            ["nsenter", f"--net=/proc/{self._net.pid}/ns/net", "cat", "/proc/thread-self/net/dev"]
        )

    def read(self, path: str) -> str:
        """Return a file of its disk, as /home/… or /var/tmp/…; also when it is down."""
        for own, prefix in (("home", "/home/"), ("var-tmp", "/var/tmp/")):
            if path.startswith(prefix):
                return (self.folder / own / path[len(prefix) :]).read_text()
        raise ValueError(f"{path} is not on a disk of {self.name}")

    def tidy(self) -> None:
        """Undo every fault, end what tests left running and empty /tmp.

        sshd stays, and so do its connections unless there was a fault: a client that gave up during one could not say
        so, and its connection would be counted for hours.
        """
        disturbed = self._disturbed
        if disturbed:
            self.clear()
            self.heal()
        self._disturbed = False
        if not self.running:
            self.boot()
        self.thaw()
        stay = {self.init} | self._sshd(connections=not disturbed)
        for pid in set(labs.namespace_members(self.init)) - stay:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run("find /tmp -mindepth 1 -delete", user="root")

    def _sshd(self, *, connections: bool) -> set[int]:
        """The listening sshd and, if asked for, those of its connections."""
        found = set()
        for pid in labs.namespace_members(self.init):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "sshd":
                    found.add(pid)
        return found if connections else {pid for pid in found if labs.parent(pid) not in found}

    def close(self) -> None:
        """End it for good."""
        if self.running:
            self.thaw()
            self.crash()
        assert self._net.stdin is not None
        self._net.stdin.close()
        self._net.wait()


class Machines(Mapping[str, Machine]):
    """Machines h1, h2, … on one network, with `client` to log in on them."""

    def __init__(self, lab: Lab, client: Client, *, count: int = 3, gpus: int = 2) -> None:
        self.client = client
        machines = [Machine(lab, client, number, gpus=gpus) for number in range(1, count + 1)]
        self._machines = {machine.name: machine for machine in machines}

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._machines)

    def __len__(self) -> int:
        return len(self._machines)

    def tidy(self) -> None:
        """Undo every fault on every machine."""
        for machine in self.values():
            machine.tidy()

    def close(self) -> None:
        """End all of them."""
        for machine in self.values():
            machine.close()


def _wait_for_banner(lab: Lab, host: str, port: int, *, net: int | None = None) -> None:
    bash = shutil.which("bash") or "/bin/bash"
    knock = f"exec 3<>/dev/tcp/{host}/{port} && read -t 5 -u 3 line && [[ $line == SSH-* ]]"

    def answers() -> bool:
        command = ["nsenter", f"--net=/proc/{net or lab.init}/ns/net", bash, "-c", knock]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    labs.until(answers, f"sshd at {host}:{port}")
