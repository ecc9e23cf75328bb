"""Sessions on the local provider: a home of the test's own, and nothing of it left when the test is over."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow
from flow_core.capture import Captured, yields
from flow_core.definitions import Definition, SessionSpec
from flow_core.dispatch import Pool
from flow_core.errors import ProviderUnavailable

HERE = Path(__file__).parent


def eventually(what: Callable[[], Any], *, within_s: float = 60.0) -> Any:
    """Return the first true answer of `what`; fail after `within_s`."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        answer = what()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"not true within {within_s} s: {what}")


def processes_of(home: Path) -> list[int]:
    """The processes of any task under this home."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                environ = Path("/proc", entry, "environ").read_bytes()
                state = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"FLOW_TASK_DIR={home}".encode() in environ and state != "Z":
                found.append(int(entry))
    return found


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "home"
    yield folder
    eventually(lambda: not processes_of(folder))


@pytest.fixture
def flow(home: Path) -> Flow:
    return Flow(local={"home": home, "kill_grace_s": 1})


class Opener:
    """Opens pools, and closes them with the test."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.pools: list[Pool] = []

    def __call__(self, workers: int = 2, *, ordered: bool = False, **fields: Any) -> Pool:
        pool = Pool.open(self.flow, SessionSpec(workers=workers, **fields), ordered=ordered)
        self.pools.append(pool)
        return pool


@pytest.fixture
def opened(flow: Flow) -> Iterator[Opener]:
    opener = Opener(flow)
    yield opener
    for pool in opener.pools:
        pool.close()


def sent(function: Callable[..., Any], codec: str = "pickle") -> Definition:
    """A function as it travels."""
    payload = Captured(function).fresh()
    name = function.__name__
    return Definition(payload.data, name, codec=codec, sources=payload.sources, generator=yields(function))


class Link:
    """Carries a session's streams, without its memory, until it is cut."""

    shares_memory = False

    def __init__(self, sessions: Any) -> None:
        self.sessions = sessions
        self.ends: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        self.is_cut = False
        self.carried = 0  # bytes, both ways

    def connect(self, task_id: str) -> socket.socket:
        if self.is_cut:
            raise ProviderUnavailable("the link is cut")
        there = self.sessions.connect(task_id)
        here, end = socket.socketpair()
        self.ends += [there, end]
        for source, target in ((there, end), (end, there)):
            self.threads.append(threading.Thread(target=self._carry, args=(source, target), daemon=True))
            self.threads[-1].start()
        return here

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.carried += len(data)
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.is_cut = True
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def link(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    link = Link(flow.provider.sessions)
    monkeypatch.setattr(type(flow.provider), "sessions", link)
    yield link
    link.cut()
    for thread in link.threads:
        thread.join()
    for end in link.ends:
        end.close()
