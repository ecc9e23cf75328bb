"""The test machines are what the tests take them for."""

from __future__ import annotations

import os
import subprocess

from tests.infra.ssh import Client, Machines, Sshd


def ssh(client: Client, host: str, command: str) -> subprocess.CompletedProcess[str]:
    options = ["-F", str(client.config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=2"]
    return subprocess.run(["ssh", *options, host, command], capture_output=True, text=True, check=False)


def test_each_machine_is_one_of_its_own(ssh_machines: Machines) -> None:
    ask = "hostname; cat /proc/sys/kernel/random/boot_id; touch /tmp/mine ~/mine; ls /tmp | wc -l; pwd"
    seen = {name: ssh(ssh_machines.client, name, ask).stdout.split() for name in ssh_machines}
    assert [words[0] for words in seen.values()] == ["h1", "h2", "h3"]
    assert len({words[1] for words in seen.values()}) == 3
    assert {tuple(words[2:]) for words in seen.values()} == {("1", "/home/ada")}


def test_a_machine_does_not_see_this_checkout_and_has_a_python(ssh_machines: Machines) -> None:
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    assert ssh(ssh_machines.client, "h1", f"ls -A '{checkout}'; python3 -c 'print(1)'").stdout == "1\n"


def test_a_machine_shows_its_gpus(ssh_machines: Machines) -> None:
    query = "nvidia-smi --query-gpu=index,memory.total --format=csv,noheader,nounits"
    assert ssh(ssh_machines.client, "h1", query).stdout == "0, 81559\n1, 81559\n"


def test_a_crash_ends_every_process_and_a_boot_keeps_the_disk(ssh_machines: Machines) -> None:
    client, machine = ssh_machines.client, ssh_machines["h1"]
    boot = machine.run("cat /proc/sys/kernel/random/boot_id; echo kept > ~/kept; touch /tmp/gone")
    with subprocess.Popen(
        ["ssh", "-F", str(client.config), "h1", "echo up; sleep 100"], stdout=subprocess.PIPE
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == b"up\n"
        machine.crash()
        assert run.wait(timeout=10) == 255
    assert "refused" in ssh(client, "h1", "true").stderr
    machine.boot()
    assert machine.run("cat ~/kept; ls /tmp; pgrep sleep || true") == "kept\n"
    assert machine.run("cat /proc/sys/kernel/random/boot_id") != boot


def test_a_cut_machine_is_silent_until_it_is_healed(ssh_machines: Machines) -> None:
    ssh_machines["h2"].cut()
    assert "timed out" in ssh(ssh_machines.client, "h2", "true").stderr
    ssh_machines["h2"].heal()
    assert ssh(ssh_machines.client, "h2", "echo back").stdout == "back\n"


def test_a_frozen_machine_takes_connections_and_says_nothing(ssh_machines: Machines) -> None:
    ssh_machines["h3"].freeze()
    assert "banner" in ssh(ssh_machines.client, "h3", "true").stderr
    ssh_machines["h3"].thaw()
    assert ssh(ssh_machines.client, "h3", "echo back").stdout == "back\n"


def test_a_machine_that_rejects_refuses_at_once(ssh_machines: Machines) -> None:
    ssh_machines["h1"].reject()
    assert "refused" in ssh(ssh_machines.client, "h1", "true").stderr
    ssh_machines["h1"].clear()
    assert ssh(ssh_machines.client, "h1", "echo back").stdout == "back\n"


def test_the_loopback_host_shares_our_files(loopback_sshd: Sshd, ssh_client: Client) -> None:
    assert ssh(ssh_client, "lo", f"cat {loopback_sshd.folder}/host_key.pub").stdout == loopback_sshd.host_key
    loopback_sshd.stop()
    assert "refused" in ssh(ssh_client, "lo", "true").stderr


def test_machines_have_no_way_out(ssh_machines: Machines) -> None:
    routes = ssh_machines["h1"].run("ip route").splitlines()
    assert len(routes) == 1 and routes[0].startswith("198.51.100.0/24 dev eth0")
