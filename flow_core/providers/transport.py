"""How a provider reaches a machine: in this process, or through an agent at the other end of a connection.

Whatever the way, the verbs are those of `flow_core.runner.agent`, and what a machine refuses arrives as an error of
ours. Every call has a deadline. Nothing here knows what a task is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flow_core.errors import FlowError, ProviderError, ProviderUnavailable
from flow_core.providers import folder as folders
from flow_core.providers.agent_start import Start, package
from flow_core.runner import agent, frames, slurm_tools
from flow_core.runner.agent import Answer
from flow_core.runner.machine import Refused

#: How long an ordinary question may take (seconds).
DEADLINE_S = 15.0


@dataclass(frozen=True)
class Completed:
    """How a program ended."""

    code: int
    stdout: bytes
    stderr: bytes


class Transport(Protocol):
    """One machine within reach. Thread-safe; nothing is held that a new one would not find again."""

    #: The machine's name in messages.
    where: str

    def call(
        self,
        verb: str,
        args: Mapping[str, Any] | None = None,
        *,
        data: bytes = b"",
        deadline_s: float = DEADLINE_S,
    ) -> Answer:
        """Do a verb of `flow_core.runner.agent` there: its JSON value, and bytes.

        Verbs other than `run` are repeated once when the connection breaks under them: all of them may be done twice.
        Raises ProviderUnavailable (no connection, no answer in time: nothing is known), and what the verb's refusal
        means: ResourceNotFoundError, TaskNotFoundError, ValidationError, BlobsMissing, ProviderError.
        """

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Completed:
        """Run a program there to its end; any exit code is an answer. No shell sees `argv`, `env` comes on top.

        Raises ResourceNotFoundError (there is no such program), ProviderUnavailable: it did not end in time and was
        killed, or the connection broke, and then nothing is known of what it did.
        """

    def open_stream(self, to: str | Sequence[str], *, deadline_s: float = DEADLINE_S) -> socket.socket:
        """Connect to a Unix socket of that machine by its path, or to the input and output of a program.

        The program is started, with the environment of Slurm's tools. Raises ProviderUnavailable.
        """

    def close(self) -> None:
        """Let go of the connection, if there is one."""


class BlobsMissing(ProviderError):
    """A file was to be made of a blob that the machine does not have (any more): send it, then ask again."""


class Broken(ProviderUnavailable):
    """The connection ended before the answer came."""


#: Refusals that are the same wherever the task is.
_ABOUT_THE_TASK = ("invalid", "rejected", "task-not-found")


def _error(where: str, told: Mapping[str, Any]) -> FlowError:
    kind, message, advice = str(told["kind"]), str(told["message"]), tuple(told.get("suggestions", ()))
    if kind == "missing":
        return BlobsMissing(f"{where}: {message}")
    if kind == "broken":
        return ProviderError(f"{where}: {message}", suggestions=advice)
    if kind not in _ABOUT_THE_TASK:
        message = f"{where}: {message}"
    return folders.flow_error(Refused(kind, message, advice))


class _Running:
    """The half of a transport that is the same for all: programs."""

    where: str

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Completed:
        """See Transport."""
        args = {"argv": [*argv], "deadline_s": deadline_s, "env": dict(env or {}), "cwd": cwd}
        # The machine ends it in time and says so; a little later we stop waiting for that word.
        answer = self.call("run", args, data=stdin, deadline_s=deadline_s + 5.0)
        size = answer.value["out"]
        return Completed(answer.value["code"], answer.data[:size], answer.data[size:])

    def call(self, verb: str, args: Mapping[str, Any], *, data: bytes, deadline_s: float) -> Answer:
        raise NotImplementedError


class LocalTransport(_Running):
    """This machine, in this process."""

    def __init__(self) -> None:
        self.where = "this machine"

    def call(
        self,
        verb: str,
        args: Mapping[str, Any] | None = None,
        *,
        data: bytes = b"",
        deadline_s: float = DEADLINE_S,  # noqa: ARG002 - nothing here can be interrupted
    ) -> Answer:
        """See Transport."""
        try:
            return agent.perform(verb, dict(args or {}), data)
        except Refused as refused:
            told = {"kind": refused.kind, "message": refused.message, "suggestions": refused.suggestions}
            raise _error(self.where, told) from refused

    def open_stream(  # it is here: nothing has to be waited for
        self,
        to: str | Sequence[str],
        *,
        deadline_s: float = DEADLINE_S,  # noqa: ARG002
    ) -> socket.socket:
        """See Transport."""
        try:
            if isinstance(to, str):
                return frames.connect_unix(to)
            return frames.connect_program(list(to), slurm_tools.environment())
        except OSError as error:
            what = to if isinstance(to, str) else to[0]
            raise ProviderUnavailable(f"nobody listens at {what!r}: {error.strerror}") from error

    def close(self) -> None:
        """See Transport."""


# -- an agent at the other end of a connection


class Link(Protocol):
    """What a socket and an SSH channel have in common."""

    def settimeout(self, timeout: float | None, /) -> None:
        """Let `send` and `recv` raise TimeoutError after so many seconds."""

    def send(self, data: Any, /) -> int:
        """Send some of the bytes; return how many."""

    def recv(self, size: int, /) -> bytes:
        """Return what has come, b"" at the end."""

    def close(self) -> None:
        """End the connection."""


#: The agent is asked for a sign of life when nothing has come for so long, and given so long for it (seconds).
_PING_AFTER_S = 2.0
_SILENCE_S = 6.0
_TICK_S = 0.5


class NoAgent(ProviderUnavailable):
    """The agent did not come up; `said` is what came in its place, and what the machine's own words were."""

    def __init__(self, said: Mapping[str, Any], printed: str) -> None:
        super().__init__(f"no agent: {dict(said)} {printed}")
        self.said = said
        self.printed = printed


