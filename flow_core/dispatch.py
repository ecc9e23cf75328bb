"""Pool: the workers of one session, and which call goes to which of them when.

Whoever waits for a call reads the workers' connections meanwhile (the leader; the others follow), so a call costs no
change of threads. A thread of the pool's own, the keeper, does what nobody waits for: it starts the session, renews the
lease, replaces workers, and leads while nobody else does.

A call is sent as soon as a worker is free. Behind a short call more short ones are sent ahead, about `_AHEAD_US` of work;
should one of them turn out to be long, the worker gives back what it has not begun, and that goes elsewhere.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flow_core import encoding, gpus, payload
from flow_core.capture import cloudpickle_zip
from flow_core.errors import (
    CallCancelledError,
    CallTimeoutError,
    FlowError,
    ProviderUnavailable,
    ResourceNotFoundError,
    SessionClosedError,
    TaskOutOfMemoryError,
    WorkerDiedError,
)
from flow_core.futures import DONE, FAILED, QUEUED, SENT, Future, Stream, _callbacks_lock, call_back, ending
from flow_core.links import Connection, Door, Line, logged
from flow_core.models import SpecFile
from flow_core.runner import parcels, wire
from flow_core.runner.execute import WIRE_VERSION
from flow_core.runner.pickles import CLOUDPICKLE_ZIP
from flow_core.runner.strict_json import to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from flow_core.encoding import Encoded
    from flow_core.flow import Flow
    from flow_core.task import Task

log = logging.getLogger("flow_core")

_AHEAD_US = 2000.0
_AHEAD_CALLS = 512
_UNKNOWN_US = 1e12
_MAX_QUEUED = 10_000
_HELP_EVERY = 16
_SLICE_S = 0.1
_KEEPER_S = 0.004
_REPORT_S = 10.0
_CREDIT = 16


@dataclass(frozen=True)
class Retries:
    """How often a call is made again: after the loss of its worker, and after exceptions of its own.

    None unless asked, since a call may have had effects. Between attempts lie `delay_s` seconds, times `backoff` after
    each, at most `max_delay_s`.
    """

    lost: int = 0
    exceptions: int = 0
    on: tuple[type[BaseException], ...] = (Exception,)
    delay_s: float = 1.0
    backoff: float = 2.0
    max_delay_s: float = 60.0

    def delay(self, attempt: int) -> float:
        """Return the seconds before the attempt after number `attempt` (from 1)."""
        return min(self.max_delay_s, self.delay_s * self.backoff ** (attempt - 1))


@dataclass(frozen=True)
class CallOptions:
    """What one call asks for. `timeout_s` counts from the start of the user's code, for each attempt."""

    timeout_s: float | None = None
    retries: Retries = field(default_factory=Retries)


PLAIN = CallOptions()


class Definition:
    """A function as it travels: sent to each worker once, before the first call that needs it.

    `payload` is what `pickle.loads` makes the function of, there. `kind`: "function"; "make", which makes a service's
    object and keeps it on its worker; "method" `name` of the object that the definition `of` has made.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        payload: bytes,
        name: str,
        *,
        codec: str = "json",
        kind: str = "function",
        of: Definition | None = None,
        generator: bool = False,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.number = next(self._numbers)
        self.name = name
        self.codec = codec
        self.generator = generator
        self.estimate = _UNKNOWN_US
        head = {
            "kind": kind,
            "name": name,
            "codec": codec,
            "generator": generator,
            "of": of.number if of else 0,
            "sources": dict(sources or {}),
        }
        self.frame = wire.frame(wire.DEFINE, self.number, json.dumps(head).encode() + b"\n" + payload)

    def took(self, micros: int) -> None:
        """Learn from a call: quick to believe that it takes long, slow to believe that it does not."""
        self.estimate = (
            micros
            if micros > self.estimate or self.estimate == _UNKNOWN_US
            else (0.9 * self.estimate + 0.1 * micros)
        )


@dataclass(frozen=True)
class SessionSpec:
    """What a session asks for. `instance_type` is what each of the `workers` gets; they share one machine.

    `min_workers` of them (all, if None) are started at once, the others when calls queue up. With `ordered` there is one
    worker, calls run in the order submitted, and when it dies it is not replaced.
    """

    name: str = "session"
    workers: int = 2
    min_workers: int | None = None
    instance_type: str = "cpu"
    image: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Any, ...] = ()
    idle_limit_s: float | None = None
    lease_s: float = 30.0
    startup_timeout_s: float | None = None
    grace_s: float = 5.0
    paths: tuple[str, ...] = ()
    dependencies: tuple[str, ...] = ()  # lines of a requirements file, installed before the first worker starts
    package: Mapping[str, str] | None = None  # see flow_core.packages.Package.source
    task: Mapping[str, Any] = field(default_factory=dict)  # further fields of TaskConfig

    def orders(self) -> tuple[SpecFile, ...]:
        """Return the files of the session's task: what its supervisor is to do, and what it needs for that."""
        machine = gpus.parse(self.instance_type)
        call = {
            "v": WIRE_VERSION,
            "kind": "serve",
            "codec": "json",
            "python": list(sys.version_info[:2]),
            "gpus_each": machine.count,
            "lease_s": self.lease_s,
            "idle_limit_s": self.idle_limit_s,
            "grace_s": self.grace_s,
            "paths": list(self.paths),
            "dependencies": list(self.dependencies),
            "package": None if self.package is None else dict(self.package),
        }
        return (
            SpecFile(name="call.json", data=to_json(call, "session")),
            SpecFile(name=CLOUDPICKLE_ZIP, data=cloudpickle_zip()),
            *self.files,
        )

    def machine(self) -> dict[str, Any]:
        """Return the fields of the session's TaskConfig: one machine with what all workers need together."""
        each = gpus.parse(self.instance_type)
        kind = str(replace(each, count=each.count * max(1, self.workers)))
        return {
            "name": self.name,
            "instance_type": kind,
            "image": self.image,
            "env": dict(self.env),
            **self.task,
        }


