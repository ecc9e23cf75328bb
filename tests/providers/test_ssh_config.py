"""What is known of a host before it is called: our settings, OpenSSH's files, known_hosts. No network."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from flow_core import config
from flow_core.errors import ConfigError
from flow_core.providers.ssh_config import Target, fingerprint, known_keys, resolve

Resolve = Callable[..., Target]

KEY = base64.b64encode(b"\0\0\0\x0bssh-ed25519" + bytes(36)).decode()


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Resolve a host against an ~/.ssh/config with this text."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    def make(text: str = "", host: object = "box", **environ: str) -> Target:
        (tmp_path / "config").write_text(text)
        settings = config.load(environ={}, ssh={"hosts": [host], "config": tmp_path / "config"}).ssh
        return resolve(settings.hosts[0], settings, environ)

    return make


def test_without_any_file_a_host_is_what_its_name_says(target: Resolve, tmp_path: Path) -> None:
    found = target(host="ada@gpu1:2222")
    assert (found.host, found.port, found.user, found.known_as) == ("gpu1", 2222, "ada", "[gpu1]:2222")
    assert found.identities == tuple(
        f"{tmp_path}/.ssh/{name}" for name in ("id_ed25519", "id_ecdsa", "id_rsa")
    )
    assert found.known_hosts[0] == f"{tmp_path}/.ssh/known_hosts"
    assert str(found) == "gpu1"


def test_the_users_file_is_followed_and_our_settings_go_before_it(target: Resolve, tmp_path: Path) -> None:
    text = """
    Host box
      HostName 10.0.0.1
      Port 2022
      User bob
      IdentityFile ~/own
      IdentityFile /other
      IdentitiesOnly yes
      CertificateFile ~/own-cert.pub
      UserKnownHostsFile ~/known /more
      GlobalKnownHostsFile none
      HostKeyAlias the-box
    Host *
      User somebody
    """
    found = target(text)
    assert (found.host, found.port, found.user, found.known_as) == ("10.0.0.1", 2022, "bob", "the-box")
    assert str(found) == "box (bob@10.0.0.1:2022)"
    assert found.identities == (f"{tmp_path}/own", "/other")
    assert found.certificates == (f"{tmp_path}/own-cert.pub",)
    assert found.identities_only
    assert found.known_hosts == (f"{tmp_path}/known", "/more")
    ours = {"name": "box", "host": "10.9.9.9", "user": "ada", "port": 22, "identity_file": "/mine"}
    found = target(text, host=ours)
    assert (found.host, found.user, found.port, found.identities) == ("10.9.9.9", "ada", 22, ("/mine",))


def test_ways_around_are_resolved_hop_by_hop(target: Resolve) -> None:
    text = """
    Host box
      ProxyJump outer,inner:2222
    Host outer
      User o
      ProxyJump gate
    Host inner
      HostName 10.0.0.2
    Host commanded
      ProxyCommand connect %h %p
    Host none
      ProxyJump none
    """
    found = target(text)
    assert [(hop.name, hop.host, hop.port) for hop in found.jumps] == [
        ("gate", "gate", 22),
        ("outer", "outer", 22),
        ("inner", "10.0.0.2", 2222),
    ]
    assert target(text, host="commanded").proxy_command == "connect commanded 22"
    assert target(text, host="none").jumps == ()
    with pytest.raises(ConfigError, match="circle: a -> b -> a"):
        target("Host a\n ProxyJump b\nHost b\n ProxyJump a\n", host="a")


@pytest.mark.parametrize(
    ("option", "agent"),
    [
        ("", "/from/environment"),
        ("IdentityAgent SSH_AUTH_SOCK", "/from/environment"),
        ("IdentityAgent none", None),
        ("IdentityAgent $MINE", "/mine"),
        ("IdentityAgent /a/socket", "/a/socket"),
    ],
)
def test_the_agent_is_the_one_that_is_named(target: Resolve, option: str, agent: str | None) -> None:
    found = target(f"Host *\n {option}\n", SSH_AUTH_SOCK="/from/environment", MINE="/mine")
    assert found.agent == agent


def test_a_file_that_is_no_configuration_is_named(target: Resolve, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/config cannot be read"):
        target("Host box\n nonsense")


@pytest.mark.parametrize(
    ("line", "known"),
    [
        (f"box ssh-ed25519 {KEY}", True),
        (f"BOX,other ssh-ed25519 {KEY} a comment", True),
        (f"*,!box ssh-ed25519 {KEY}", False),
        (f"b?x ssh-ed25519 {KEY}", True),
        (f"[box]:2222 ssh-ed25519 {KEY}", False),
        (f"# box ssh-ed25519 {KEY}", False),
        (f"|1|F1E1KeoE/eEWhi10WpGv4OdiO6Y=|3988QV0VE8wmZL7suNrYQLITLCg= ssh-ed25519 {KEY}", False),
        ("box ssh-ed25519", False),
        ("|1|broken", False),
        ("", False),
    ],
)
def test_lines_of_known_hosts(target: Resolve, tmp_path: Path, line: str, known: bool) -> None:
    (tmp_path / "known").write_text(f"first line\n{line}\n")
    found = known_keys(target("Host *\n UserKnownHostsFile ~/known\n GlobalKnownHostsFile none\n"))
    assert [key.where for key in found] == ([f"{tmp_path}/known:2"] if known else [])


def test_a_pin_is_all_that_counts(target: Resolve, tmp_path: Path) -> None:
    found = target(
        "Host *\n UserKnownHostsFile ~/known\n", host={"name": "box", "host_key": f"ssh-ed25519 {KEY} me"}
    )
    (key,) = known_keys(found)
    assert (key.kind, key.where) == ("ssh-ed25519", "the configuration's host_key")
    assert fingerprint(key.key).startswith("SHA256:")
