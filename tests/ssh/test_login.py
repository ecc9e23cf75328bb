"""Logging in: what OpenSSH's files say is followed, nobody is trusted unasked, each refusal says what to type."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flow_core import config
from flow_core.errors import AuthenticationError, ConfigError, ProviderUnavailable
from flow_core.providers.ssh_connection import HostTransport
from tests.infra.lab import Lab, until
from tests.infra.ssh import Client, Machines, Sshd, keygen

Call = Callable[..., HostTransport]


@pytest.fixture
def call(tmp_path: Path, ssh_client: Client) -> Iterator[Call]:
    """Make a transport to a host; `config_text` stands in for ~/.ssh/config."""
    made: list[HostTransport] = []

    def make(name: str = "lo", *, config_text: str | None = None, **host: object) -> HostTransport:
        more: dict[str, object] = {}
        if config_text is not None:
            more["config"] = tmp_path / "config"
            (tmp_path / "config").write_text(config_text)
        settings = config.load(
            ssh={
                "hosts": [{"name": name, **host}],
                "home": f"~/{tmp_path.name}",
                "connect_timeout_s": 5,
                **more,
            }
        ).ssh
        made.append(HostTransport(settings.hosts[0], settings, per_node=True))
        return made[-1]

    yield make
    for one in made:
        one.close()


def text(client: Client, sshd: Sshd, **options: object) -> str:
    """An ~/.ssh/config with one host, "box"."""
    lines = {
        "HostName": sshd.host,
        "Port": sshd.port,
        "User": sshd.user,
        "IdentityFile": client.key,
        "UserKnownHostsFile": client.known_hosts,
        **options,
    }
    return "Host box\n" + "".join(f"  {name} {value}\n" for name, value in lines.items())


def typed(line: str) -> None:
    """Do what a message tells to type."""
    subprocess.run(["bash", "-c", line], check=True, capture_output=True)


def refusal(transport: HostTransport) -> str:
    with pytest.raises(AuthenticationError) as caught:
        transport.call("ping")
    assert not caught.value.retryable
    return str(caught.value)


# -- who they are


def test_an_unknown_host_is_refused_with_its_fingerprint_and_the_line_that_adds_it(
    loopback_sshd: Sshd, ssh_client: Client, call: Call, tmp_path: Path
) -> None:
    known = tmp_path / "known hosts"
    config_text = text(ssh_client, loopback_sshd, UserKnownHostsFile=tmp_path / "known")
    said = refusal(call("box", config_text=config_text))
    public = loopback_sshd.folder / "host_key.pub"
    shown = subprocess.run(
        ["ssh-keygen", "-lf", str(public)], capture_output=True, text=True, check=True
    ).stdout
    assert shown.split()[1] in said, "the fingerprint as ssh-keygen shows it"
    assert not known.exists()
    line = re.search(r"type: (echo .*)$", said, re.MULTILINE)
    assert line is not None
    typed(line[1])
    assert call("box", config_text=config_text).call("ping").value is None


def test_a_pin_takes_the_place_of_known_hosts(
    loopback_sshd: Sshd, ssh_client: Client, call: Call, tmp_path: Path
) -> None:
    config_text = text(ssh_client, loopback_sshd, UserKnownHostsFile=tmp_path / "none")
    said = refusal(call("box", config_text=config_text))
    pin = re.search(r"host_key: (ssh-ed25519 \S+)", said)
    assert pin is not None
    call("box", config_text=config_text, host_key=pin[1]).call("ping")
    other = keygen(tmp_path / "other")
    assert "correct host_key" in refusal(call("box", config_text=config_text, host_key=other))


def test_a_changed_key_is_refused_with_the_line_that_forgets_it(
    loopback_sshd: Sshd, ssh_client: Client, call: Call, tmp_path: Path
) -> None:
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{loopback_sshd.port} {keygen(tmp_path / 'before')}")
    config_text = text(ssh_client, loopback_sshd, UserKnownHostsFile=known)
    said = refusal(call("box", config_text=config_text))
    assert f"{known}:1" in said and "shows another key" in said
    line = re.search(r"type: (ssh-keygen -R .*)$", said, re.MULTILINE)
    assert line is not None
    typed(line[1])
    assert "is not known" in refusal(call("box", config_text=config_text))


def test_hashed_names_aliases_patterns_and_revoked_keys_are_understood(
    loopback_sshd: Sshd, ssh_client: Client, call: Call, tmp_path: Path
) -> None:
    key = " ".join(loopback_sshd.host_key.split()[:2])
    known = tmp_path / "known"
    config_text = text(ssh_client, loopback_sshd, UserKnownHostsFile=known)

    known.write_text(f"[127.0.0.1]:{loopback_sshd.port} {key}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert known.read_text().startswith("|1|")
    call("box", config_text=config_text).call("ping")

    known.write_text(f"# a comment\n[127.0.0.*]:* {key}\n")
    call("box", config_text=config_text).call("ping")
    known.write_text(f"[127.0.0.*]:*,![127.0.0.1]:* {key}\n")
    assert "is not known" in refusal(call("box", config_text=config_text))

    known.write_text(f"the-box {key}\n")
    call("box", config_text=config_text + "  HostKeyAlias the-box\n").call("ping")

    known.write_text(f"[127.0.0.1]:{loopback_sshd.port} {key}\n@revoked * {key}\n")
    assert "marked as revoked" in refusal(call("box", config_text=config_text))


def test_nothing_in_the_configuration_turns_the_check_off(
    loopback_sshd: Sshd, ssh_client: Client, call: Call, tmp_path: Path
) -> None:
    options = {"UserKnownHostsFile": "/dev/null", "StrictHostKeyChecking": "no"}
    assert "is not known" in refusal(call("box", config_text=text(ssh_client, loopback_sshd, **options)))


# -- who we are


def test_a_key_that_is_not_accepted_is_named(
    loopback_sshd: Sshd, ssh_client: Client, call: Call, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    keygen(wrong)
    said = refusal(call("lo", identity_file=str(wrong)))
    assert f"{wrong}: refused" in said and "ssh-copy-id lo" in said
    missing = refusal(call("lo", identity_file=str(tmp_path / "missing")))
    assert f"{tmp_path / 'missing'}: does not exist" in missing


def test_a_key_may_be_given_as_text_and_is_then_the_only_one(
    loopback_sshd: Sshd, ssh_client: Client, call: Call, tmp_path: Path
) -> None:
    own = call("lo", private_key=ssh_client.key.read_text())
    own.call("ping")
    assert "PRIVATE KEY" not in repr(own.host)
    wrong = tmp_path / "wrong"
    keygen(wrong)
    assert "Keys: private_key: refused" in refusal(call("lo", private_key=wrong.read_text()))
    assert "private_key: is no private key" in refusal(call("lo", private_key="secret"))


def test_a_key_with_a_passphrase_is_taken_from_the_agent_or_named(
    loopback_sshd: Sshd, ssh_client: Client, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    shutil.copy(ssh_client.key, locked)
    locked.chmod(0o600)
    change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "sesame", "-f", str(locked)]
    subprocess.run(change, check=True, capture_output=True)
    said = refusal(call("lo", identity_file=str(locked)))
    assert f"{locked}: has a passphrase (type: ssh-add {locked})" in said

    socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        until(socket.exists, "the agent")
        env = {**os.environ, "SSH_AUTH_SOCK": str(socket)}
        for number in range(8):  # more than MaxAuthTries
            keygen(tmp_path / f"other-{number}")
            subprocess.run(["ssh-add", "-q", str(tmp_path / f"other-{number}")], env=env, check=True)
        subprocess.run(["ssh-add", "-q", str(ssh_client.key)], env=env, check=True)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        locked.with_suffix(".pub").write_bytes(ssh_client.key.with_suffix(".pub").read_bytes())
        call("lo", identity_file=str(locked)).call("ping")
        monkeypatch.delenv("SSH_AUTH_SOCK")
        options = {"IdentityAgent": socket, "IdentityFile": locked}
        call("box", config_text=text(ssh_client, loopback_sshd, **options)).call("ping")
    finally:
        agent.kill()
        agent.wait()


def test_too_many_keys_are_told_as_such(
    loopback_sshd: Sshd, ssh_client: Client, call: Call, tmp_path: Path
) -> None:
    keys = [tmp_path / f"key-{number}" for number in range(8)]
    for key in keys:
        keygen(key)
    lines = "".join(f"  IdentityFile {key}\n" for key in keys)
    said = refusal(call("box", config_text=text(ssh_client, loopback_sshd, IdentityFile=keys[0]) + lines))
    assert "hung up" in said and "IdentitiesOnly" in said


def test_a_certificate_is_offered(lab: Lab, ssh_client: Client, call: Call, tmp_path: Path) -> None:
    authority, own = tmp_path / "authority", tmp_path / "own"
    keygen(authority)
    keygen(own)
    sshd = Sshd(lab, ssh_client, name="certified", port=2251, more=f"TrustedUserCAKeys {authority}.pub")
    sign = [
        "ssh-keygen",
        "-q",
        "-s",
        str(authority),
        "-I",
        "me",
        "-n",
        sshd.user,
        str(own.with_suffix(".pub")),
    ]
    subprocess.run(sign, check=True, capture_output=True)
    try:
        call("certified", identity_file=str(own)).call("ping")
        elsewhere = tmp_path / "elsewhere.pub"
        shutil.move(tmp_path / "own-cert.pub", elsewhere)
        refusal(call("certified", identity_file=str(own)))
        options = {"CertificateFile": elsewhere, "IdentityFile": own}
        call("box", config_text=text(ssh_client, sshd, **options)).call("ping")
    finally:
        sshd.stop()


def test_a_host_that_takes_passwords_alone_is_told_as_such(
    lab: Lab, ssh_client: Client, call: Call, tmp_path: Path
) -> None:
    sshd = Sshd(lab, ssh_client, name="passwords", port=2252)
    file = sshd.folder / "sshd_config"
    only = "PasswordAuthentication yes\nPubkeyAuthentication no"
    file.write_text(file.read_text().replace("PasswordAuthentication no", only))
    sshd.stop()
    sshd.start()
    try:
        assert "password" in refusal(call("passwords"))
    finally:
        sshd.stop()


# -- the way there


def test_a_jump_host_and_a_proxy_command_lead_there(
    ssh_machines: Machines, loopback_sshd: Sshd, ssh_client: Client, call: Call
) -> None:
    behind = ssh_client.config.read_text() + "\nHost hidden\n  HostName h2\n  HostKeyAlias h2\n"
    behind += f"  User ada\n  IdentityFile {ssh_client.key}\n  UserKnownHostsFile {ssh_client.known_hosts}\n"
    jumped = call("hidden", config_text=behind + "  ProxyJump h1\n")
    assert jumped.run(["hostname"]).stdout == b"h2\n"
    assert ssh_machines["h1"].connections() == 1

    twice = call("hidden", config_text=behind + "  ProxyJump lo,h1\n")
    assert twice.run(["hostname"]).stdout == b"h2\n"

    away = f"  ProxyCommand ssh -F {ssh_client.config} -W 198.51.100.12:22 h1\n"
    commanded = call("hidden", config_text=behind + away)
    assert commanded.run(["hostname"]).stdout == b"h2\n"

    with pytest.raises(ConfigError, match="circle"):
        call("hidden", config_text=behind + "  ProxyJump hidden\n").call("ping")


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ({"name": "no-such-host.invalid"}, "has no address"),
        ({"name": "lo", "port": 9}, "port 9: Connection refused"),
    ],
)
def test_a_host_that_cannot_be_reached_is_named_with_the_reason(
    loopback_sshd: Sshd, call: Call, host: dict[str, object], words: str
) -> None:
    with pytest.raises(ProviderUnavailable, match=words) as caught:
        call(**host).call("ping")
    assert caught.value.retryable and str(host["name"]) in str(caught.value)


# -- what is there


def test_a_missing_or_old_python_is_told_with_the_way_out(
    loopback_sshd: Sshd, call: Call, tmp_path: Path
) -> None:
    with pytest.raises(ProviderUnavailable, match=r"there is no 'python9' on lo .*127.0.0.1:2222") as caught:
        call("lo", python="python9").call("ping")
    assert "ssh.hosts[].python" in str(caught.value)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'This account is not available' >&2\nexit 3\n")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    with pytest.raises(
        ProviderUnavailable, match=r"it printed: This account is not available \(exit code 3\)"
    ):
        call("lo", python=str(broken)).call("ping")


def test_a_login_shell_that_prints_does_no_harm(loopback_sshd: Sshd, call: Call) -> None:
    home = loopback_sshd.lab.home / loopback_sshd.user
    rc = home / ".bashrc"
    rc.write_text("echo Welcome; echo 'to all' >&2; printf 'no newline'\n")
    try:
        assert call("lo").run(["echo", "hi"]).stdout == b"hi\n"
    finally:
        rc.unlink()


def test_a_home_that_cannot_be_used_is_told(loopback_sshd: Sshd, call: Call) -> None:
    with pytest.raises(ProviderUnavailable, match=r"the folder '/proc/nothing' on lo .* cannot be used"):
        call("lo", home="/proc/nothing").call("ping")


# -- connections


def test_many_threads_share_one_connection(ssh_machines: Machines, call: Call) -> None:
    transport = call("h1")
    threads = [threading.Thread(target=transport.run, args=(["sleep", "0.1"],)) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ssh_machines["h1"].connections() == 1


def test_many_processes_that_connect_at_once_all_get_through(
    loopback_sshd: Sshd, call: Call, tmp_path: Path
) -> None:
    code = """