class Pool:
    """Runs calls on the workers of one session. Thread-safe; not to be used after a fork.

    `open` starts the session's task; `attach` joins one that runs. Calls may be submitted at once, and start when the
    workers are there.
    """

    def __init__(
        self, flow: Flow, task: Task, spec: SessionSpec, *, first: int = 0, ordered: bool = False
    ) -> None:
        self.flow = flow
        self.task = task
        self.task_id = task.task_id
        self.spec = spec
        self.ordered = ordered
        self._first = first  # the index of its first worker
        self._door = Door(flow.engine, task.task_id)
        self._shares = self._door.sessions.shares_memory
        self.arena = parcels.Arena() if self._shares else None
        self._lock = threading.RLock()
        self._lead = threading.Lock()
        self._leader = 0
        self._leads = 0
        self._followers: deque[threading.Lock] = deque()
        self._queue: deque[Future] = deque()
        self._idle: list[Line] = []
        self._lines: dict[int, Line] = {}
        self._limbo: dict[int, Line] = {}
        self._by_fd: dict[int, Connection] = {}
        self._later: list[tuple[float, int, Future]] = []
        self._numbers = itertools.count(1)
        self._open = 0
        self._over: BaseException | None = None
        self._wanted = spec.workers if spec.min_workers is None else spec.min_workers
        self._starts = 0
        self._control: Connection | None = None
        self._replies: dict[int, _Reply] = {}
        self._said = itertools.count(1)
        self._poller = select.epoll()
        self._bell, self._ring = os.pipe()
        for fd in (self._bell, self._ring):
            os.set_blocking(fd, False)
        self._poller.register(self._bell, select.EPOLLIN)
        self._stir = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name=f"flow-{task.task_id}", daemon=True)
        self._pid = os.getpid()
        self._keeper.start()

    @classmethod
    def open(cls, flow: Flow, spec: SessionSpec, *, ordered: bool = False) -> Pool:
        """Start a session's task and return its pool. Raises what `Flow.run` raises, FlowError without sessions."""
        return cls(flow, flow.start_session(spec.orders(), **spec.machine()), spec, ordered=ordered)

    @classmethod
    def attach(cls, flow: Flow, task_id: str, spec: SessionSpec) -> Pool:
        """Return a pool on a session that runs already. Raises TaskNotFoundError."""
        return cls(flow, flow.get_task(task_id), spec)

    # -- submitting

    def submit(
        self,
        definition: Definition,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: CallOptions = PLAIN,
    ) -> Future:
        """Start a call as soon as a worker is free; return its future.

        The arguments are written down before this returns, so they may be changed afterwards. Futures among them stand
        for their values: the call waits for them on its own, and fails if one of them fails. With very many calls
        unstarted this waits for some to start. Raises SerializationError, SessionClosedError.
        """
        made = (Stream if definition.generator else Future)(self, definition, options)
        if args or kwargs:
            encoded = encoding.arguments(definition.codec, args, kwargs or {}, self.arena)
        else:
            encoded = encoding.NO_ARGUMENTS[definition.codec]
        made.body = encoded
        if encoded.inputs:
            self._wait_for_inputs(made, encoded)
            return made
        with self._lock:
            self._check_open()
            made.number = next(self._numbers)
            self._open += 1
            line = None if self._queue else self._free_line(definition)
            if line is not None:
                line.write(self._frames(line, made))
                return made
            self._queue.append(made)
            crowd = len(self._queue)
        self._help(crowd)
        return made

    def _check_open(self) -> None:
        if self._over is not None:
            raise self._closed()
        if os.getpid() != self._pid:
            raise SessionClosedError(
                "a session cannot be used in a process that was forked from the one that opened it",
                suggestions=["Open the session in that process, or start it with spawn or forkserver."],
            )

    def _closed(self) -> SessionClosedError:
        error = SessionClosedError(
            f"session {self.task_id} is closed: {self._over}", suggestions=["Open a new session."]
        )
        error.__cause__ = self._over if isinstance(self._over, Exception) else None
        return error

    def _free_line(self, definition: Definition) -> Line | None:
        """Return a line on which the call would start at once, or after next to nothing. Under the lock."""
        while self._idle:
            line = self._idle.pop()
            if not line.inflight and self._lines.get(line.index) is line:
                return line
        if definition.estimate < _AHEAD_US or self.ordered:
            for line in self._lines.values():
                if self._has_room(line, definition):
                    return line
        return None

    def _has_room(self, line: Line, definition: Definition) -> bool:
        if not line.inflight:
            return True
        if len(line.inflight) >= _AHEAD_CALLS:
            return False
        return self.ordered or line.load + definition.estimate <= _AHEAD_US

    def _frames(self, line: Line, future: Future) -> bytes:
        """Book a call on a line and return what is to be sent for it. Under the lock."""
        definition, encoded = future.definition, future.body
        data = b""
        if definition.number not in line.known:
            line.known.add(definition.number)
            data = definition.frame
        body, codec, kind = encoded.body, encoded.codec, wire.CALL
        for segment in encoded.segments:
            line.tell(segment)
        if encoded.inputs or future.kept or future.options.timeout_s is not None:
            kind = wire.CALL_WITH
            body = self._with_options(line, future, encoded)
        line.inflight[future.number] = future
        future.state, future.worker = SENT, line
        future.load = definition.estimate + 8.0
        line.load += future.load
        if definition.generator:
            data += wire.frame(wire.CREDIT, future.number, more=_CREDIT)
        return data + wire.frame(kind, future.number, body, codec, definition.number)

    def _with_options(self, line: Line, future: Future, encoded: Encoded) -> bytes:
        more: dict[str, Any] = {"timeout_s": future.options.timeout_s, "kept": future.kept}
        bodies = [encoded.body]
        if encoded.inputs:
            values = [one.parcel or encoding.again(one) for one in encoded.inputs]
            bodies += [line.forward(one) for one in values]
            more["codecs"] = [one.codec for one in values]
            more["sizes"] = [len(one) for one in bodies]
            more["paths"] = encoded.paths
        return json.dumps(more).encode() + b"\n" + b"".join(bodies)

    def _fill(self, line: Line) -> None:
        """Send a line what it has room for. Under the lock."""
        queue, pieces = self._queue, []
        while queue:
            future = queue[0]
            if future.state >= DONE:  # cancelled while it waited
                queue.popleft()
                continue
            if future.state == QUEUED and future.body.inputs and not _ready(future):
                break  # only where calls keep their order
            if not self._has_room(line, future.definition):
                break
            queue.popleft()
            pieces.append(self._frames(line, future))
        if pieces:
            line.write(b"".join(pieces))
            self._watch(line)
        elif not line.inflight and line not in self._idle:
            self._idle.append(line)

    def _watch(self, connection: Connection) -> None:
        """Have the poller tell when what waits can be sent."""
        wanted = select.EPOLLIN | (select.EPOLLOUT if connection.crowded else 0)
        try:
            self._poller.modify(connection.fd, wanted)
        except (OSError, ValueError):  # it is closed
            pass

    def _help(self, crowd: int) -> None:
        """Let a thread that submits many calls do some of the reading; hold it back when there are too many."""
        self._stir.set()
        if crowd % _HELP_EVERY == 0 and self._lead.acquire(blocking=False):
            self._leading(lambda: self._turn(0))
        while crowd >= _MAX_QUEUED and self._leader != threading.get_ident() and self._over is None:
            if self._lead.acquire(blocking=False):
                self._leading(lambda: self._turn(_SLICE_S))
            else:
                self._stir.wait(0.001)
            crowd = len(self._queue)

    # -- calls that wait for others

    def _wait_for_inputs(self, future: Future, encoded: Encoded) -> None:
        with self._lock:
            self._check_open()
            future.number = next(self._numbers)
            self._open += 1
            if self.ordered:
                self._queue.append(future)
        missing = [len(encoded.inputs)]
        counting = threading.Lock()

        def one_less(producer: Future) -> None:
            with counting:
                missing[0] -= 1
                last = missing[0] == 0
            if producer.error is not None:
                self._fail_dependent(future, producer)
            elif last:
                self._inputs_are_there(future)

        for producer in encoded.inputs:
            if not producer.runs_later(one_less):
                one_less(producer)

    def _inputs_are_there(self, future: Future) -> None:
        with self._lock:
            if future.state != QUEUED:
                return
            if not self.ordered:
                self._queue.append(future)
            for line in list(self._lines.values()):
                self._fill(line)
        self._stir.set()

    def _fail_dependent(self, future: Future, producer: Future) -> None:
        cause = producer.error
        assert cause is not None
        error = _copy_of(cause)
        error.__cause__ = cause
        if isinstance(error, FlowError):
            error.message = (
                f"{future.name!r} was not called: its input {producer.name!r} failed: {error.message}"
            )
        self._finish(future, error)

    # -- reading

    def drive(self, future: Future, deadline: float | None) -> None:
        """Block until the future has ended, or until the deadline is over."""
        self._drive(lambda: future.state >= DONE, future, deadline)

    def drive_item(self, future: Stream) -> None:
        """Block until another value of a generator has come, or its end; for a moment at most."""
        self._drive(lambda: future.state >= DONE or future.has_items(), future, time.monotonic() + _SLICE_S)

    def _drive(self, ready: Callable[[], bool], future: Future, deadline: float | None) -> None:
        while not ready():
            if deadline is not None and time.monotonic() >= deadline:
                return
            if self._leader == threading.get_ident():
                self._turn(_slice(deadline))  # a callback waits for another call
            elif self._lead.acquire(blocking=False):
                self._leading(lambda: self._lead_until(ready, deadline))
            else:
                self._follow(future, deadline)

    def _lead_until(self, ready: Callable[[], bool], deadline: float | None) -> None:
        while not ready() and (deadline is None or time.monotonic() < deadline):
            self._turn(_slice(deadline))

    def _leading(self, work: Callable[[], object]) -> None:
        """Do what only the leader may, and pass the lead on."""
        self._leads += 1
        self._leader = threading.get_ident()
        try:
            work()
        finally:
            self._leader = 0
            self._lead.release()
            self._wake_follower()

    def _wake_follower(self) -> None:
        try:
            waiter = self._followers.popleft()
        except IndexError:
            return
        try:
            waiter.release()
        except RuntimeError:  # it is awake already
            pass

    def _follow(self, future: Future, deadline: float | None) -> None:
        waiter = threading.Lock()
        waiter.acquire()
        with _callbacks_lock:
            if future.state >= DONE:
                return
            if future.waiters is None:
                future.waiters = []
            future.waiters.append(waiter)
        self._followers.append(waiter)
        if self._leader == self._keeper.ident:
            self._nudge()
        waiter.acquire(timeout=_slice(deadline))
        with _callbacks_lock:
            if future.waiters is not None and waiter in future.waiters:
                future.waiters.remove(waiter)
        try:
            self._followers.remove(waiter)
        except ValueError:
            pass

    def _nudge(self) -> None:
        try:
            os.write(self._ring, b".")
        except OSError:
            pass

    def _turn(self, timeout_s: float) -> None:
        """Wait for news, and work it in. Only the leader may."""
        for fd, events in self._poller.poll(timeout_s):
            connection = self._by_fd.get(fd)
            if connection is None:
                try:
                    os.read(self._bell, 4096)
                except OSError:
                    pass
                continue
            if events & select.EPOLLOUT:
                with self._lock:
                    connection.flush()
                    self._watch(connection)
            if events & ~select.EPOLLOUT:
                if isinstance(connection, Line):
                    self._read_line(connection)
                else:
                    self._read_control(connection)

    def _read_line(self, line: Line) -> None:
        frames = line.read()
        if frames is None:
            self._lose(line)
            return
        due: list[tuple[Any, Future]] = []
        with self._lock:
            inflight = line.inflight
            for kind, codec, more, number, body in frames:
                if kind == wire.RESULT:
                    future = inflight.pop(number, None)
                    if future is None:
                        continue
                    self._settle(line, future, more)
                    if codec & parcels.PARTS:
                        future.parcel = line.parcel(codec, body)
                    else:
                        future.parcel = parcels.Parcel(codec, body)
                    for function in ending(future, DONE):
                        due.append((function, future))
                else:
                    due += self._take_in(line, kind, codec, more, number, body)
            if line.returned:
                line.give_back()
            self._fill(line)
        call_back(due)

    def _settle(self, line: Line, future: Future, micros: int) -> None:
        """Take a call that has ended off the books. Under the lock."""
        future.definition.took(micros)
        line.load = line.load - future.load if line.inflight else 0.0
        future.worker = None
        future.body = None
        self._open -= 1

    def _take_in(self, line: Line, kind: int, codec: int, more: int, number: int, body: bytes) -> list[Any]:
        """Work in a frame that is not a plain result. Under the lock. Return the callbacks that are due."""
        if kind == wire.SEGMENT:
            line.mapped[number] = parcels.Mapped(number, line.descriptors.popleft())
        elif kind == wire.RETIRE:
            line.mapped.pop(number, None)
        elif kind == wire.RELEASE:
            self._released(line, number)
        elif kind == wire.LOGGED:
            future = line.inflight.get(number)
            if future is not None:
                begin, end = logged(body)
                future.log_range = (line.index, begin, end)
        elif kind == wire.ITEM:
            future = line.inflight.get(number)
            if isinstance(future, Stream):
                future.arrive(line.parcel(codec, body))
                return [(_wake_waiters, future)]
        elif kind == wire.RETURNED:
            future = line.inflight.pop(number, None)
            if future is not None:
                self._requeue(line, [future])
        elif kind == wire.ERROR:
            future = line.inflight.pop(number, None)
            if future is not None:
                return self._failed(line, future, more, json.loads(body))
        return []

    def _released(self, line: Line, number: int) -> None:
        if number >> 63:
            line.foreign.pop(number, None)
        elif self.arena is not None:
            line.lent.discard(number)
            self.arena.give_back(number)
            for retired in self.arena.retired:
                for one in self._lines.values():
                    if retired in one.told:
                        one.told.discard(retired)
                        one.write(wire.frame(wire.RETIRE, retired))
            self.arena.retired.clear()

    def _requeue(self, line: Line, futures: list[Future]) -> None:
        """Put calls that were sent and not begun back at the head of the queue, in order. Under the lock."""
        for future in sorted(futures, key=lambda one: one.number, reverse=True):
            line.load = line.load - future.load if line.inflight else 0.0
            future.state, future.worker = QUEUED, None
            for segment in future.body.segments:
                line.lent.discard(segment.number)
            self._queue.appendleft(future)
        for other in list(self._lines.values()):
            if other is not line:
                self._fill(other)

    def _failed(self, line: Line, future: Future, micros: int, message: dict[str, Any]) -> list[Any]:
        body = future.body
        self._settle(line, future, micros)
        error = self._error_of(future, message)
        retries = future.options.retries
        if (
            future.attempts < retries.exceptions
            and isinstance(error, retries.on)
            and not isinstance(error, (CallCancelledError,))
        ):
            future.body = body
            self._again(future, retries)
            return []
        future.error = error
        return [(function, future) for function in ending(future, FAILED)]

    def _again(self, future: Future, retries: Retries) -> None:
        """Make another attempt, after a while. Under the lock."""
        future.attempts += 1
        future.state, future.worker = QUEUED, None
        self._open += 1
        heapq.heappush(
            self._later, (time.monotonic() + retries.delay(future.attempts), future.number, future)
        )
        self._stir.set()

    def _error_of(self, future: Future, message: dict[str, Any]) -> FlowError:
        fields: Any = {"task_id": self.task_id, "log_tail": message.get("tail", "")}
        why = message.get("why")
        if why == "cancelled":
            return CallCancelledError(f"the call {future.name!r} was cancelled while it ran", **fields)
        if why == "timeout":
            return self._timed_out(future, fields)
        return payload.error_of(message["record"], **fields)

    def _timed_out(self, future: Future, fields: Any) -> CallTimeoutError:
        return CallTimeoutError(
            f"the call {future.name!r} was stopped at its limit of {future.options.timeout_s:g} s", **fields
        )

    # -- lost workers

    def _lose(self, line: Line) -> None:
        """A connection has ended: what was sent over it waits for the supervisor's word about the worker."""
        with self._lock:
            try:
                self._poller.unregister(line.fd)
            except (OSError, ValueError):
                pass
            self._by_fd.pop(line.fd, None)
            line.close()
            if self._lines.get(line.index) is line:
                del self._lines[line.index]
            self._limbo[line.stream] = line
            line.foreign.clear()
        self._stir.set()
        if line.report is not None or self._control is None:
            self._bury(line, line.report or {})

    def _bury(self, line: Line, report: Mapping[str, Any]) -> None:
        """Decide what becomes of the calls of a worker that is gone."""
        with self._lock:
            if self._limbo.pop(line.stream, None) is None:
                return
            lost, rest = None, []
            for future in line.inflight.values():
                begun = (
                    report.get("busy")
                    and report["stream"] == line.stream
                    and report["number"] == future.number
                )
                if begun or not report:
                    lost = lost or []
                    lost.append(future)
                else:
                    rest.append(future)
            line.inflight.clear()
            if self.ordered:
                lost, rest = [*(lost or []), *rest], []
            self._requeue(line, rest)
            for number in line.lent - {one.number for future in rest for one in future.body.segments}:
                if self.arena is not None:
                    self.arena.give_back(number)
        for future in lost or []:
            self._lost(future, report)
        if self.ordered:
            self._end(
                _death(f"the worker that held the state of {self.spec.name!r} died", report, self.task_id)
            )

    def _lost(self, future: Future, report: Mapping[str, Any]) -> None:
        """A worker died in the middle of this call."""
        retries = future.options.retries
        reason = report.get("reason")
        if reason == "cancelled" or future.cancelled:
            error: FlowError = CallCancelledError(
                f"the call {future.name!r} was cancelled while it ran; its worker had to be killed",
                task_id=self.task_id,
                log_tail=str(report.get("tail", "")),
            )
        elif reason == "timeout":
            error = self._timed_out(
                future, {"task_id": self.task_id, "log_tail": str(report.get("tail", ""))}
            )
        elif future.attempts < retries.lost:
            with self._lock:
                self._open -= 1
                self._again(future, retries)
            return
        else:
            error = _death(f"the worker died while it ran {future.name!r}", report, self.task_id)
        self._finish(future, error)

    def _finish(self, future: Future, error: BaseException) -> None:
        """End a call that is not on any line with an error, unless it has ended."""
        with self._lock:
            if future.state >= DONE:
                return
            self._open -= 1
            self._drop_segments(future)
            future.error, future.body, future.worker = error, None, None
            due = [(function, future) for function in ending(future, FAILED)]
        call_back(due)

    def _drop_segments(self, future: Future) -> None:
        if future.body is not None and self.arena is not None:
            for segment in future.body.segments:
                self.arena.give_back(segment.number)

    # -- control

    def _read_control(self, connection: Connection) -> None:
        frames = connection.read()
        if frames is None:
            with self._lock:
                self._control = None
                self._by_fd.pop(connection.fd, None)
                try:
                    self._poller.unregister(connection.fd)
                except (OSError, ValueError):
                    pass
                connection.close()
            self._stir.set()
            return
        for kind, _, _, number, body in frames:
            if kind == wire.BLOB:
                self._replies.pop(number, _Reply()).give(body)
            elif kind == wire.SAY:
                self._hear(json.loads(body))

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("event") == "gone":
            for stream in message["streams"]:
                line = self._limbo.get(stream)
                if line is not None:
                    self._bury(line, message)
                else:
                    for one in list(self._lines.values()):
                        if one.stream == stream:
                            one.report = message
        elif message.get("event") == "ending":
            self._ending = message["reason"]

    _ending = ""

    def say(self, message: dict[str, Any], *, number: int = 0, blob: bytes | None = None) -> None:
        """Tell the supervisor something, if it is there."""
        with self._lock:
            if self._control is None:
                return
            data = b"" if blob is None else wire.frame(wire.BLOB, number, blob)
            self._control.write(data + wire.frame(wire.SAY, number, json.dumps(message).encode()))
            self._watch(self._control)

    def _ask(self, message: dict[str, Any], timeout_s: float = 10.0) -> bytes:
        number = next(self._said)
        reply = self._replies[number] = _Reply()
        self.say(message, number=number)
        deadline = time.monotonic() + timeout_s
        while not reply.came and self._control is not None and time.monotonic() < deadline:
            if self._leader == threading.get_ident():
                self._turn(_SLICE_S)
            elif self._lead.acquire(blocking=False):
                self._leading(lambda: self._turn(_SLICE_S))
            else:
                self._stir.wait(0.002)
        self._replies.pop(number, None)
        return reply.data

    # -- what a future asks for

    def cancel(self, future: Future) -> bool:
        """See `Future.cancel`."""
        with self._lock:
            if future.state >= DONE:
                return False
            future.cancelled = True
            line = future.worker
        if line is not None:
            self.say({"do": "cancel", "worker": line.index, "stream": line.stream, "number": future.number})
        else:
            self._finish(
                future,
                CallCancelledError(
                    f"the call {future.name!r} was cancelled before it started", task_id=self.task_id
                ),
            )
        return True

    def keep(self, future: Future) -> str:
        """See `Future.id`."""
        name = f"{self._door.client}-{future.number}"
        with self._lock:
            known, future.kept = future.kept, True
            line = future.worker
            if not known and line is not None:
                line.write(wire.frame(wire.KEEP, future.number))
                self._watch(line)
        if not known and future.state >= DONE:
            self.say(
                {"do": "store", "name": name}, number=next(self._said), blob=encoding.outcome_file(future)
            )
        return f"{self.task_id}:{name}"

    def logs(self, future: Future) -> str:
        """See `Future.logs`."""
        where = future.log_range
        if where is None and future.worker is not None:
            return ""
        if where is None:
            return getattr(future.error, "log_tail", "")
        worker, begin, end = where
        return self._ask({"do": "log", "worker": worker, "range": [begin, end]}).decode("utf-8", "replace")

    def decode(self, future: Future, parcel: parcels.Parcel) -> Any:
        """Return the value of a parcel."""
        return encoding.value(parcel, future.definition.codec, self.task_id)

    def credit(self, future: Stream) -> None:
        """Let a generator go on: one of its values was taken."""
        with self._lock:
            line = future.worker
            if line is not None:
                line.write(wire.frame(wire.CREDIT, future.number, more=1))
                self._watch(line)

    # -- the keeper

    def _keep(self) -> None:
        try:
            self._connect()
            last, beat = -1, 0.0
            while self._over is None:
                now = time.monotonic()
                if now - beat > self.spec.lease_s / 4:
                    beat = now
                    self.say({"do": "ping"})
                self._mend(now)
                self._stir.wait(_KEEPER_S if self._open else min(1.0, self.spec.lease_s / 4))
                if not self._open:
                    self._stir.clear()
                if self._open and self._leads == last and self._lead.acquire(blocking=False):
                    self._leading(self._lead_alone)
                    self._leads -= 1  # the keeper does not count
                last = self._leads
        except BaseException as error:  # noqa: BLE001 - whoever waits for a call must hear of it
            self._end(error)

    def _lead_alone(self) -> None:
        until = time.monotonic() + 1.0
        while self._open and not self._followers and self._over is None and time.monotonic() < until:
            self._turn(_SLICE_S)
            if self._later or self._missing():
                return

    def _connect(self) -> None:
        """Wait for the session to listen, and connect. Raises the error that says why it does not."""
        engine = self.flow.engine
        interval = min(engine.provider.poll_interval_s, 0.5)
        limit = self.spec.startup_timeout_s
        deadline = None if limit is None else time.monotonic() + limit
        wait = 0.002
        while self._over is None:
            try:
                self._door.check()
                connection, _ = self._door.open("control")
                break
            except (ProviderUnavailable, ResourceNotFoundError):
                seen = engine.poll([self.task_id])[self.task_id]
                if seen.status.final:
                    raise engine.failure(seen) from None
                if deadline is not None and time.monotonic() > deadline:
                    self.flow.cancel([self.task_id])
                    raise CallTimeoutError(
                        f"session {self.task_id} did not start within {limit:g} s: it is {seen.status.value}"
                        + (f" ({seen.message})" if seen.message else ""),
                        task_id=self.task_id,
                    ) from None
            self._stir.wait(wait)
            self._stir.clear()
            wait = min(wait * 1.3, max(0.02, interval))
        else:
            return
        with self._lock:
            self._control = Connection(connection, shares_memory=False)
            self._by_fd[self._control.fd] = self._control
            self._poller.register(self._control.fd, select.EPOLLIN)

    def _missing(self) -> list[int]:
        """Return the indices of the workers that should be there and are not."""
        dead = {line.index for line in self._limbo.values()}
        return [
            index
            for index in range(self._first, self._first + self._wanted)
            if index not in self._lines and index not in dead
        ]

    def _mend(self, now: float) -> None:
        """Connect to workers that are wanted, make due attempts, notice the session's end."""
        if self._control is None:
            self._session_is_over()
            return
        for index in self._missing():
            self._open_line(index)
        with self._lock:
            if self._queue and self._wanted < self.spec.workers and not self._idle:
                self._wanted += 1
            again = False
            while self._later and self._later[0][0] <= now:
                _, _, future = heapq.heappop(self._later)
                if future.state == QUEUED:
                    self._queue.appendleft(future)
                    again = True
            for line in list(self._lines.values()):
                if line.returned:
                    line.give_back()
                if again or (self._queue and not line.inflight):
                    self._fill(line)

    def _open_line(self, index: int) -> None:
        self._starts += 1
        try:
            connection, welcome = self._door.open("worker", worker=index, dedicated=self.ordered)
        except ProviderUnavailable:
            if self._control is not None:
                raise
            return
        line = Line(index, connection, welcome, shares_memory=self._shares)
        with self._lock:
            self._lines[index] = line
            self._by_fd[line.fd] = line
            self._poller.register(line.fd, select.EPOLLIN)
            self._fill(line)

    def _session_is_over(self) -> None:
        """Find out why the session has ended, and end with it."""
        if self._ending in ("idle", "lease"):
            why = {"idle": "it was idle for too long", "lease": "its owner was silent for too long"}
            self._end(SessionClosedError(why[self._ending]))
            return
        if self._ending == "closed":
            self._end(SessionClosedError("it was closed by another of its clients"))
            return
        deadline = time.monotonic() + _REPORT_S
        while time.monotonic() < deadline:
            seen = self.flow.engine.poll([self.task_id])[self.task_id]
            if seen.status.final:
                self._end(self.flow.engine.failure(seen))
                return
            self._stir.wait(0.05)
            self._stir.clear()
        self._end(WorkerDiedError("the connection to the session was lost", task_id=self.task_id))

    # -- the end

    def close(self) -> None:
        """End the session: calls that have not ended are cancelled, and no process of it is left. Idempotent."""
        with self._lock:
            first = self._over is None
        if not first:
            return
        if self._control is not None:
            if self.ordered and self._first:
                self.say({"do": "dismiss", "worker": self._first})
            else:
                self.say({"do": "close"})
        else:
            self.flow.cancel([self.task_id])
        self._end(SessionClosedError("it was closed here"))
        if not (self.ordered and self._first):
            self._see_the_end()

    def _see_the_end(self) -> None:
        try:
            self.task.wait(timeout=5.0)
        except FlowError:
            self.flow.cancel([self.task_id])

    def leave(self) -> None:
        """Disconnect without ending the session: it goes on for its lease, or for as long as others use it."""
        self.say({"do": "leave"})
        self._end(SessionClosedError("it was left"))

    def _end(self, error: BaseException) -> None:
        with self._lock:
            if self._over is not None:
                return
            self._over = error
            left = [*self._queue, *(future for _, _, future in self._later)]
            for line in [*self._lines.values(), *self._limbo.values()]:
                left += line.inflight.values()
                line.inflight.clear()
            self._queue.clear()
            self._later.clear()
        for future in left:
            ours = isinstance(error, SessionClosedError)
            self._finish(future, self._cancelled_by_closing(future) if ours else _copy_of(error))
        self._stir.set()
        self._nudge()
        with self._lock:
            for connection in list(self._by_fd.values()):
                try:
                    self._poller.unregister(connection.fd)
                except (OSError, ValueError):
                    pass
                if connection.crowded:
                    connection.socket.setblocking(True)
                    connection.socket.settimeout(2.0)
                    connection.flush()
                connection.close()
            self._by_fd.clear()
            self._lines.clear()
            self._limbo.clear()
            self._control = None
            if self.arena is not None:
                self.arena.close()

    def _cancelled_by_closing(self, future: Future) -> CallCancelledError:
        return CallCancelledError(
            f"the call {future.name!r} did not end: session {self.task_id} is closed ({self._over})",
            task_id=self.task_id,
        )