class _Pending:
    def __init__(self, number: int) -> None:
        self.number = number
        self.done = threading.Event()
        self.answer: Answer | None = None
        self.error: FlowError | None = None
        self.then: Callable[[Answer | None], None] | None = None

    def finish(self) -> None:
        """Wake whoever waits for it."""
        self.done.set()
        if self.then is not None:
            self.then(self.answer)


class AgentClient:
    """One agent, asked from many threads at once. It is not used again after its connection has ended."""

    def __init__(self, link: Link, where: str, start: Start, *, deadline_s: float) -> None:
        """Wait for the agent to come up. Raises NoAgent, Broken."""
        self.where = where
        self.broken: str | None = None
        self._link = link
        self._sending = threading.Lock()
        self._table = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._streams: dict[int, frames.Stream] = {}
        self._numbers = itertools.count(1)
        self._heard_at = time.monotonic()
        self._ping: tuple[int, float] | None = None
        link.settimeout(_TICK_S)
        self.hello, rest = self._shake_hands(start, time.monotonic() + deadline_s)
        self._parser = frames.Parser()
        self._reader = threading.Thread(target=self._read, args=(rest,), name=f"flow-{where}", daemon=True)
        self._reader.start()

    def _shake_hands(self, start: Start, deadline: float) -> tuple[dict[str, Any], bytes]:
        """Read up to the agent's first words, past what a login shell may print; send it its files if it asks."""
        mark, seen = f"\n{start.mark} ".encode(), b""
        while True:
            before, found, after = seen.partition(mark)
            line, complete, rest = after.partition(b"\n")
            if found and complete:
                said = json.loads(line)
                if said.get("have"):
                    return said, rest
                if said.get("error"):
                    raise NoAgent(said, _text(before))
                self._send_bytes(package(), deadline)
                seen = rest
                continue
            try:
                piece = self._link.recv(65536)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise NoAgent({"error": "silent"}, _text(seen)) from None
                continue
            except (OSError, EOFError) as error:
                raise NoAgent({"error": "ended", "reason": str(error)}, _text(seen)) from error
            if not piece:
                raise NoAgent({"error": "ended"}, _text(seen))
            seen += piece

    # -- asking

    def call(self, verb: str, args: Mapping[str, Any], *, data: bytes = b"", deadline_s: float) -> Answer:
        """Do a verb there; see `Transport.call`. Raises Broken when the connection has ended."""
        return self._ask(self._register(), {"verb": verb, "args": args}, data, deadline_s)

    def ask(self, verb: str, args: Mapping[str, Any], then: Callable[[Answer | None], None]) -> None:
        """Ask, and call `then` with the answer, None where there is none: in another thread, so it must be quick.

        Raises Broken when the connection has ended.
        """
        pending = self._register()
        pending.then = then
        self._send({"id": pending.number, "verb": verb, "args": args}, b"", time.monotonic() + DEADLINE_S)

    def _register(self) -> _Pending:
        with self._table:
            if self.broken is not None:
                raise self._broken()
            pending = _Pending(next(self._numbers))
            self._pending[pending.number] = pending
        return pending

    def _ask(self, pending: _Pending, asked: Mapping[str, Any], data: bytes, deadline_s: float) -> Answer:
        try:
            self._send({"id": pending.number, **asked}, data, time.monotonic() + deadline_s)
            if not pending.done.wait(deadline_s):
                raise ProviderUnavailable(
                    f"{self.where} did not answer within {deadline_s:g} s ({asked['verb']})",
                    suggestions=["Ask again: the machine may be very busy, or the connection slow."],
                )
        finally:
            with self._table:
                self._pending.pop(pending.number, None)
        if pending.error is not None:
            raise pending.error
        assert pending.answer is not None
        return pending.answer

    def open_stream(self, to: str | Sequence[str], *, deadline_s: float) -> socket.socket:
        """Connect to a Unix socket or a program there; see `Transport.open_stream`."""
        ours, theirs = socket.socketpair()
        pending = self._register()
        # It is on the table before anything can arrive for it.
        stream = frames.Stream(pending.number, ours, self._send_for_stream, self._forget_stream)
        with self._table:
            self._streams[pending.number] = stream
        try:
            self._ask(
                pending,
                {"verb": "stream", "args": {"path": to} if isinstance(to, str) else {"argv": list(to)}},
                b"",
                deadline_s,
            )
        except BaseException:
            self._forget_stream(pending.number)
            for end in (ours, theirs):
                end.close()
            raise
        stream.start()
        return theirs

    def _forget_stream(self, number: int) -> None:
        with self._table:
            self._streams.pop(number, None)

    def _send_for_stream(self, head: dict[str, Any], data: bytes = b"") -> None:
        self._send(
            head, data, time.monotonic() + 3600.0
        )  # a connection that stands still is noticed elsewhere

    def _send(self, head: dict[str, Any], data: bytes, deadline: float) -> None:
        message = frames.pack(head, data)
        if not self._sending.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise ProviderUnavailable(f"{self.where} takes nothing more at the moment")
        try:
            self._send_bytes(message, deadline)
        finally:
            self._sending.release()

    def _send_bytes(self, message: bytes, deadline: float) -> None:
        left = memoryview(message)
        while left:
            if self.broken is not None:
                raise self._broken()
            try:
                left = left[self._link.send(left[: 1 << 18]) :]
            except TimeoutError:
                if time.monotonic() > deadline:  # half a message is there: nothing else can follow it
                    self._end("it took nothing more")
            except (OSError, EOFError) as error:
                self._end(str(error) or "it was closed")

    def _broken(self) -> Broken:
        return Broken(f"the connection to {self.where} ended: {self.broken}")

    # -- listening

    def _read(self, rest: bytes) -> None:
        data = rest
        try:
            while self.broken is None:
                if data:
                    self._heard_at, self._ping = time.monotonic(), None
                    for head, content in self._parser.feed(data):
                        self._take(head, content)
                try:
                    data = self._link.recv(1 << 18)
                    if not data:
                        self._end("it was closed from the other side")
                except TimeoutError:
                    data = b""
                    self._look_for_life()
        except (OSError, EOFError, frames.Garbled, Broken) as error:
            self._end(str(error) or type(error).__name__)

    def _take(self, head: dict[str, Any], data: bytes) -> None:
        if "stream" in head:
            with self._table:
                stream = self._streams.get(head["stream"])
            if stream is not None:
                stream.take(head, data)
            return
        with self._table:
            pending = self._pending.pop(head["id"], None)
        if pending is None:
            return  # nobody waits any more
        if "error" in head:
            pending.error = _error(self.where, head["error"])
        else:
            pending.answer = Answer(head["value"], data)
        pending.finish()

    def _look_for_life(self) -> None:
        """Ask for a sign of life: a frozen machine still acknowledges packets, a cut link says nothing at all."""
        now = time.monotonic()
        if self._ping is None and now - self._heard_at > _PING_AFTER_S:
            self._ping = (0, now)
            if self._sending.acquire(
                timeout=0
            ):  # otherwise somebody is sending, and the answer to that will do
                try:
                    self._send_bytes(frames.pack({"id": 0, "verb": "ping", "args": {}}), now + _SILENCE_S)
                finally:
                    self._sending.release()
        elif self._ping is not None and now - self._ping[1] > _SILENCE_S:
            self._end(f"nothing was heard for {now - self._heard_at:.0f} s")

    def _end(self, why: str) -> None:
        with self._table:
            if self.broken is None:
                self.broken = why
            waiting, streams = list(self._pending.values()), list(self._streams.values())
            self._pending.clear()
        for pending in waiting:
            pending.error = self._broken()
            pending.finish()
        for stream in streams:
            stream.cut()
        with contextlib.suppress(
            OSError, EOFError
        ):  # a channel says goodbye, and there may be nobody to hear it
            self._link.close()

    def close(self) -> None:
        """End the connection, and with it the agent."""
        self._end("it was closed here")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip()[-2000:]