import sys
from flow_core import config
from flow_core.providers.ssh_connection import host_transport
settings = config.load(ssh={"hosts": ["lo"], "home": sys.argv[1], "connect_timeout_s": 60}).ssh
print(host_transport(settings.hosts[0], settings).run(["echo", "hi"]).stdout)
"""
    command = [sys.executable, "-c", code, f"~/{tmp_path.name}"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(25)]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert (out, process.returncode) == (b"b'hi\\n'\n", 0), err.decode()


def _in_child(transport: HostTransport, pipe: object) -> None:
    pipe.send(transport.run(["echo", "child"]).stdout)  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_makes_a_connection_of_its_own(ssh_machines: Machines, call: Call) -> None:
    transport = call("h1")
    transport.call("ping")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(transport, theirs))
    child.start()
    assert ours.poll(30) and ours.recv() == b"child\n"
    child.join(30)
    assert transport.run(["echo", "parent"]).stdout == b"parent\n"
    assert ssh_machines["h1"].connections() == 1


def test_a_connection_that_is_ended_is_made_anew(loopback_sshd: Sshd, call: Call) -> None:
    transport = call("lo")
    transport.call("ping")
    with pytest.raises(
        ProviderUnavailable, match="ended"
    ):  # nobody knows what became of it, so it is not repeated
        transport.run(["sh", "-c", "kill $(ps -o ppid= -p $PPID)"], deadline_s=5)
    until(lambda: not transport.connected, "the loss of the connection")
    assert transport.run(["echo", "again"]).stdout == b"again\n"


def test_nothing_secret_is_on_a_command_line(loopback_sshd: Sshd, call: Call) -> None:
    transport = call("lo")
    looked = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; done"
    secret = "hunter" + "2"
    shown = transport.run(["sh", "-c", f"{looked}; echo $SECRET"], env={"SECRET": secret}).stdout.decode()
    assert shown.count(secret) == 1, "the environment of the program itself"


def test_paths_and_words_arrive_as_they_are(loopback_sshd: Sshd, call: Call) -> None:
    words = ["a b", "$HOME", "it's", 'q"q', "back\\slash", "new\nline", "*", "", "ü世"]
    shown = call("lo", home="~/it's; echo a  home").run(
        ["python3", "-c", "import sys; print(sys.argv[1:])", *words]
    )
    assert shown.stdout.decode() == f"{words}\n"
