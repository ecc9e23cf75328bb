"""Logging in on an SSH host: a connection whose other end is the host we mean, and that has accepted one of our keys.

No trust is ever given automatically, no password asked for. Each refusal is an error with the line to type.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import paramiko

from flow_core.errors import AuthenticationError, ProviderUnavailable
from flow_core.providers.ssh_config import KnownKey, Target, fingerprint, known_keys

log = logging.getLogger("flow_core.ssh")

#: Paramiko reports with tracebacks what we report in words.
_paramiko_log = logging.getLogger("flow_core.ssh.paramiko")
_paramiko_log.setLevel(logging.CRITICAL)

#: sshd's MaxStartups refuses, at random, from 10 on (10:30:100), however many hosts share one jump host.
_CONNECTING = threading.BoundedSemaphore(6)

_TCP_USER_TIMEOUT = 18  # linux/tcp.h
_UNACKNOWLEDGED_MS = 6000


def forget_after_fork() -> None:
    """In a forked process: nobody here is connecting."""
    global _CONNECTING  # noqa: PLW0603 - its other owner stayed in the parent
    _CONNECTING = threading.BoundedSemaphore(6)


class HostUnreachable(ProviderUnavailable):
    """The host could not be connected with."""


class HostRefused(ProviderUnavailable, AuthenticationError):
    """The host is not the one we know, or does not let us in. Asking again does not help."""

    default_code = "authentication"
    default_retryable = False


@dataclass
class Login:
    """An open connection to a host; `under` are those it runs through, and programs to end with it."""

    transport: paramiko.Transport
    under: list[paramiko.Transport | subprocess.Popen[bytes]] = field(default_factory=list)

    def close(self) -> None:
        """End it and what it runs through."""
        for one in (self.transport, *reversed(self.under)):
            if isinstance(one, subprocess.Popen):
                one.kill()
                one.wait()
            else:
                one.close()


def login(target: Target, *, timeout_s: float) -> Login:
    """Connect, check the host's key, prove who we are. Raises HostUnreachable, HostRefused."""
    deadline = time.monotonic() + timeout_s
    under: list[paramiko.Transport | subprocess.Popen[bytes]] = []
    try:
        sock = None
        for hop in target.jumps:
            jump = _one(hop, sock, deadline, under)
            under.append(jump)
            following = (*target.jumps, target)[target.jumps.index(hop) + 1]
            sock = _through(jump, hop, following, deadline)
        return Login(_one(target, sock, deadline, under), under)
    except BaseException as error:
        for one in reversed(under):
            one.kill() if isinstance(one, subprocess.Popen) else one.close()
        if isinstance(error, (paramiko.SSHException, EOFError, OSError)):
            raise HostUnreachable(f"{target} ended the connection: {_words(error)}") from error
        raise


def _one(
    target: Target,
    sock: paramiko.Channel | None,
    deadline: float,
    under: list[paramiko.Transport | subprocess.Popen[bytes]],
) -> paramiko.Transport:
    """Log in on one host of the way; where the server drops us before its greeting, it has too many at once."""
    while True:
        with _slot(target, deadline):
            try:
                way = sock or _dial(target, deadline, under)
                transport = _greet(target, way, deadline)
            except _Dropped as dropped:
                # It may be a jump host's channel: that cannot be had twice.
                if sock is not None or time.monotonic() + 1.0 > deadline:
                    raise HostUnreachable(
                        f"{target} ended the connection before it began: {dropped}"
                    ) from dropped
            else:
                try:
                    _recognize(target, transport)
                    _prove(target, transport, deadline)
                except BaseException:
                    transport.close()
                    raise
                return transport
        time.sleep(random.uniform(0.05, 0.5))  # noqa: S311 - so that those who were refused together come apart


@contextlib.contextmanager
def _slot(target: Target, deadline: float) -> Iterator[None]:
    if not _CONNECTING.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise HostUnreachable(f"{target} could not be connected with: too many connections are being made")
    try:
        yield
    finally:
        _CONNECTING.release()


# -- the way


def _dial(
    target: Target, deadline: float, under: list[paramiko.Transport | subprocess.Popen[bytes]]
) -> socket.socket:
    if target.proxy_command is None:
        return _tcp(target, deadline)
    ours, theirs = socket.socketpair()
    with theirs:
        # The user's own ssh configuration says what to run, as it does for ssh.
        program = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {target.proxy_command}"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    under.append(program)
    return ours


def _tcp(target: Target, deadline: float) -> socket.socket:
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise HostUnreachable(
            f"{target} has no address: {error.strerror or error}",
            suggestions=[f"Check HostName in ~/.ssh/config, or whether `ssh {target.name}` finds it."],
        ) from error
    trouble: list[str] = []
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.1, (deadline - time.monotonic()) / (len(found) - len(trouble))))
            sock.connect(address)
        except OSError as error:
            sock.close()
            reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error))
            trouble.append(f"{address[0]} port {target.port}: {reason}")
        else:
            _watch(sock)
            return sock
    raise HostUnreachable(
        f"{target} cannot be reached: {'; '.join(dict.fromkeys(trouble))}",
        suggestions=[f"Check that it is up and that `ssh {target.name}` works from here."],
    )