class _Reply:
    """An answer of the supervisor's that somebody waits for."""

    def __init__(self) -> None:
        self.came = False
        self.data = b""

    def give(self, data: bytes) -> None:
        self.data = data
        self.came = True


def _ready(future: Future) -> bool:
    return all(one.state >= DONE for one in future.body.inputs)


def _slice(deadline: float | None) -> float:
    return _SLICE_S if deadline is None else max(0.0, min(_SLICE_S, deadline - time.monotonic()))


def _wake_waiters(future: Future) -> None:
    for waiter in future.waiters or ():
        try:
            waiter.release()
        except RuntimeError:
            pass


def _copy_of(error: BaseException) -> BaseException:
    """Return an error of one's own for each call: a traceback grows where the same one is raised twice."""
    import copy

    return copy.copy(error) if isinstance(error, FlowError) else error


def _death(what: str, report: Mapping[str, Any], task_id: str) -> FlowError:
    """Say how a worker died."""
    import signal as signals

    fields: Any = {
        "task_id": task_id,
        "log_tail": str(report.get("tail", "")),
        "reason": str(report.get("reason", "")),
    }
    number, code = report.get("signal"), report.get("code")
    if report.get("reason") == "out-of-memory":
        return TaskOutOfMemoryError(
            f"{what}: the kernel killed it because memory ran out",
            suggestions=["Use smaller batches, or an instance with more memory."],
            signal=number,
            **fields,
        )
    if number is not None:
        name = signals.Signals(number).name if number in list(signals.Signals) else str(number)
        how = f": killed by {name}"
    elif code is not None:
        how = f": it ended with exit code {code}"
    else:
        how = ": the connection to it was lost"
    return WorkerDiedError(
        what + how,
        suggestions=["Other calls are not affected. Ask for retries= if the call may be made again."],
        exit_code=code,
        signal=number,
        **fields,
    )
