"""One connection per host and process, and an agent over it: the SSH side of `transport`.

A connection carries two kinds of channels: one for the agent, and short-lived ones for terminals. A host that does not
answer is called again in the background, less and less often; whoever asks for it meanwhile is told at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shlex
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import datetime, timezone

import paramiko

from flow_core.config import HostSettings, SSHSettings
from flow_core.errors import FlowError, ProviderUnavailable
from flow_core.providers import ssh_login
from flow_core.providers.agent_start import Start
from flow_core.providers.ssh_config import Target, resolve
from flow_core.providers.ssh_login import HostRefused, HostUnreachable, Login
from flow_core.providers.transport import AgentClient, NoAgent, Reconnecting

#: How often a host that does not answer is called: after so many seconds at first, doubled up to the second.
_AGAIN_S, _AGAIN_AT_MOST_S = 1.0, 20.0

#: How long somebody who asks for such a host waits for a call that is under way: enough for a refusal or a success.
_WAIT_S = 0.5

#: How long the exit code of a program that was to become an agent is waited for (seconds).
_EXIT_CODE_S = 2.0


@dataclass(frozen=True)
class Outage:
    """A host that cannot be asked: since when, and why."""

    since: datetime
    error: FlowError

    def __str__(self) -> str:
        return f"not reachable since {self.since:%Y-%m-%d %H:%M:%S} UTC: {self.error.message}"


class HostTransport(Reconnecting):
    """A host, reached by SSH. The connection is made when it is first needed, and anew when it has broken."""

    def __init__(self, host: HostSettings, settings: SSHSettings, *, per_node: bool) -> None:
        super().__init__(host.name, self._start_agent)
        self.host = host
        self.settings = settings
        self.outage: Outage | None = None
        self._per_node = per_node
        self._target: Target | None = None
        self._login: Login | None = None
        self._logging_in = threading.Lock()
        self._next_try = 0.0
        self._pause = _AGAIN_S
        self._trying: threading.Thread | None = None
        _everything.add(self)

    @property
    def target(self) -> Target:
        """What the configuration says of it. Raises ConfigError."""
        if self._target is None:
            self._target = resolve(self.host, self.settings)
        return self._target

    # -- the connection

    @property
    def client(self) -> AgentClient:
        """The agent. Raises ProviderUnavailable, at once when the host is known to be down."""
        client = self._client
        if client is not None and client.broken is None:
            return client
        self.target  # noqa: B018 - a mistake in the configuration is no outage
        if self.outage is None:
            self._try()
        else:
            self.try_again()
            if self._trying is not None:
                self._trying.join(_WAIT_S)
        if self._client is not None and self._client.broken is None:
            return self._client
        raise self._unavailable()

    def _unavailable(self) -> ProviderUnavailable:
        outage = self.outage
        if outage is None:  # it came and went between two lines
            return ProviderUnavailable(f"host {self.where} ended the connection; ask again")
        kind = HostRefused if isinstance(outage.error, HostRefused) else HostUnreachable
        return kind(f"host {self.where} is {outage}", suggestions=outage.error.suggestions)

    def _try(self) -> None:
        with self._connecting:
            if self._client is not None and self._client.broken is None:
                return
            begun = time.monotonic()
            if self.outage is not None and begun < self._next_try:
                return
            try:
                self._client = self._connect()
            except FlowError as error:
                self.outage = Outage(self.outage.since if self.outage else _now(), error)
                self._next_try = time.monotonic() + self._pause * random.uniform(0.7, 1.3)  # noqa: S311 - jitter
                self._pause = min(self._pause * 2, _AGAIN_AT_MOST_S)
            else:
                self.outage, self._pause = None, _AGAIN_S

    def try_again(self) -> None:
        """Call a host that does not answer, in the background, unless it was called just now."""
        if self._connecting.acquire(blocking=False):
            try:
                if time.monotonic() >= self._next_try and (
                    self._trying is None or not self._trying.is_alive()
                ):
                    self._trying = threading.Thread(
                        target=self._try, name=f"flow-call-{self.where}", daemon=True
                    )
                    self._trying.start()
            finally:
                self._connecting.release()

    def _start_agent(self) -> AgentClient:
        python = self.host.python or self.settings.python
        start = Start.of(python, self.host.home or self.settings.home, per_node=self._per_node)
        channel = self.session()
        try:
            channel.exec_command("exec " + shlex.join(start.argv))
            return AgentClient(channel, self.where, start, deadline_s=self.settings.connect_timeout_s)
        except NoAgent as failed:
            raise self._explained(failed, channel, python) from failed
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise HostUnreachable(f"{self.target} ended the connection: {error}") from error

    def session(self) -> paramiko.Channel:
        """Open a channel for one program. Raises ProviderUnavailable."""
        for _ in range(2):
            login = self._logged_in()
            try:
                return login.transport.open_session(timeout=self.settings.connect_timeout_s)
            except paramiko.ChannelException as error:
                raise ProviderUnavailable(
                    f"{self.target} opens no more channels on this connection: {error}",
                    suggestions=["Close some terminals, or raise MaxSessions in the host's sshd_config."],
                ) from error
            except (paramiko.SSHException, EOFError, OSError):
                self._drop(login)
        raise HostUnreachable(f"{self.target} ends connections as soon as they are made")

    def _logged_in(self) -> Login:
        with self._logging_in:
            if self._login is not None and self._login.transport.is_active():
                return self._login
            if self._login is not None:
                self._login.close()
            self._login = ssh_login.login(self.target, timeout_s=self.settings.connect_timeout_s)
            return self._login

    def _drop(self, login: Login) -> None:
        with self._logging_in:
            if self._login is login:
                self._login = None
        login.close()

    def _explained(self, failed: NoAgent, channel: paramiko.Channel, python: str) -> ProviderUnavailable:
        """Say why no agent came up, in words that help."""
        said = failed.said
        channel.settimeout(0.5)
        words = [failed.printed]
        with contextlib.suppress(OSError):
            words.append(channel.recv_stderr(4000).decode("utf-8", "replace").strip())
        channel.status_event.wait(_EXIT_CODE_S)  # it may come a moment after the last words
        code = channel.recv_exit_status() if channel.exit_status_ready() else None
        channel.close()
        printed = " | ".join(word for word in words if word)
        heard = f"; it printed: {printed}" if printed else ""
        if said.get("error") == "python":
            what = f"{python!r} on {self.target} is Python {said['version']}, and 3.8 or later is needed"
            return ProviderUnavailable(what, suggestions=[_PYTHON.format(name=self.where)])
        if said.get("error") == "home":
            what = f"the folder {said['home']!r} on {self.target} cannot be used: {said['reason']}"
            return ProviderUnavailable(
                what, suggestions=["Free some space there, or set home in ssh: to another one."]
            )
        if code == 127 or "not found" in printed:
            what = f"there is no {python!r} on {self.target}{heard}"
            return ProviderUnavailable(what, suggestions=[_PYTHON.format(name=self.where)])
        if said.get("error") == "silent":
            self._drop_current()
            return HostUnreachable(f"{self.target} took the login but did not answer{heard}")
        return ProviderUnavailable(
            f"nothing could be started on {self.target}{heard}{'' if code is None else f' (exit code {code})'}",
            suggestions=[f"Check that `ssh {self.where} {python} --version` prints a version."],
        )

    def _drop_current(self) -> None:
        if self._login is not None:
            self._drop(self._login)

    def close(self) -> None:
        """See Transport."""
        super().close()
        with self._logging_in:
            login, self._login = self._login, None
        if login is not None:
            login.close()

    def forget_after_fork(self) -> None:
        """In a forked process: the connection is the parent's, which goes on using it. Nothing may be sent on it."""
        login, client = self._login, self._client
        _inherited.extend((login, client))
        self._login, self._client, self.outage = None, None, None
        self._trying, self._next_try, self._pause = None, 0.0, _AGAIN_S
        self._connecting, self._logging_in = threading.Lock(), threading.Lock()
        for one in () if login is None else (login.transport, *login.under):
            if isinstance(one, paramiko.Transport):
                one.sock.close()


