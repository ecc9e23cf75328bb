"""One task on several machines, each with a runner of its own; nobody else has to be alive.

The runner of the first machine leads: the others connect to it, and prove that they know the task's secret. GPUs are
taken on one machine after the other, in the order of the machines' ids, so that two such tasks never wait for each
other; then all start at once. A node that fails, a wish to stop and a connection that is lost end all others, and the
leader's exit record tells how the task ended. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import select
import socket
import time

from . import slots
from .main import Runner, Stopped
from .ranks import Rank, free_port, prepare, start_rank
from .spawn import Gate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional, Tuple

    Outcome = Tuple[str, Optional[int], Optional[int], str]
    Message = Dict[str, Any]

#: How long the machines may take to find each other (seconds); a submit that is repeated later is too late.
_ASSEMBLE_S = 120.0

_HANDSHAKE_S = 3.0
_TCP_USER_TIMEOUT = 18  # linux/tcp.h
_SUCCESS = ("exit", 0)


def ports(secret: str) -> list[int]:
    """Return where the leader may listen: known to all beforehand, and rarely taken by somebody else."""
    found = (hashlib.sha256(f"{secret}.{index}".encode()).digest() for index in range(8))
    return [
        20000 + int.from_bytes(one[:4], "big") % 12000 for one in found
    ]  # below what systems give out themselves


def _proof(secret: str, *words: object) -> str:
    return hmac.new(secret.encode(), " ".join(map(str, words)).encode(), hashlib.sha256).hexdigest()


class Lost(Exception):
    """The connection to another machine's runner has ended."""