def _watch(sock: socket.socket) -> None:
    """Have the kernel notice a dead link within seconds: what we send must be acknowledged."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    with contextlib.suppress(OSError):  # not Linux
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)


def _through(jump: paramiko.Transport, hop: Target, target: Target, deadline: float) -> paramiko.Channel:
    try:
        return jump.open_channel(
            "direct-tcpip",
            (target.host, target.port),
            ("127.0.0.1", 0),
            timeout=max(0.1, deadline - time.monotonic()),
        )
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise HostUnreachable(
            f"{target} cannot be reached from the jump host {hop}: {_words(error)}",
            suggestions=[f"Try `ssh {target.name}`; the jump host must allow TCP forwarding."],
        ) from error


class _Dropped(Exception):
    """The server has ended the connection before it said who it is."""


def _greet(target: Target, way: socket.socket | paramiko.Channel, deadline: float) -> paramiko.Transport:
    """Agree on ciphers and learn the host's key."""
    transport = paramiko.Transport(way)
    transport.set_log_channel(_paramiko_log.name)
    left = max(0.1, deadline - time.monotonic())
    transport.banner_timeout = transport.auth_timeout = transport.handshake_timeout = left
    transport.channel_timeout = left
    options = transport.get_security_options()
    known = [kind for key in known_keys(target) for kind in _algorithms(key.kind)]
    preferred = [kind for kind in dict.fromkeys(known) if kind in options.key_types]
    options.key_types = (*preferred, *(kind for kind in options.key_types if kind not in preferred))
    try:
        transport.start_client(timeout=left)
        transport.get_remote_server_key()  # which start_client has not waited for when its time was over
    except (paramiko.SSHException, EOFError, OSError) as error:
        transport.close()
        words = _words(error)
        if "banner" in words and time.monotonic() < deadline - 0.05:
            raise _Dropped(words) from error
        if "banner" in words or "No existing session" in words:
            words = "it takes connections but does not answer"
        raise HostUnreachable(f"{target} cannot be talked to: {words}") from error
    return transport