_PYTHON = "Name one: ssh.hosts[].python for {name}, for example /usr/bin/python3.11 or /opt/conda/bin/python."

_everything: weakref.WeakSet[HostTransport] = weakref.WeakSet()
_pool: dict[tuple[HostSettings, SSHSettings, bool], HostTransport] = {}
_pooling = threading.Lock()

#: What a forked process got from its parent. Were it collected, it would say goodbye on the parent's connection.
_inherited: list[object] = []


def host_transport(host: HostSettings, settings: SSHSettings, *, per_node: bool = True) -> HostTransport:
    """Return this process's transport to a host; with `per_node` each machine gets a folder of its own in `home`."""
    key = (host, settings.model_copy(update={"hosts": ()}), per_node)
    with _pooling:
        found = _pool.get(key)
        if found is None:
            found = _pool[key] = HostTransport(host, settings, per_node=per_node)
        return found


def _after_fork() -> None:
    global _pooling  # noqa: PLW0603 - a thread of the parent may have held it
    _pooling = threading.Lock()
    ssh_login.forget_after_fork()
    for one in list(_everything):
        one.forget_after_fork()


def close_connections() -> None:
    """End all connections of this process; whoever needs one makes it anew."""
    for one in list(_everything):
        with contextlib.suppress(Exception):
            one.close()


def _now() -> datetime:
    return datetime.now(timezone.utc)


os.register_at_fork(after_in_child=_after_fork)
atexit.register(close_connections)