class Link:
    """A connection between two runners that carries lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._held = b""
        self.lost = False
        self._watch_over()

    def _watch_over(self) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, 20000)
        except OSError:  # not Linux
            pass

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def tell(self, message: Message) -> None:
        """Send a message; one that cannot be sent is lost with the connection."""
        try:
            self._socket.settimeout(_HANDSHAKE_S)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.lost = True

    def hear(self) -> list[Message]:
        """Return what has come. Never blocks."""
        self._socket.settimeout(0)
        while not self.lost:
            try:
                piece = self._socket.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            self.lost = not piece
            self._held += piece
        *lines, self._held = self._held.split(b"\n")
        return [json.loads(line.decode()) for line in lines]

    def next(self) -> Message:
        """Return the next message of a handshake. Raises Lost, ValueError."""
        deadline = time.monotonic() + _HANDSHAKE_S
        while b"\n" not in self._held:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                piece = self._socket.recv(4096)
            except OSError:
                piece = b""
            if not piece or len(self._held) > 65536:
                raise Lost
            self._held += piece
        line, _, self._held = self._held.partition(b"\n")
        message = json.loads(line.decode())
        if not isinstance(message, dict):
            raise Lost
        return message

    def close(self) -> None:
        """End it."""
        self.lost = True
        self._socket.close()


class TeamRunner(Runner):
    """The runner of one machine's part of the task."""

    def __init__(self, folder: str, lock: int) -> None:
        super().__init__(folder, lock)
        self.team: dict[str, Any] = self.job["team"]
        self.index: int = self.team["index"]
        self.hosts: list[str] = self.team["hosts"]
        self.links: dict[int, Link] = {}
        self.trouble: Outcome | None = None
        self.told = False
        self.port: str | None = None
        self.our_turn = False
        self.ready: set[int] = set()
        self.done: set[int] = set()
        self.dismissed = False

    @property
    def leads(self) -> bool:
        """Whether the others connect to us."""
        return self.index == 0

    @property
    def nodes(self) -> int:
        """The number of nodes of the whole task."""
        return int(self.job["num_instances"])

    # -- hearing from the others

    def asked_to_stop(self) -> bool:
        """Whether somebody has asked for it, or another machine has ended."""
        if super().asked_to_stop():
            return True
        self.hear()
        return self.trouble is not None

    def hear(self) -> None:
        """Take in what the others have said."""
        for index, link in list(self.links.items()):
            for message in link.hear():
                self._take(index, message)
            if link.lost and index not in self.done and not self.dismissed and self.trouble is None:
                where = self.hosts[index]
                self.trouble = ("node-failed", None, None, f"the connection to host {where} was lost")

    def _take(self, index: int, message: Message) -> None:
        if message.get("ended"):
            reason, code, number, words = message["ended"]
            if (reason, code) == _SUCCESS:
                self.done.add(index)
            elif self.trouble is None:
                self.trouble = (reason, code, number, words)
        self.our_turn = self.our_turn or bool(message.get("turn"))
        if message.get("ready"):
            self.ready.add(index)
        if message.get("go"):
            self.port = message["go"]
        self.dismissed = self.dismissed or bool(message.get("dismissed"))

    def _sleep(self, seconds: float) -> None:
        watched: list[Any] = [self._bell, *(link for link in self.links.values() if not link.lost)]
        select.select(watched, [], [], seconds)
        try:
            os.read(self._bell, 512)
        except BlockingIOError:
            pass

    def tell_all(self, message: Message) -> None:
        """Tell the others: the leader each of them, everybody else the leader."""
        for link in self.links.values():
            link.tell(message)

    def _until(self, reached: Callable[[], bool]) -> None:
        """Wait until the others have brought something about. Raises Stopped."""
        while True:
            if self.signal or self.asked_to_stop():
                raise Stopped
            if reached():
                return
            self._sleep(2.0)

    # -- before the start

    def wait_for_start(self, _ticket: tuple[str, int] | None) -> list[str]:
        """Find the others, take our GPUs when it is our turn, and wait until all have theirs. Raises Stopped."""
        if self.leads:
            self._gather()
            granted = self._take_gpus()
            for index in sorted(self.links):
                self.links[index].tell({"turn": True})
                self._until(lambda index=index: index in self.ready)  # type: ignore[misc]
            self.port = self.job["env"].get("MASTER_PORT") or str(free_port())
            self.tell_all({"go": self.port})
        else:
            self._join()
            self._until(lambda: self.our_turn)
            granted = self._take_gpus()
            self.tell_all({"ready": True})
            self._until(lambda: self.port is not None)
        return granted

    def _take_gpus(self) -> list[str]:
        gpu = self.team["gpu"]
        if gpu is None:
            return super().wait_for_start(None)
        self.job["gpu"] = gpu
        ticket = slots.take_ticket(gpu["queue"], "{}.{}".format(self.job["task_id"], gpu["count"]))
        slots.keep(ticket[1])
        return super().wait_for_start(ticket)

    def _give_up(self, message: str) -> None:
        self.trouble = ("start-failed", None, None, message)
        raise Stopped

    def _gather(self) -> None:
        """Let the others connect."""
        door = self._open_door()
        deadline = time.monotonic() + _ASSEMBLE_S
        with door:
            while len(self.links) < len(self.hosts) - 1:
                if self.signal or self.asked_to_stop():
                    raise Stopped
                if time.monotonic() > deadline:
                    away = [
                        self.hosts[index] for index in range(1, len(self.hosts)) if index not in self.links
                    ]
                    self._give_up(
                        f"{', '.join(away)} did not connect to {self.hosts[0]} ({self.job['main_address']}) within "
                        f"{_ASSEMBLE_S:g} s: the submit was not finished, or the hosts cannot reach each other"
                    )
                if select.select([door.fileno(), self._bell], [], [], 1.0)[0]:
                    self._let_in(door)

    def _open_door(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.job["main_address"] else socket.AF_INET
        for port in ports(self.team["secret"]):
            door = socket.socket(family, socket.SOCK_STREAM)
            try:
                door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                door.bind(("", port))
                door.listen(64)
                door.settimeout(0)
                return door
            except OSError:
                door.close()
        self._give_up(
            f"none of the ports {ports(self.team['secret'])} of {self.hosts[0]} could be listened on"
        )
        raise AssertionError

    def _let_in(self, door: socket.socket) -> None:
        try:
            os.read(self._bell, 512)
        except BlockingIOError:
            pass
        try:
            link = Link(door.accept()[0])
        except OSError:
            return
        nonce = os.urandom(16).hex()
        link.tell({"flow": self.job["task_id"], "nonce": nonce})
        try:
            theirs = link.next()
            index = int(theirs["index"])
            known = hmac.compare_digest(
                str(theirs["proof"]), _proof(self.team["secret"], "member", index, nonce)
            )
        except (Lost, ValueError, KeyError, TypeError):
            known, index, theirs = False, 0, {}
        if not known or not 0 < index < len(self.hosts):
            link.close()
            return
        link.tell({"proof": _proof(self.team["secret"], "leader", theirs.get("nonce"))})
        self.links[index] = link

    def _join(self) -> None:
        """Connect to the leader, which listens at one of a few ports."""
        deadline = time.monotonic() + _ASSEMBLE_S
        address = self.job["main_address"]
        while not self.links:
            for port in ports(self.team["secret"]):
                link = self._knock(address, port)
                if link is not None:
                    self.links[0] = link
                    return
                if self.signal or self.asked_to_stop():
                    raise Stopped
            if time.monotonic() > deadline:
                self._give_up(
                    f"host {self.hosts[self.index]} cannot connect to {self.hosts[0]} at {address}, ports "
                    f"{ports(self.team['secret'])}: let the hosts reach each other, or set the host's address"
                )
            self._sleep(0.2)

    def _knock(self, address: str, port: int) -> Link | None:
        try:
            link = Link(socket.create_connection((address, port), timeout=_HANDSHAKE_S))
        except OSError:
            return None
        try:
            hello = link.next()
            nonce = os.urandom(16).hex()
            proof = _proof(self.team["secret"], "member", self.index, hello["nonce"])
            link.tell({"index": self.index, "proof": proof, "nonce": nonce})
            if hmac.compare_digest(str(link.next()["proof"]), _proof(self.team["secret"], "leader", nonce)):
                return link
        except (Lost, ValueError, KeyError):  # somebody else listens there
            pass
        link.close()
        return None

    # -- the run

    def start(self, granted: list[str], gate: Gate) -> list[Rank]:
        """Start this machine's nodes, up to the gate."""
        cwd = prepare(self.folder, self.job)
        count, first = self.team["nodes"], self.team["first"]
        share = len(granted) // count
        return [
            start_rank(
                self.folder,
                self.job,
                first + index,
                gate,
                gpus=granted[index * share : (index + 1) * share],
                port=str(self.port),
                cwd=cwd,
            )
            for index in range(count)
        ]

    def watch(self) -> Outcome:
        """Wait for the end of our nodes, and of the others'."""
        outcome = super().watch()
        self._tell_end(outcome)
        if outcome[:2] != _SUCCESS:
            return outcome
        try:
            self._until(lambda: len(self.done) == len(self.links) if self.leads else self.dismissed)
        except Stopped:
            return self._why_stopped()
        return outcome

    def _tell_end(self, outcome: Outcome) -> None:
        if not self.told:
            self.told = True
            reason, code, number, words = outcome
            self.tell_all({"ended": [reason, code, number, words]})

    def end(self, reason: str, code: int | None, number: int | None, message: str) -> dict[str, Any]:
        """Build the exit record; the others hear of it at the latest now."""
        if self.leads and (reason, code) == _SUCCESS:
            self.tell_all({"dismissed": True})
        elif self.leads or not self.told:
            self.told = False
            self._tell_end((reason, code, number, message))
        return super().end(reason, code, number, message)

    def _why_stopped(self) -> Outcome:
        if self.trouble is not None and not super().asked_to_stop():
            return self.trouble
        return super()._why_stopped()

    def _why_failed(self, rank: Rank) -> Outcome:
        reason, code, number, message = super()._why_failed(rank)
        return reason, code, number, f"host {self.hosts[self.index]}, {message}"
