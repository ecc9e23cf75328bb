"""Many tasks over three SSH hosts, and a large code tree next to rsync: ``make bench-ssh``.

The hosts are those of the tests (`tests/infra`): real sshds on this machine, each with its own processes and files, so
the wire is quicker than any network and the processors are shared. Bytes are counted on the hosts' network devices,
connections in sshd's log. The systems of a comparison take turns within each round.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from flow_core import Flow
from flow_core.providers import transport
from tests.benchmarks import pages
from tests.infra import packages
from tests.infra.lab import Lab
from tests.infra.ssh import Client, Machine, Machines

Lines = list[tuple[str, ...]]


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


# --- what the wire sees ----------------------------------------------------------------------------------------------


def wire_bytes(machine: Machine) -> int:
    """What has gone in and out of a host's network device."""
    line = next(one for one in machine.devices().splitlines() if "eth0:" in one)
    fields = line.split(":")[1].split()
    return int(fields[0]) + int(fields[8])


def logins(machine: Machine) -> int:
    """How often somebody has logged in."""
    return (machine.folder / "etc" / "log" / "sshd.log").read_text().count("Accepted publickey")


@contextmanager
def counted_calls() -> Iterator[list[str]]:
    """Collect the verbs of every question that is put to an agent."""
    verbs: list[str] = []
    original = transport.AgentClient.call

    def call(self: transport.AgentClient, verb: str, *args: object, **more: object) -> object:
        verbs.append(verb)
        return original(self, verb, *args, **more)  # type: ignore[arg-type]

    transport.AgentClient.call = call  # type: ignore[assignment, method-assign]
    try:
        yield verbs
    finally:
        transport.AgentClient.call = original  # type: ignore[method-assign]


# --- many tasks ------------------------------------------------------------------------------------------------------


def many_tasks(machines: Machines, count: int, threads: int | None) -> Lines:
    """Submit `count` no-ops, from so many threads or (None) with one `run_many`, and wait for all of them."""
    flow = flow_on(machines, f"~/many-{threads}")
    flow.run(["true"], upload_code=False).wait(60)  # the runner is installed, the first connection is open
    before = {name: (wire_bytes(machine), logins(machine)) for name, machine in machines.items()}
    with counted_calls() as verbs:
        begin = time.perf_counter()
        ids = submit(flow, count, threads)
        submitted = time.perf_counter() - begin
        ends = flow.engine.wait(ids, timeout=600)
        wall = time.perf_counter() - begin
    assert all(end.exit_code == 0 for end in ends.values())
    spent = sum(wire_bytes(machine) - before[name][0] for name, machine in machines.items())
    opened = sum(logins(machine) - before[name][1] for name, machine in machines.items())
    how = "run_many" if threads is None else f"{threads} thread{'s' * (threads > 1)}"
    return [
        (f"{count} tasks, {how}: submitting", f"{submitted:.2f} s"),
        ("… until all have ended", f"{wall:.2f} s, {count / wall:.0f} tasks/s"),
        ("… questions per task", f"{len(verbs) / count:.2f}"),
        ("… bytes on the wire per task", f"{spent / count:,.0f}"),
        ("… logins meanwhile, all hosts together", str(opened)),
    ]


def connections(machines: Machines) -> int:
    return sum(machine.connections() for machine in machines.values())


def submit(flow: Flow, count: int, threads: int | None) -> list[str]:
    """Submit no-ops; return their ids."""
    if threads is None:
        return [task.task_id for task in flow.run_many([["true"]] * count, upload_code=False)]

    def one(_number: int) -> str:
        return flow.run(["true"], upload_code=False).task_id

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(count)))


def by_hand(machines: Machines, count: int) -> Lines:
    """What the same number of `ssh HOST true` takes: over one shared connection per host, and each by its own."""
    client = machines.client
    found: Lines = []
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as sockets:
        shared = ["-o", "ControlMaster=auto", "-o", f"ControlPath={sockets}/%n", "-o", "ControlPersist=900"]
        for what, options in (("one connection per host", shared), ("one connection each", [])):
            command = ["ssh", "-F", str(client.config), *options]
            for name in machines:
                subprocess.run([*command, name, "true"], check=True, capture_output=True)

            def one(number: int, command: list[str] = command) -> int:
                host = list(machines)[number % len(machines)]
                tries = 1
                while subprocess.run([*command, host, "true"], capture_output=True, check=False).returncode:
                    tries += 1  # sshd refuses some of many that log in at once (MaxStartups)
                return tries

            with ThreadPoolExecutor(8) as pool:
                begin = time.perf_counter()
                tries = sum(pool.map(one, range(count)))
                took = time.perf_counter() - begin
            refused = f", {tries - count} refused and tried again" if tries > count else ""
            found.append((f"{count} times `ssh HOST true`, 8 at once, {what}", f"{took:.2f} s{refused}"))
        for name in machines:
            subprocess.run(
                ["ssh", "-F", str(client.config), *shared, "-O", "exit", name],
                capture_output=True,
                check=True,
            )
    return found


