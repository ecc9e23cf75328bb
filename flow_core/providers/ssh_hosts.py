"""The hosts of the ssh provider: each with its connection, what it has, what goes on there; and all of them at once."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flow_core.config import HostSettings, SSHSettings
from flow_core.errors import FlowError, ProviderUnavailable
from flow_core.models import TaskSpec
from flow_core.providers.local_machine import Devices
from flow_core.providers.ssh_connection import HostTransport, host_transport
from flow_core.providers.ssh_login import HostUnreachable

log = logging.getLogger("flow_core.ssh")

T = TypeVar("T")

#: Once one host has answered, the others have so long to do the same; a host that is called for the first time has the
#: time for a connection on top (seconds).
_STRAGGLER_S = 3.0

#: How old a count of what goes on at a host may be; our own doings are added to it.
_SURVEY_S = 1.0

_NVIDIA_SMI_S = 30.0


class Host:
    """One host."""

    def __init__(self, host: HostSettings, settings: SSHSettings) -> None:
        self.name = host.name
        self.settings = host
        self.transport: HostTransport = host_transport(host, settings)
        self._hello: Mapping[str, Any] | None = None
        self._devices: Devices | None = None
        self._load: dict[str, int] = {}
        self._load_at = float("-inf")
        self._lock = threading.Lock()
        self.unanswered: set[float] = set()
        self._told_down = False

    def __repr__(self) -> str:
        return f"<Host {self.name}>"

    @property
    def hello(self) -> Mapping[str, Any]:
        """What the machine said of itself when it was last connected. Raises ProviderUnavailable if it never was."""
        if self._hello is None or self.transport.connected:
            self._hello = self.transport.client.hello
        return self._hello

    @property
    def id(self) -> str:
        """The machine's own name for its home, whatever it is called here. Raises ProviderUnavailable."""
        return str(self.hello["identity"])

    @property
    def home(self) -> str:
        """The folder of this machine's tasks. Raises ProviderUnavailable."""
        return str(self.hello["home"])

    @property
    def address(self) -> str:
        """Where other hosts reach it."""
        return self.settings.address or self.hello["facts"]["address"] or self.transport.target.host

    def call(self, verb: str, *, data: bytes = b"", deadline_s: float = 15.0, **args: Any) -> Any:
        """Do a verb in this host's home; return its value."""
        return self.transport.call(verb, {"home": self.home, **args}, data=data, deadline_s=deadline_s).value

    @property
    def devices(self) -> Devices:
        """Its GPUs, found or declared. Raises ProviderUnavailable."""
        if self._devices is None:
            facts = self.call("gpus", declared=self.settings.gpus, deadline_s=_NVIDIA_SMI_S)
            self._devices = Devices.from_facts(facts)
        return self._devices

    @property
    def known_devices(self) -> Devices | None:
        """Its GPUs as far as is known without asking."""
        return self._devices

    # -- what goes on there

    def look(self, digests: list[str]) -> Mapping[str, Mapping[str, Any]]:
        """Return what a submitter must know of each key (`notes.look`), and have a fresh count of what goes on."""
        with self._lock:
            fresh = time.monotonic() - self._load_at < _SURVEY_S
        devices = None if fresh else list(self.devices.names)
        answer = self.call("look", digests=digests, devices=devices)
        if not fresh:
            with self._lock:
                self._load, self._load_at = dict(answer["survey"]), time.monotonic()
        keys: Mapping[str, Mapping[str, Any]] = answer["keys"]
        return keys

    def place(self, spec: TaskSpec, nodes: int) -> None:
        """Count in what is about to be started there."""
        with self._lock:
            self._load["tasks"] = self._load.get("tasks", 0) + 1
            self._load["waiting"] = self._load.get("waiting", 0) + nodes * spec.gpu_count

    def load(self, gpus: int) -> float:
        """Return how full it would be with so many GPUs more: 1.0 where all are in use; for none, tasks per core."""
        with self._lock:
            if not gpus:
                return self._load.get("tasks", 0) / max(1, self._load.get("cpus", 1))
            wanted = self._load.get("busy", 0) + self._load.get("waiting", 0) + gpus
        return wanted / max(1, len(self.devices.names))

    # -- being down

    def tell_outage(self, error: FlowError | None) -> None:
        """Say once that it is down, and once that it is back."""
        if error is not None and not self._told_down:
            log.warning("%s; it is passed over", error.message)
        elif error is None and self._told_down:
            log.warning("host %s is back", self.name)
        self._told_down = error is not None


