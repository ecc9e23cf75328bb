"""The thread that keeps a pool going while nobody waits: it connects, renews the lease, and replaces workers.

It also holds the control connection: what a client and a session's supervisor have to say to each other.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
import json
import logging
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from flow_core import encoding, endings, losses, needs, payload, reception
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
from flow_core.futures import QUEUED, Future
from flow_core.ids import random_key
from flow_core.leader import SLICE_S
from flow_core.links import Connection, Door, Line
from flow_core.runner import wire
from flow_core.status import TaskStatus
from flow_core.staying import Stayed

if TYPE_CHECKING:
    from flow_core.dispatch import Pool
    from flow_core.errors import TaskExecutionError

log = logging.getLogger("flow_core")

_TICK_S = 0.004
_IDLE_TICKS = 50
_ASK_S = 10.0
_CLOSE_S = 5.0
_START_S = 60.0
_AGAIN_S = 1.0
_MOST_NAMES = 1000


class Keeper:
    """The keeper of one pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.door = Door(pool.flow.engine, pool.task_id, os.urandom(8).hex())
        self.control: Connection | None = None
        self._bell = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"flow-{pool.task_id}", daemon=True)
        self._heart = threading.Thread(target=self._beat, name=f"flow-lease-{pool.task_id}", daemon=True)
        self._pulse = min(1.0, pool.spec.lease_s / 4)
        self._ended = threading.Event()
        self._wanted = pool.spec.workers if pool.spec.min_workers is None else pool.spec.min_workers
        self._later: list[tuple[float, int, Future]] = []
        self._unstored: list[Future] = []
        self.unneeded: deque[str] = deque()  # names of values that stayed with the session (`staying`)
        self._needed: set[str] = set()  # those that others may know of
        self._dropped: list[tuple[Future, FlowError | None]] = []
        self._answers: dict[int, bytes] = {}
        self._early: dict[int, dict[str, Any]] = {}  # deaths of workers that we were connecting to, by stream
        self._numbers = itertools.count(1)
        self._ending = ""
        self._settled = threading.Event()  # connected, or ended without
        self._refused_since = 0.0
        self.patience_s = pool.spec.lease_s + _ASK_S  # for a session that was there, and runs
        self._patience_until: float | None = None
        self.asleep = False
        self.has_served = False  # whether any attempt of the session's task has let us in

    def start(self) -> None:
        """Begin."""
        self._thread.start()
        self._heart.start()

    def _beat(self) -> None:
        """Renew the lease: in a thread of its own, since the keeper's may be in a user's callback."""
        while not self._ended.wait(self._pulse):
            self.say({"do": "ping"})

    def connections(self) -> list[Connection]:
        """Give up the lease and the control connection; return it, if there was one."""
        self._ended.set()
        control, self.control = self.control, None
        return [] if control is None else [control]

    def stir(self) -> None:
        """Have it look around soon."""
        self._bell.set()

    def rest(self, seconds: float) -> None:
        """Wait a moment, less if something stirs."""
        self._bell.wait(seconds)

    # -- what is left for it to do

    def later(self, delay_s: float, future: Future) -> None:
        """Queue a call again after `delay_s`. Under the pool's lock."""
        heapq.heappush(self._later, (time.monotonic() + delay_s, future.number, future))
        self.stir()

    def delayed(self) -> list[Future]:
        """Return the calls that are to be queued again. Under the pool's lock."""
        return [future for _, _, future in self._later]

    def withdraw(self) -> None:
        """Queue none of them again. Under the pool's lock."""
        self._later.clear()

    def drop(self, future: Future, error: FlowError | None = None) -> None:
        """End a call that is on no line: with an error, or as one that came back cancelled. Under the pool's lock."""
        self._dropped.append((future, error))
        self.stir()

    def store(self, future: Future) -> None:
        """Have the outcome of a call written to the task's folder, soon: the worker was asked to, maybe too late."""
        if future.stays:
            self._needed.add(self.call_name(future))
        if not isinstance(future.parcel, Stayed):  # that is there already
            self._unstored.append(future)
        self.stir()

    def call_name(self, future: Future) -> str:
        """Return the name of the file that holds the outcome of a call."""
        return wire.call_name(self.door.client, future.number)

    # -- the control connection

    def say(self, message: dict[str, Any], *, number: int = 0, blob: bytes | None = None) -> None:
        """Tell the supervisor something, if it is there."""
        self.pool.check_process()
        with self.pool.lock:
            if self.control is not None:
                data = b"" if blob is None else wire.frame(wire.BLOB, number, blob)
                self.control.write(data + wire.frame(wire.SAY, number, json.dumps(message).encode()))
                if self.control.crowded:
                    self.pool.leader.expect(self.control.fd, room=True)

    def ask(self, message: dict[str, Any]) -> bytes:
        """Return the bytes that the supervisor answers with; nothing when it does not."""
        number = next(self._numbers)
        self.say(message, number=number)
        self.pool.leader.wait(
            lambda: number in self._answers or self.control is None, time.monotonic() + _ASK_S
        )
        return self._answers.pop(number, b"")

    def log(self, task_id: str, worker: int, begin: int, end: int) -> bytes:
        """Return a piece of a worker's output; from its task's folder when the supervisor is gone."""
        if begin == end:
            return b""
        said = b""
        if task_id == self.pool.task_id:
            said = self.ask({"do": "log", "worker": worker, "range": [begin, end]})
        if not said:
            with contextlib.suppress(FlowError):
                said = self.door.engine.collect(task_id, f"logs/{worker}")[begin:end]
        return said

    def _hear(self, control: Connection) -> None:
        if control.crowded:
            with self.pool.lock:
                if control.flush():
                    self.pool.leader.expect(control.fd, room=False)
        frames = control.read()
        if frames is None:
            with self.pool.lock:
                self.control = None
                self.pool.leader.forget(control.fd)
                control.close()
            self.stir()
            return
        for kind, _codec, _more, number, body in frames:
            if kind == wire.BLOB:
                self._answers[number] = body
            elif kind == wire.SAY:
                self._take_in(json.loads(body))

    def _take_in(self, message: dict[str, Any]) -> None:
        if message.get("event") == "ending":
            self._ending = message["reason"]
        if message.get("event") not in ("gone", "left"):
            return
        # Of a worker that hung up and lives nobody knows what it has done.
        report = message if message["event"] == "gone" else {}
        for stream in message["streams"]:
            with self.pool.lock:
                line = self.pool.limbo.get(stream)
                alive = None if line is not None else self._note_death(stream, report)
            if line is not None:
                losses.bury(self.pool, line, report)
            elif alive is not None and alive.shares_memory:
                reception.hear_out(self.pool, alive)
        self.stir()

    def _note_death(self, stream: int, report: dict[str, Any]) -> Line | None:
        """Keep the news of a worker's death until its connection ends, or is there at all. Under the pool's lock."""
        line = next((one for one in self.pool.lines.values() if one.stream == stream), None)
        if line is None:
            self._early[stream] = report
        else:
            line.report = report
        return line

    # -- the thread

    def _run(self) -> None:
        try:
            if self.pool.host is not None:
                self._follow(self.pool.host)
            while self.pool.over is None:
                try:
                    self._connect()
                    self._settled.set()
                    self._keep()
                except (WorkerDiedError, TaskOutOfMemoryError) as loss:
                    self._go_on(loss)
                except SessionClosedError as over:
                    self._go_on_after_idling(over)
        except BaseException as error:  # noqa: BLE001 - whoever waits for a call must hear of it
            self.pool.end(error)
        finally:
            self._settled.set()

    def _follow(self, host: Pool) -> None:
        """Wait until the host of a guest has connected: one asks the provider for all. Raises what has ended it."""
        while not host.keeper._settled.wait(SLICE_S) and self.pool.over is None:  # noqa: SLF001 - one of us
            pass
        if host.over is not None:
            raise copy.copy(host.over)

    def _keep(self) -> None:
        pool, leader = self.pool, self.pool.leader
        pulse = self._pulse
        last, beat, idle = -1, 0.0, 0
        while pool.over is None:
            now = time.monotonic()
            self._bell.clear()
            if now - beat >= pulse:
                beat = now
                self._tidy()
            self._mend(now)
            unread = leader.leads == last  # nobody has read since the last look: then it is for us to do
            idle = idle + 1 if unread and not self._is_busy() else 0
            if idle > _IDLE_TICKS:
                self.asleep = True
                if not pool.open_calls:
                    self._bell.wait(pulse)
                self.asleep = False
                leader.help()  # nobody reads where nobody calls, and the session may have ended
            elif unread and self._is_busy():
                leader.stand_in(self._is_wanted, pulse)
            last = leader.leads
            self._bell.wait(_TICK_S)

    def _is_wanted(self) -> bool:
        return self._bell.is_set() or not self._is_busy() or self.pool.over is not None

    def _is_busy(self) -> bool:
        """Whether there is something to read, or something large on its way to the supervisor."""
        control = self.control
        return bool(self.pool.open_calls) or (control is not None and control.crowded)

    def _connect(self) -> None:
        """Wait for the session to listen, and connect. Raises the error that says why it does not."""
        engine, spec = self.pool.flow.engine, self.pool.spec
        deadline = None if spec.startup_timeout_s is None else time.monotonic() + spec.startup_timeout_s
        wait_s = 0.002
        while self.pool.over is None:
            try:
                self.door.check()
                connection, _ = self.door.open("control")
            except (ProviderUnavailable, ResourceNotFoundError):
                self._see_why_not(deadline)
            else:
                self._take_control(Connection(connection, shares_memory=False))
                return
            self._bell.wait(wait_s)
            self._bell.clear()
            wait_s = min(wait_s * 1.3, max(0.02, min(engine.provider.poll_interval_s, 0.5)))

    def _take_control(self, control: Connection) -> None:
        with self.pool.lock:
            if self.pool.over is not None:  # it was closed while we connected
                control.close()
                return
            self.control = control
            self.has_served, self._patience_until = True, None
            self.pool.leader.register(control.fd, lambda: self._hear(control))

    def _see_why_not(self, deadline: float | None) -> None:
        """Raise the error that tells why the session does not listen, unless it may yet."""
        engine, task_id = self.pool.flow.engine, self.pool.task_id
        seen = engine.poll([task_id])[task_id]
        endings.raise_end(self.pool, seen)
        patience = self._patience_until
        if patience is not None and seen.status is TaskStatus.RUNNING and time.monotonic() > patience:
            raise endings.cut_off(self.pool)
        if deadline is not None and time.monotonic() > deadline:
            engine.cancel([task_id])
            detail = f" ({seen.message})" if seen.message else ""
            raise CallTimeoutError(
                f"session {task_id} did not start within {self.pool.spec.startup_timeout_s or 0:g} s: it is "
                f"{seen.status.value}{detail}",
                suggestions=["Allow for more with startup_timeout=, or look at what else is queued."],
                task_id=task_id,
            )

    def _go_on(self, loss: TaskExecutionError) -> None:
        """The session is lost: have it again where calls ask for that. Raises the loss where none does."""
        pool = self.pool
        if pool.key is None or not losses.outlive(pool, loss):
            raise loss
        log.warning("calls of session %s are made again: %s", pool.task_id, loss.message)
        self._begin_anew(loss)

    def _go_on_after_idling(self, over: SessionClosedError) -> None:
        """Have another session for calls that came when this one was just ending. Raises its end if none did."""
        pool = self.pool
        if over.error_code != "session-idle" or pool.key is None or pool.ordered:
            raise over
        for line in list(pool.lines.values()):
            reception.lose(pool, line)  # what its worker had not begun is queued again
        if pool.limbo or not pool.unended():  # of some nobody knows whether they were begun
            raise over
        pool.key, self._ending = random_key(), ""
        self._begin_anew(over)

    def _begin_anew(self, why: FlowError) -> None:
        """Start the session again, or find it where it goes on. Raises what stands in the way, or else `why`."""
        pool = self.pool
        self._early.clear()
        before, give_up = pool.task_id, time.monotonic() + _START_S
        while pool.over is None:
            try:
                pool.begin_anew()
                needs.follow(pool)
                break
            except FlowError as error:
                if not error.retryable:
                    raise
                if time.monotonic() > give_up:
                    raise why from error
            self._bell.wait(_AGAIN_S)
            self._bell.clear()
        self.door = Door(self.door.engine, pool.task_id, self.door.client)
        if pool.task_id == before:
            self._patience_until = time.monotonic() + self.patience_s

    def _mend(self, now: float) -> None:
        """Connect to workers that are wanted, make due attempts, notice the session's end."""
        pool = self.pool
        if self.control is None:
            self._find_out_the_end()
            return
        missing = self._missing()
        if pool.queue and not missing and self._wanted < pool.spec.workers:
            self._wanted += 1  # those who are there don't suffice; who is only on the way may
            missing = self._missing()
        for index in missing:
            self._open_line(index)
        self._settle_accounts()
        with pool.lock:
            while self._later and self._later[0][0] <= now:
                future = heapq.heappop(self._later)[2]
                if future.state == QUEUED:
                    pool.queue.appendleft(future)
            for line in list(pool.lines.values()):
                if line.returned:
                    line.give_back()
                if pool.queue and not line.inflight:
                    pool.fill(line)

    def _settle_accounts(self) -> None:
        """End calls that came back cancelled; write down outcomes that others may ask for, drop those nobody needs."""
        pool = self.pool
        while self._dropped:
            future, error = self._dropped.pop()
            text = f"the call {future.name!r} was cancelled before it started"
            pool.finish(future, error or CallCancelledError(text, task_id=pool.task_id))
        while self._unstored:
            future = self._unstored.pop()
            number = next(self._numbers)
            try:
                blob = encoding.outcome_file(future)
            except FlowError as error:  # it was changed here, and cannot travel any more
                blob = payload.encode_error(error)
            self.say({"do": "store", "name": self.call_name(future)}, number=number, blob=blob)
        if self.unneeded:
            names = [self.unneeded.popleft() for _ in range(min(len(self.unneeded), _MOST_NAMES))]
            self.say({"do": "drop", "names": [name for name in names if name not in self._needed]})

    def _tidy(self) -> None:
        with self.pool.lock:
            for line in list(self.pool.lines.values()):
                line.forget_definitions()
        for line in list(self.pool.limbo.values()):
            if time.monotonic() - line.ended_at > _ASK_S:  # nobody knows what became of its worker
                losses.bury(self.pool, line, {})

    def _missing(self) -> list[int]:
        """Return the indices of the workers that should be there and are not."""
        pool = self.pool
        unburied = {line.index for line in list(pool.limbo.values())}
        wanted = range(pool.first, pool.first + self._wanted)
        return [index for index in wanted if index not in pool.lines and index not in unburied]

    def _open_line(self, index: int) -> None:
        pool = self.pool
        try:
            connection, welcome = self.door.open(
                "worker", worker=index, dedicated=pool.ordered, any=pool.spread
            )
        except ProviderUnavailable:  # mostly the session is about to end, which is seen next
            now = time.monotonic()
            self._refused_since = self._refused_since or now
            if now - self._refused_since > _ASK_S:
                raise
            return
        self._refused_since = 0.0
        line = Line(index, connection, welcome, shares_memory=self.door.sessions.shares_memory)
        with pool.lock:
            if pool.over is not None:  # it was closed while we connected
                line.close()
                return
            line.report = self._early.pop(line.stream, None)
            pool.lines[index] = line
            pool.leader.register(line.fd, lambda: reception.hear(pool, line))
            pool.fill(line)

    # -- the end

    def _find_out_the_end(self) -> None:
        """Find out why the control connection has ended. Raises it."""
        pool = self.pool
        deadline = time.monotonic() + _ASK_S
        while not self._ending and time.monotonic() < deadline and pool.over is None:
            with contextlib.suppress(ProviderUnavailable):
                seen = pool.flow.engine.poll([pool.task_id])[pool.task_id]
                endings.raise_end(self.pool, seen)
                if seen.status is not TaskStatus.RUNNING:
                    raise endings.taken_away(pool, seen)
            self._bell.wait(SLICE_S / 2)
            self._bell.clear()
        if self._ending:
            raise endings.ended(self._ending)
        raise endings.cut_off(self.pool)

    def close_session(self) -> None:
        """End the session's task; a guest only ends its own workers."""
        pool = self.pool
        if pool.host is not None:
            for index in list(pool.lines):
                self.say({"do": "dismiss", "worker": index})
            pool.end(SessionClosedError("it was closed here"))
            return
        connected = self.control is not None
        if connected:
            self.say({"do": "close"})
        pool.end(SessionClosedError("it was closed here"))  # first, or the calls hear of a cancelled task
        if not connected:
            pool.flow.cancel([pool.task_id])
        try:
            pool.task.wait(timeout=_CLOSE_S)
        except FlowError:
            with contextlib.suppress(FlowError):
                pool.flow.cancel([pool.task_id])