# --- a large code tree -----------------------------------------------------------------------------------------------


def make_tree(root: Path, megabytes: int, seed: int) -> list[Path]:
    """Write files of 25 kB, half of them text and half of them noise; return them."""
    noise = random.Random(seed)
    words = [f"{noise.getrandbits(40):x}" for _ in range(4000)]
    files = []
    for number in range(megabytes * 40):
        file = root / f"package_{number % 40}" / f"module_{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number % 2:
            file.write_bytes(noise.randbytes(25_000))
        else:
            file.write_text(" ".join(noise.choices(words, k=2400))[:25_000])
        files.append(file)
    return files


def code_tree(machines: Machines, megabytes: int, rounds: int) -> Lines:
    """Send a tree, send it again, and send it with three changed files."""
    measured: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="flow-tree-") as folder:
            one_round(machines, Path(folder), megabytes, number, measured)
    lines: Lines = []
    for (what, name), samples in measured.items():
        times, sizes = zip(*samples, strict=True)
        spread = f"{statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
        lines.append(
            (f"{megabytes} MB, {what}: {name}", f"{spread}, {statistics.median(sizes) / 1e6:.2f} MB")
        )
    return lines


def one_round(
    machines: Machines,
    root: Path,
    megabytes: int,
    number: int,
    measured: dict[tuple[str, str], list[tuple[float, int]]],
) -> None:
    files = make_tree(root, megabytes, number)
    flow = flow_on(machines, f"~/tree-{number}", only="h1")
    flow.run(["true"], upload_code=False).wait(60)
    senders: list[tuple[str, Machine, Callable[[], None]]] = [
        ("flow.run(upload_code=True)", machines["h1"], lambda: submitted_from(flow, root)),
        ("rsync -a", machines["h2"], lambda: rsync(machines.client, root, "h2", number)),
        ("rsync -az", machines["h3"], lambda: rsync(machines.client, root, "h3", number, "-z")),
    ]
    turned = senders[number % 3 :] + senders[: number % 3]
    for what in ("the whole tree", "nothing changed", "three files changed"):
        if what == "three files changed":
            for file in files[:1200:400]:
                file.write_bytes(file.read_bytes()[:-10] + b"# changed\n")
        for name, machine, send in turned:
            before = wire_bytes(machine)
            took = timed(send)
            measured.setdefault((what, name), []).append((took, wire_bytes(machine) - before))


def submitted_from(flow: Flow, root: Path) -> None:
    before = Path.cwd()
    os.chdir(root)
    try:
        flow.run(["true"], upload_code=True)
    finally:
        os.chdir(before)


def rsync(client: Client, root: Path, host: str, number: int, *more: str) -> None:
    command = ["rsync", "-a", *more, "-e", f"ssh -F {client.config}", f"{root}/", f"{host}:tree-{number}"]
    subprocess.run(command, check=True, capture_output=True)


# --- all of it -------------------------------------------------------------------------------------------------------


def flow_on(machines: Machines, home: str, *, only: str | None = None) -> Flow:
    return Flow("ssh", ssh={"hosts": [only] if only else list(machines), "home": home})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--docs", type=Path, help="the page that the table goes to", default=pages.BENCHMARKS)
    options = parser.parse_args()
    packages.install(packages.SSH, packages.Needs(("rsync",), ("rsync",)))
    with ExitStack() as stack:
        lab = stack.enter_context(closing(Lab()))
        stack.enter_context(lab.entered())
        client = Client(lab.folder / "client")
        os.environ["HOME"] = str(client.home)
        machines = stack.enter_context(closing(Machines(lab, client)))
        lines = [
            *many_tasks(machines, options.tasks, threads=1),
            *many_tasks(machines, options.tasks, threads=16),
            *many_tasks(machines, options.tasks, threads=None),
            ("connections open then, one per host and home", str(connections(machines))),
            *by_hand(machines, options.tasks),
            *code_tree(machines, options.megabytes, options.rounds),
        ]
    pages.show("SSH hosts", lines, target="bench-ssh", page=options.docs)


if __name__ == "__main__":
    main()
