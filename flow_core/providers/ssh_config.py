"""What is known about an SSH host before it is called: from our settings, `~/.ssh/config` and known_hosts.

Reads files and nothing else: no network, no keys but public ones.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import getpass
import hashlib
import hmac
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import SecretStr

from flow_core.config import HostSettings, SSHSettings
from flow_core.errors import ConfigError

_DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
_KNOWN_TO_ALL = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")


@dataclass(frozen=True)
class Target:
    """How to reach and recognize one host: every question answered."""

    name: str
    host: str
    port: int
    user: str
    identities: tuple[str, ...]
    certificates: tuple[str, ...]
    identities_only: bool
    agent: str | None
    known_hosts: tuple[str, ...]
    known_as: str
    host_key: str | None = None
    private_key: SecretStr | None = None
    proxy_command: str | None = None
    jumps: tuple[Target, ...] = ()

    def __str__(self) -> str:
        where = f"{self.user}@{self.host}" + ("" if self.port == 22 else f":{self.port}")
        return self.name if self.name in (self.host, where) else f"{self.name} ({where})"


def resolve(host: HostSettings, settings: SSHSettings, environ: Mapping[str, str] | None = None) -> Target:
    """Gather what our settings and OpenSSH's configuration say of a host. Raises ConfigError for an unreadable file."""
    return _Files(settings.config, settings, os.environ if environ is None else environ).target(host)


class _Files:
    def __init__(self, path: Path, settings: SSHSettings, environ: Mapping[str, str]) -> None:
        import paramiko

        self.settings = settings
        self.environ = environ
        self.parsed = paramiko.SSHConfig()
        for file in (path, Path("/etc/ssh/ssh_config")):
            try:
                # Of two values the first holds, so the user's file comes first.
                with file.open(encoding="utf-8") as text:
                    self.parsed.parse(text)
            except FileNotFoundError:
                continue
            except (OSError, UnicodeDecodeError, paramiko.ConfigParseError) as error:
                raise ConfigError(f"{file} cannot be read: {error}") from error

    def target(self, host: HostSettings, *, via: tuple[str, ...] = ()) -> Target:
        known = self.parsed.lookup(host.name)
        name = host.host or known["hostname"]
        port = host.port or int(known.get("port", 22))
        user = host.user or known.get("user") or getpass.getuser()
        alias = known.get("hostkeyalias")
        only = known.get("identitiesonly", "no") == "yes"
        target = Target(
            name=host.name,
            host=name,
            port=port,
            user=user,
            identities=_identities(host, known.get("identityfile", [])),
            certificates=tuple(_paths(known.get("certificatefile", "").split())),
            identities_only=only,
            agent=self._agent(known.get("identityagent")),
            known_hosts=self._known_hosts(known),
            known_as=alias or (name if port == 22 else f"[{name}]:{port}"),
            host_key=host.host_key,
            private_key=host.private_key,
        )
        command, jumps = known.get("proxycommand"), known.get("proxyjump")
        if jumps and jumps.lower() != "none":
            return replace(target, jumps=self._jumps(jumps, (*via, host.name)))
        return replace(target, proxy_command=command)

    def _jumps(self, text: str, via: tuple[str, ...]) -> tuple[Target, ...]:
        """The hosts on the way, the nearest first; only the nearest may itself be behind others."""
        targets: list[Target] = []
        for hop in text.split(","):
            user, _, rest = hop.strip().removeprefix("ssh://").rpartition("@")
            name, _, port = rest.partition(":")
            if name in via:
                raise ConfigError(f"ProxyJump leads in a circle: {' -> '.join((*via, name))}")
            one = self.target(
                HostSettings(name=name, user=user or None, port=int(port) if port.isdigit() else None),
                via=via,
            )
            targets += (*one.jumps, replace(one, jumps=())) if not targets else (replace(one, jumps=()),)
        return tuple(targets)

    def _agent(self, named: str | None) -> str | None:
        if named is None or named == "SSH_AUTH_SOCK":
            return self.environ.get("SSH_AUTH_SOCK") or None
        if named.lower() == "none":
            return None
        return self.environ.get(named[1:]) if named.startswith("$") else os.path.expanduser(named)

    def _known_hosts(self, known: Mapping[str, str]) -> tuple[str, ...]:
        own = known.get("userknownhostsfile", " ".join(_KNOWN_HOSTS)).split()
        everyones = known.get("globalknownhostsfile", " ".join(_KNOWN_TO_ALL)).split()
        return (*(str(path) for path in self.settings.known_hosts), *_paths([*own, *everyones]))


def _paths(named: Iterable[str]) -> Iterator[str]:
    for path in named:
        if path.lower() != "none":
            yield os.path.expanduser(path)


def _identities(host: HostSettings, configured: Sequence[str]) -> tuple[str, ...]:
    if host.identity_file is not None:
        return (str(host.identity_file),)
    return tuple(_paths(configured or (f"~/.ssh/{name}" for name in _DEFAULT_KEYS)))


# -- known_hosts


@dataclass(frozen=True)
class KnownKey:
    """A line of a known_hosts file that speaks of our host; `marker` is "", "@revoked" or "@cert-authority"."""

    kind: str
    key: bytes
    where: str
    marker: str = ""


def known_keys(target: Target) -> list[KnownKey]:
    """Return what the files say of a host, in order; the pinned key alone where there is one."""
    if target.host_key is not None:
        kind, text = target.host_key.split()[:2]
        return [KnownKey(kind, _decoded(text), "the configuration's host_key")]
    return [key for path in target.known_hosts for key in _lines(path, target.known_as)]


def _lines(path: str, name: str) -> Iterator[KnownKey]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for number, line in enumerate(lines, start=1):
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        if len(words) >= 3 and not line.lstrip().startswith("#") and _names(words[0], name):
            yield KnownKey(words[1], _decoded(words[2]), f"{path}:{number}", marker)


def _names(patterns: str, name: str) -> bool:
    """Whether a line's first field names a host; names may be hashed, and patterns may exclude some."""
    if patterns.startswith("|1|"):
        _, _, salt, digest = [*patterns.split("|"), "", ""][:4]
        hashed = hmac.new(_decoded(salt), name.encode(), hashlib.sha1).digest()
        return hmac.compare_digest(hashed, _decoded(digest))
    found = False
    for pattern in patterns.lower().split(","):
        positive = not pattern.startswith("!")
        # Brackets are part of a name with a port, and nothing to fnmatch.
        if fnmatch.fnmatchcase(name.lower(), pattern.lstrip("!").replace("[", "[[]")):
            if not positive:
                return False
            found = True
    return found


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError):
        return b""


def fingerprint(key: bytes) -> str:
    """Return a key's fingerprint as ssh-keygen prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")