def _algorithms(kind: str) -> tuple[str, ...]:
    return ("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,)


def _words(error: BaseException) -> str:
    return str(error) or ("it ended the connection" if isinstance(error, EOFError) else type(error).__name__)


# -- who they are


def _recognize(target: Target, transport: paramiko.Transport) -> None:
    """Raise HostRefused unless the host's key is the one that is known."""
    shown = transport.get_remote_server_key()
    key, kind = shown.asbytes(), shown.get_name()
    known = known_keys(target)
    if any(one.marker == "@revoked" and one.key == key for one in known):
        raise HostRefused(f"{target} shows the key {fingerprint(key)}, which is marked as revoked")
    trusted = [one for one in known if not one.marker]
    if any(one.key == key for one in trusted):
        return
    if trusted:
        raise _changed(target, trusted, kind, key)
    raise _unknown(target, kind, shown.get_base64(), key)


def _unknown(target: Target, kind: str, text: str, key: bytes) -> HostRefused:
    file = target.known_hosts[0] if target.known_hosts else "~/.ssh/known_hosts"
    return HostRefused(
        f"{target} is not known: it shows the key {fingerprint(key)} ({kind}), and no known_hosts file names it as "
        f"{target.known_as}",
        suggestions=[
            f"Compare with what the host itself prints: ssh-keygen -lf /etc/ssh/ssh_host_{kind[4:]}_key.pub",
            f"If it is the same, type: echo {shlex.quote(f'{target.known_as} {kind} {text}')} >> {shlex.quote(file)}",
            f"Or pin it in the configuration of this host: host_key: {kind} {text}",
        ],
    )


def _changed(target: Target, trusted: list[KnownKey], kind: str, key: bytes) -> HostRefused:
    before = trusted[0]
    forget = f"ssh-keygen -R {shlex.quote(target.known_as)} -f {shlex.quote(before.where.rpartition(':')[0])}"
    return HostRefused(
        f"{target} shows another key than the known one: {fingerprint(key)} ({kind}), and {before.where} has "
        f"{fingerprint(before.key)} ({before.kind}). It was installed anew, or somebody stands between you and it",
        suggestions=[
            "Ask whoever runs the host whether its key has changed.",
            "If it has, correct host_key in the configuration."
            if target.host_key is not None
            else f"If it has, type: {forget}",
        ],
    )


# -- who we are


def _prove(target: Target, transport: paramiko.Transport, deadline: float) -> None:
    """Offer our keys one after the other. Raises HostRefused that says what became of each."""
    tried: list[str] = []
    with contextlib.closing(_Agent(target.agent)) as agent:
        _offer(target, transport, deadline, agent, tried)


def _offer(
    target: Target, transport: paramiko.Transport, deadline: float, agent: _Agent, tried: list[str]
) -> None:
    for label, key in _keys(target, agent, tried):
        transport.auth_timeout = max(0.1, deadline - time.monotonic())
        try:
            more = transport.auth_publickey(target.user, key)
        except paramiko.BadAuthenticationType as error:
            raise _refused(
                target, tried, f"it takes {' or '.join(error.allowed_types)}, and no key"
            ) from error
        except paramiko.AuthenticationException as error:
            if "timeout" in str(error).lower():  # it is not the key that was wrong
                raise HostUnreachable(f"{target} did not answer the login in time") from error
            tried.append(f"{label}: {_said(error)}")
        except (paramiko.SSHException, EOFError, OSError) as error:
            if not transport.is_active() and tried:
                raise _refused(target, [*tried, f"{label}: {_words(error)}"], "it then hung up") from error
            raise HostUnreachable(f"{target} did not go on with the login: {_words(error)}") from error
        else:
            if not more:
                return
            raise _refused(target, tried, f"besides the key {label} it asks for {' and '.join(more)}")
        if not transport.is_active():
            raise _refused(target, tried, "it then hung up (MaxAuthTries)")
    raise _refused(target, tried, "no key was accepted")


def _said(error: paramiko.AuthenticationException) -> str:
    return "refused" if str(error) == "Authentication failed." else _words(error)


def _refused(target: Target, tried: list[str], why: str) -> HostRefused:
    listed = "; ".join(tried) or "there is none to offer"
    return HostRefused(
        f"{target} does not let {target.user!r} in: {why}. Keys: {listed}",
        suggestions=[
            f"See whether `ssh {target.name}` works without a password.",
            "Name the key and the user: identity_file and user here, or IdentityFile, IdentitiesOnly and User in "
            "~/.ssh/config.",
            f"Put your public key there: ssh-copy-id {target.name}",
        ],
    )


def _keys(target: Target, agent: _Agent, tried: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    """Yield the keys to offer, the agent's first as ssh does; what cannot be used is noted in `tried`."""
    if target.private_key is not None:
        text = target.private_key.get_secret_value()
        given = _parsed("private_key", lambda kind: kind.from_private_key(io.StringIO(text)), tried)
        if given is not None:
            yield "private_key", given
        return
    from_agent = list[paramiko.PKey](agent.get_keys())
    files = [path for path in target.identities if os.path.exists(path)]
    mine = {_public(path): path for path in target.identities}
    offered: set[bytes] = set()
    for key in sorted(from_agent, key=lambda key: key.asbytes() not in mine):
        blob = key.asbytes()
        if not target.identities_only or blob in mine:
            offered.add(blob)
            yield f"{fingerprint(blob)} of the agent", key
    for path in files:
        own = _load(path, tried)
        if own is None:
            continue
        for certificate in (*target.certificates, f"{path}-cert.pub"):
            certified = _certified(path, certificate, tried)
            if certified is not None:
                yield certificate, certified
        if own.asbytes() not in offered:
            yield path, own
    tried += [f"{path}: does not exist" for path in target.identities if path not in files and not files]


class _Agent(paramiko.agent.AgentSSH):
    """An agent at a given socket, without keys where there is none; paramiko's own looks at the environment alone."""

    def __init__(self, path: str | None) -> None:
        super().__init__()
        if path is None:
            return
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(10)
            connection.connect(os.path.expanduser(path))
            self._connect(connection)  # type: ignore[attr-defined]  # the way in that subclasses have
        except (OSError, paramiko.SSHException):
            connection.close()

    def close(self) -> None:
        """Let go of it."""
        self._close()  # type: ignore[attr-defined]  # the way out that subclasses have


def _public(path: str) -> bytes:
    """Return the public half of a key from the file beside it."""
    from base64 import b64decode

    try:
        with open(path if path.endswith(".pub") else path + ".pub", encoding="utf-8") as file:
            return b64decode(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return b""


def _load(path: str, tried: list[str]) -> paramiko.PKey | None:
    hint = f" (type: ssh-add {shlex.quote(path)})"
    return _parsed(path, lambda kind: kind.from_private_key_file(path), tried, hint)


def _parsed(
    label: str, read: Callable[[type[paramiko.PKey]], paramiko.PKey], tried: list[str], hint: str = ""
) -> paramiko.PKey | None:
    """Return the key that `read` reads as one of the kinds there are; note in `tried` why it is none."""
    trouble = "is no private key that is known here"
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            return read(kind)
        except paramiko.PasswordRequiredException:
            trouble = f"has a passphrase{hint}"
            break
        except OSError as error:
            trouble = error.strerror or str(error)
            break
        except (paramiko.SSHException, ValueError):
            continue
    tried.append(f"{label}: {trouble}")
    return None


def _certified(path: str, certificate: str, tried: list[str]) -> paramiko.PKey | None:
    if not os.path.exists(certificate):
        return None
    key = _load(path, tried)
    if key is None:
        return None
    try:
        key.load_certificate(certificate)
    except (paramiko.SSHException, ValueError, OSError):
        return None  # it belongs to another key
    return key