class _Crew:
    """Threads that wait for the next question: to start one takes longer than to ask. They end with the process."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = 0
        self._lock = threading.Lock()

    def do(self, work: Callable[[], None]) -> None:
        """Have somebody do this, at once."""
        with self._lock:
            if self._idle > 0:
                self._idle -= 1
            else:
                threading.Thread(target=self._serve, name="flow-ask", daemon=True).start()
        self._work.put(work)

    def _serve(self) -> None:
        while True:
            self._work.get()()
            with self._lock:
                self._idle += 1


_crew = _Crew()


def in_background(work: Callable[[], None]) -> None:
    """Do something in a thread that nobody waits for; it may be cut off by the end of the process."""
    _crew.do(work)


def _after_fork() -> None:
    global _crew  # noqa: PLW0603 - its threads stayed in the parent
    _crew = _Crew()


os.register_at_fork(after_in_child=_after_fork)


def together(
    hosts: Iterable[Host], ask: Callable[[Host], T], *, patience_s: float
) -> tuple[dict[Host, T], dict[Host, FlowError]]:
    """Ask all hosts at once: (answers, why there is none).

    A host that does not answer holds the others up for a few seconds at most; until it has, it is not asked again.
    """
    asked = list(hosts)
    answers: dict[Host, T] = {}
    failures: dict[Host, FlowError] = {}
    table = threading.Condition()

    def work(host: Host) -> None:
        try:
            value = ask(host)
        except ProviderUnavailable as error:
            with table:
                failures[host] = error
                table.notify()
        else:
            with table:
                answers[host] = value
                table.notify()

    if len(asked) == 1:
        work(asked[0])
    else:
        _in_threads(asked, work, failures)
        _wait(asked, answers, failures, table, patience_s)
    with table:
        answers, failures = dict(answers), dict(failures)
    for host in asked:
        if host not in answers and host not in failures:
            failures[host] = HostUnreachable(f"host {host.name} has not answered yet")
        host.tell_outage(failures.get(host))
    return answers, failures


def _in_threads(asked: Sequence[Host], work: Callable[[Host], None], failures: dict[Host, FlowError]) -> None:
    def timed(host: Host, begun: float) -> None:
        try:
            work(host)
        finally:
            host.unanswered.discard(begun)

    for host in asked:
        now = time.monotonic()
        if min(host.unanswered, default=now) < now - _STRAGGLER_S:
            failures[host] = HostUnreachable(f"host {host.name} has not answered for {_STRAGGLER_S:g} s")
            continue
        host.unanswered.add(now)
        _crew.do(lambda host=host, now=now: timed(host, now))  # type: ignore[misc]


def _wait(
    asked: Sequence[Host],
    answers: Mapping[Host, Any],
    failures: Mapping[Host, Any],
    table: threading.Condition,
    patience_s: float,
) -> None:
    begun = time.monotonic()
    first_contact = any(host.transport.outage is None and not host.transport.connected for host in asked)
    most = begun + patience_s + (0.0 if not first_contact else asked[0].transport.settings.connect_timeout_s)
    with table:
        while len(answers) + len(failures) < len(asked):
            limit = begun + _STRAGGLER_S if answers and not first_contact else most
            left = limit - time.monotonic()
            if left <= 0:
                return
            table.wait(left)
