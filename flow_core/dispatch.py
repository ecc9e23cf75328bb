"""Pool: the workers of one session, and which call goes to which of them when.

A call is sent as soon as a worker is free. Behind a short call more short ones are sent ahead, about `_AHEAD_US` of
work; should one of them turn out long, its worker gives back what it has not begun, and that goes elsewhere. Whoever
waits for a call reads the connections meanwhile (`flow_core.leader`); the pool's keeper (`flow_core.keeper`) does what
nobody waits for.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flow_core import booking, encoding, losses, needs, staying
from flow_core.definitions import PLAIN, CallOptions, Definition, Retries, SessionSpec
from flow_core.errors import (
    CallCancelledError,
    SerializationError,
    SessionClosedError,
    TaskOutOfMemoryError,
    WorkerDiedError,
)
from flow_core.futures import DONE, FAILED, QUEUED, Future, call_back, ending, follow
from flow_core.ids import random_key
from flow_core.keeper import Keeper
from flow_core.leader import SLICE_S, Leader
from flow_core.links import Line
from flow_core.reception import Due
from flow_core.runner import parcels, wire
from flow_core.staying import Stayed
from flow_core.streamed import Stream

if TYPE_CHECKING:
    from flow_core.flow import Flow
    from flow_core.object_ref import ObjectRef
    from flow_core.task import Task

__all__ = ["CallOptions", "Definition", "Pool", "Retries", "SessionSpec"]

_AHEAD_US = 2000.0
_AHEAD_CALLS = 512
_WAKE_US = 50.0  # what is shorter had better wait behind other calls than have another worker wake up for it
_MAX_QUEUED = 10_000
_HELP_EVERY = 16

#: Another object in every process that was forked: what belongs to the parent is then noticed without a system call.
_generation = object()


def _forked() -> None:
    global _generation  # noqa: PLW0603 - there is one process as well
    _generation = object()


os.register_at_fork(after_in_child=_forked)


class Pool:
    """Runs calls on the workers of one session. Thread-safe; not to be used in a forked child.

    `open` starts the session's task; `attach` joins one that runs. Calls may be submitted at once, and start when the
    workers are there. With `ordered` there is one worker, calls run in the order submitted, and when it dies so does
    the pool: its state is gone. A guest is in the session of the pool `host`, with workers of its own, counted from
    `first`; whoever waits for a call of either reads for both.
    """

    def __init__(
        self,
        flow: Flow,
        task: Task,
        spec: SessionSpec,
        *,
        ordered: bool = False,
        host: Pool | None = None,
        first: int = 0,
        key: str | None = None,
        spread: bool = False,
    ) -> None:
        self.flow = flow
        self.task = task
        self.task_id = task.task_id
        self.spec = spec
        self.ordered = ordered
        self.host = host
        self.first = first
        self.key = key
        self.spread = spread
        self.leader: Leader = Leader() if host is None else host.leader
        self.keeper = Keeper(self)
        self.arena = parcels.Arena() if self.keeper.door.sessions.shares_memory else None
        self.lock = threading.RLock()
        self.lines: dict[int, Line] = {}
        self.limbo: dict[int, Line] = {}  # connections that have ended, whose worker's fate is not known yet
        self.queue: deque[Future] = deque()
        self.waiting: set[Future] = set()  # for their inputs
        self.open_calls = 0
        self.over: BaseException | None = None
        self._idle: list[Line] = []
        self._numbers = itertools.count(1)
        self._generation = _generation
        self.keeper.start()

    @classmethod
    def open(cls, flow: Flow, spec: SessionSpec, *, ordered: bool = False) -> Pool:
        """Start a session's task and return its pool. Raises what `Flow.run` raises, FlowError without sessions."""
        key = random_key()
        return cls(flow, _started(flow, spec, key), spec, ordered=ordered, key=key)

    @classmethod
    def attach(cls, flow: Flow, task_id: str, spec: SessionSpec, *, spread: bool = False) -> Pool:
        """Return a pool on a session that runs already. Raises TaskNotFoundError.

        With `spread` it takes the workers that the fewest clients use, one to begin with.
        """
        if spread:
            spec = replace(spec, min_workers=1)
        return cls(flow, flow.get_task(task_id), spec, spread=spread)

    def begin_anew(self) -> None:
        """Have the session that was lost again: in another attempt of its task, or the same where it goes on.

        Raises what `Flow.run` raises, and the pool is as before then.
        """
        assert self.key is not None
        task = _started(self.flow, self.spec, self.key)
        with self.lock:
            if self.over is None:
                self.task, self.task_id = task, task.task_id
                return
        self.flow.cancel([task.task_id])  # it was closed while we asked

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
        made.stays = options.stays and self.arena is None
        lent_from = None if options.repeats else self.arena
        made.body = encoding.arguments(definition.codec, args, kwargs, lent_from)
        return self.enter(made)

    def enter(self, made: Future) -> Future:
        """Send a call whose arguments are written down, or queue it."""
        self.check_process()
        failure = needs.complete(self, made)
        inputs = made.body.inputs
        with self.lock:
            if self.over is not None:
                raise self._refusal()
            made.number = self.next_number()
            self.open_calls += 1
            if failure is not None:
                self._give_up(made, failure)
                return made
            if not inputs and not self.queue:
                line = self._free_line(made)
                if line is not None:
                    line.write(booking.frames(line, made))
                    if line.crowded:
                        self.leader.expect(line.fd, room=True)
                    if self.keeper.asleep:
                        self.keeper.stir()
                    return made
            if not inputs or self.ordered:
                self.queue.append(made)
            if inputs and not self.ordered:
                self.waiting.add(made)
            crowd = len(self.queue)
        if inputs:
            needs.wait_for(self, made, inputs)
        self._help(crowd)
        return made

    def next_number(self) -> int:
        """Return a number that no call of this pool has."""
        return next(self._numbers)

    def check_process(self) -> None:
        """Raise SessionClosedError in a fork: its parent's locks may be held there, and the connections are shared."""
        if self._generation is not _generation:
            raise SessionClosedError(
                "a session cannot be used in a process that was forked from the one that opened it",
                suggestions=["Open the session in that process, or start it with spawn or forkserver."],
            )

    def _refusal(self) -> SessionClosedError:
        error = SessionClosedError(
            f"session {self.task_id} is closed: {getattr(self.over, 'message', self.over)}",
            suggestions=["Open a new session."],
        )
        error.__cause__ = self.over if isinstance(self.over, Exception) else None
        return error

    def _free_line(self, future: Future) -> Line | None:
        """Return a line on which the call would start at once, or after next to nothing. Under the lock."""
        while self._idle:
            line = self._idle.pop()
            if not line.inflight and self.lines.get(line.index) is line:
                return line
        if future.definition.estimate < _AHEAD_US or self.ordered:
            wakes = future.definition.estimate * future.count > _WAKE_US
            best = None
            for line in self.lines.values():
                if (best is None or line.load < best.load) and self._has_room(line, future):
                    if not wakes:
                        return line
                    best = line
            return best
        return None

    def _has_room(self, line: Line, future: Future) -> bool:
        if not line.inflight:
            return True
        if len(line.inflight) >= _AHEAD_CALLS:
            return False
        return self.ordered or line.load + future.definition.estimate * future.count <= _AHEAD_US

    def fill(self, line: Line) -> None:
        """Send a line what it has room for. Under the lock."""
        queue, pieces = self.queue, []
        while queue:
            future = queue[0]
            if future.state >= DONE or future.cancelled:  # while it waited
                queue.popleft()
                continue
            if not self._has_room(line, future) or (self.ordered and not self._ready(future)):
                break
            queue.popleft()
            try:
                pieces.append(booking.frames(line, future))
            except (
                SerializationError
            ) as error:  # an input that was changed here since it came, or is too large
                self.keeper.drop(future, error)
        if pieces:
            line.write(b"".join(pieces))
            if line.crowded:
                self.leader.expect(line.fd, room=True)
        elif not line.inflight and line not in self._idle:
            self._idle.append(line)

    def _ready(self, future: Future) -> bool:
        inputs = future.body.inputs
        return all(one.state == DONE and not staying.is_elsewhere(one, self.task_id) for one in inputs)

    def fill_all(self) -> None:
        """Send every line what it has room for."""
        with self.lock:
            for line in list(self.lines.values()):
                self.fill(line)

    def _help(self, crowd: int) -> None:
        """Let a thread that submits many calls do some of the reading; hold it back when there are too many."""
        if self.keeper.asleep:
            self.keeper.stir()
        if crowd % _HELP_EVERY == 0:
            self.leader.help()
        while crowd >= _MAX_QUEUED and not self.leader.is_me and self.over is None:
            if not self.leader.help(SLICE_S):
                self.keeper.rest(0.001)
            crowd = len(self.queue)

    # -- calls that come back, or end

    def requeue(self, line: Line, futures: Sequence[Future]) -> None:
        """Put calls that were sent and not begun back at the head of the queue, in order. Under the lock."""
        for future in sorted(futures, key=lambda one: one.number, reverse=True):
            line.load = line.load - future.load if line.inflight else 0.0
            future.state, future.worker = QUEUED, None
            line.take_back(future)
            if future.cancelled:
                self.keeper.drop(future)
            else:
                self.queue.appendleft(future)
        for other in list(self.lines.values()):
            if other is not line:
                self.fill(other)

    def again(self, future: Future) -> None:
        """Make another attempt at a call that is on no line, after a while. Under the lock."""
        future.attempts += 1
        future.state, future.worker = QUEUED, None
        self.keeper.later(future.options.retries.delay(future.attempts), future)

    def finish(self, future: Future, error: BaseException) -> None:
        """End a call that is not on any line with an error, unless it has ended."""
        with self.lock:
            due = self._give_up(future, error)
        call_back(due)

    def _give_up(self, future: Future, error: BaseException) -> Due:
        """The same, under the lock. Return the callbacks that are due."""
        if future.state >= DONE:
            return []
        self.open_calls -= 1
        self.waiting.discard(future)
        if future.body is not None and self.arena is not None:
            for segment in future.body.segments:
                self.arena.give_back(segment.number)
        future.error, future.body, future.worker = error, None, None
        if future.kept:
            self.keeper.store(future)
        return [(function, future) for function in ending(future, FAILED)]

    # -- what a future asks for

    def drive(self, future: Future, deadline: float | None) -> None:
        """Block until the future has ended, or until the deadline is over."""
        self.check_process()
        self.leader.wait(lambda: future.state >= DONE, deadline, lambda waiter: follow(future, waiter))

    def drive_item(self, future: Stream) -> None:
        """Block until another value of a generator has come, or its end; for a moment at most."""
        self.check_process()
        self.leader.wait(
            lambda: future.state >= DONE or future.has_items(),
            time.monotonic() + SLICE_S,
            lambda waiter: follow(future, waiter),
        )

    def cancel(self, future: Future) -> bool:
        """See `Future.cancel`."""
        self.check_process()
        with self.lock:
            if future.state >= DONE:
                return False
            future.cancelled = True
            line, due = future.worker, []
            if line is None:
                text = f"the call {future.name!r} was cancelled before it started"
                due = self._give_up(future, CallCancelledError(text, task_id=self.task_id))
        if line is not None:
            wish = {"do": "cancel", "worker": line.worker, "stream": line.stream, "number": future.number}
            self.keeper.say(wish)
        call_back(due)
        return True

    def keep(self, future: Future) -> str:
        """See `Future.id`."""
        self.check_process()
        with self.lock:
            known, future.kept = future.kept, True
            line = future.worker
            if not known and line is not None and not losses.may_fail(future):
                line.write(wire.frame(wire.KEEP, future.number))
        if not known and future.state >= DONE:
            self.keeper.store(future)
        return f"{self.task_id}:{self.keeper.call_name(future)}"

    def let_stay(self, future: Future) -> None:
        """Have a large value stay with the session, unless the workers share memory with us."""
        if self.arena is not None or type(future) is not Future:
            return
        with self.lock:
            known, future.stays = future.stays, True
            if not known and future.worker is not None:
                future.worker.write(wire.frame(wire.STAY, future.number))

    def refer(self, future: Future, timeout: float | None) -> ObjectRef:
        """See `Future.object_ref`."""
        if isinstance(future.parcel, Stayed):
            return future.parcel.ref(self.flow.provider.name)
        from flow_core.kept import ref_of

        return ref_of(self.flow.engine, self.task_id, self.keeper.call_name(future), timeout)

    def logs(self, future: Future) -> str:
        """See `Future.logs`."""
        if future.log_range is None:
            return str(getattr(future.error, "log_tail", ""))
        return self.keeper.log(*future.log_range).decode("utf-8", "replace")

    def decode(self, future: Future, parcel: parcels.Parcel) -> Any:
        """Return the value of a parcel."""
        if isinstance(parcel, Stayed):
            return parcel.fetch(self.flow.engine, future.definition.codec)
        return encoding.value(parcel, future.definition.codec, self.task_id)

    def credit(self, future: Stream) -> None:
        """Let a generator go on: one of its values was taken."""
        with self.lock:
            line = future.worker
            if line is not None:
                line.write(wire.frame(wire.CREDIT, future.number, more=1))

    # -- the end

    def unended(self) -> list[Future]:
        """Return the calls that have not ended. Under the lock."""
        calls = [*self.queue, *self.waiting, *self.keeper.delayed()]
        for line in [*self.lines.values(), *self.limbo.values()]:
            calls += line.inflight.values()
        return list(dict.fromkeys(calls))

    @property
    def gone(self) -> bool:
        """Whether the workers are gone by themselves, so that another session can take the place of this one.

        Idle for too long, or lost with their machine; not when closed, or when nobody knows whether they still run.
        """
        over = self.over
        if isinstance(over, (WorkerDiedError, TaskOutOfMemoryError)):
            return over.reason != "unreachable" and self.keeper.has_served
        return isinstance(over, SessionClosedError) and over.error_code == "session-idle"

    def waits(self, future: Future) -> bool:
        """Whether a call waits for its inputs. Under the lock."""
        return future in self.waiting

    def forget_lines(self) -> None:
        """Forget the workers, and what is queued for them or will be: their session is gone. Under the lock."""
        self.lines.clear()
        self.limbo.clear()
        self.queue.clear()
        self._idle.clear()
        self.keeper.withdraw()

    def close(self) -> None:
        """End the session: calls that have not ended are cancelled, and no process of it is left. Idempotent."""
        if self.over is None and self._generation is _generation:
            self.keeper.close_session()

    def leave(self) -> None:
        """Disconnect without ending the session: it goes on for its lease, or for as long as others use it."""
        if self._generation is not _generation:
            return
        self.keeper.say({"do": "leave"})
        self.end(SessionClosedError("it was left"))

    def end(self, error: BaseException) -> None:
        """End all calls, and every further one, with an error; let the connections go."""
        with self.lock:
            if self.over is not None:
                return
            self.over = error
            left = self.unended()
            for line in [*self.lines.values(), *self.limbo.values()]:
                line.inflight.clear()
            self.queue.clear()
            self.keeper.withdraw()
        why = f"session {self.task_id} is closed ({getattr(error, 'message', error)})"
        for future in left:
            if future.cancelled or isinstance(error, SessionClosedError):
                text = f"the call {future.name!r} did not end: {why}"
                self.finish(future, CallCancelledError(text, task_id=self.task_id))
            else:
                self.finish(future, losses.copy_of(error))
        with self.lock:
            for connection in [*self.lines.values(), *self.keeper.connections()]:
                self.leader.forget(connection.fd)
                connection.drain(2.0)
                connection.close()
            self.lines.clear()
            self.limbo.clear()
            if self.arena is not None:
                self.arena.close()
        self.keeper.stir()
        self.leader.nudge()


def _started(flow: Flow, spec: SessionSpec, key: str) -> Task:
    return flow.start_session(spec.orders(), idempotency_key=key, **spec.machine())