class Reconnecting(_Running):
    """A transport over an agent that is started when it is needed, and anew after its connection has broken."""

    def __init__(self, where: str, connect: Callable[[], AgentClient]) -> None:
        self.where = where
        self._connect = connect
        self._client: AgentClient | None = None
        self._connecting = threading.Lock()

    @property
    def client(self) -> AgentClient:
        """The agent, started if there is none. Raises ProviderUnavailable."""
        client = self._client
        if client is not None and client.broken is None:
            return client
        with self._connecting:
            if self._client is None or self._client.broken is not None:
                self._client = self._connect()
            return self._client

    @property
    def connected(self) -> bool:
        """Whether there is a connection now, as far as is known."""
        return self._client is not None and self._client.broken is None

    def call(
        self,
        verb: str,
        args: Mapping[str, Any] | None = None,
        *,
        data: bytes = b"",
        deadline_s: float = DEADLINE_S,
    ) -> Answer:
        """See Transport."""
        try:
            return self.client.call(verb, args or {}, data=data, deadline_s=deadline_s)
        except Broken:
            if verb == "run":
                raise
            return self.client.call(verb, args or {}, data=data, deadline_s=deadline_s)

    def open_stream(self, to: str | Sequence[str], *, deadline_s: float = DEADLINE_S) -> socket.socket:
        """See Transport."""
        return self.client.open_stream(to, deadline_s=deadline_s)

    def close(self) -> None:
        """See Transport."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
