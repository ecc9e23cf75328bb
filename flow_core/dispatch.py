"""Pool: the workers of one session, and which call goes to which of them when.

A call is sent as soon as a worker is free. Behind a short call more short ones are sent ahead, about `_AHEAD_US` of
work; should one of them turn out long, its worker gives back what it has not begun, and that goes elsewhere. Whoever
waits for a call reads the connections meanwhile (`flow_core.leader`); the pool's keeper (`flow_core.keeper`) does what
nobody waits for.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flow_core import encoding, payload
from flow_core.chunks import Chunk
from flow_core.deaths import death, timed_out
from flow_core.definitions import PLAIN, CallOptions, Definition, Retries, SessionSpec
from flow_core.errors import CallCancelledError, FlowError, SerializationError, SessionClosedError
from flow_core.futures import DONE, FAILED, QUEUED, SENT, Future, Stream, call_back, ending, follow, wake
from flow_core.keeper import Keeper
from flow_core.leader import SLICE_S, Leader
from flow_core.links import Line, logged
from flow_core.runner import parcels, wire

if TYPE_CHECKING:
    from flow_core.encoding import Encoded
    from flow_core.errors import TaskErrorFields
    from flow_core.flow import Flow
    from flow_core.object_ref import ObjectRef
    from flow_core.task import Task

__all__ = ["CallOptions", "Definition", "Pool", "Retries", "SessionSpec"]

_AHEAD_US = 2000.0
_AHEAD_CALLS = 512
_CALL_COST_US = 8.0
_MAX_QUEUED = 10_000
_HELP_EVERY = 16
_CREDIT = 16

#: Another object in every process that was forked: what belongs to the parent is then noticed without a system call.
_generation = object()


def _forked() -> None:
    global _generation  # noqa: PLW0603 - there is one process as well
    _generation = object()


os.register_at_fork(after_in_child=_forked)

Due = list[tuple[Callable[[Any], object], Future]]


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
    ) -> None:
        self.flow = flow
        self.task = task
        self.task_id = task.task_id
        self.spec = spec
        self.ordered = ordered
        self.host = host
        self.first = first
        self.leader: Leader = Leader() if host is None else host.leader
        self.keeper = Keeper(self)
        self.arena = parcels.Arena() if self.keeper.door.sessions.shares_memory else None
        self.lock = threading.RLock()
        self.lines: dict[int, Line] = {}
        self.limbo: dict[int, Line] = {}  # connections that have ended, whose worker's fate is not known yet
        self.queue: deque[Future] = deque()
        self._waiting: set[Future] = set()  # for their inputs
        self.open_calls = 0
        self.over: BaseException | None = None
        self._idle: list[Line] = []
        self._numbers = itertools.count(1)
        self._generation = _generation
        self.keeper.start()

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
        lent_from = None if options.repeats else self.arena
        made.body = encoding.arguments(definition.codec, args, kwargs, lent_from)
        return self.enter(made)

    def enter(self, made: Future) -> Future:
        """Send a call whose arguments are written down, or queue it."""
        self.check_process()
        inputs = made.body.inputs
        failure = self._look_up(made) if made.body.refs else None
        with self.lock:
            if self.over is not None:
                raise self._refusal()
            made.number = next(self._numbers)
            self.open_calls += 1
            if failure is not None:
                self._give_up(made, failure)
                return made
            if not inputs and not self.queue:
                line = self._free_line(made)
                if line is not None:
                    line.write(self._frames(line, made))
                    if line.crowded:
                        self.leader.expect(line.fd, room=True)
                    if self.keeper.asleep:
                        self.keeper.stir()
                    return made
            if not inputs or self.ordered:
                self.queue.append(made)
            if inputs and not self.ordered:
                self._waiting.add(made)
            crowd = len(self.queue)
        if inputs:
            self._wait_for_inputs(made, inputs)
        self._help(crowd)
        return made

    def _look_up(self, made: Future) -> FlowError | None:
        """Add what its worker needs to get the values of its references; return what is wrong with one of them."""
        try:
            carried = self.flow.objects.carried(
                made.body.refs,
                provider=self.flow.provider.name,
                contained=self.spec.machine()["image"] is not None,
                allow_pickle=made.definition.codec == "pickle",
            )
        except FlowError as error:
            return error
        made.body = made.body._replace(carried=carried)
        return None

    def check_process(self) -> None:
        """Raise SessionClosedError in a fork: its parent's locks may be held there, and the connections are shared."""
        if self._generation is not _generation:
            raise SessionClosedError(
                "a session cannot be used in a process that was forked from the one that opened it",
                suggestions=["Open the session in that process, or start it with spawn or forkserver."],
            )

    def _refusal(self) -> SessionClosedError:
        error = SessionClosedError(
            f"session {self.task_id} is closed: {self.over}", suggestions=["Open a new session."]
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
            for line in self.lines.values():
                if self._has_room(line, future):
                    return line
        return None

    def _has_room(self, line: Line, future: Future) -> bool:
        if not line.inflight:
            return True
        if len(line.inflight) >= _AHEAD_CALLS:
            return False
        return self.ordered or line.load + future.definition.estimate * future.count <= _AHEAD_US

    def _frames(self, line: Line, future: Future) -> bytes:
        """Book a call on a line and return what is to be sent for it. Under the lock. Raises SerializationError."""
        definition, encoded = future.definition, future.body
        codec, body, segments, inputs, _, many, refs, _ = encoded
        kind = wire.CALL
        if inputs or many or refs or future.kept or future.options.timeout_s is not None:
            kind = wire.CALL_WITH
            body = self._with_options(line, future, encoded)  # may fail: nothing is booked yet
        data = b""
        if definition.number not in line.known:
            data = line.introduce(definition)
        for segment in segments:
            line.tell(segment)
        line.inflight[future.number] = future
        future.state, future.worker = SENT, line
        future.load = definition.estimate * future.count + _CALL_COST_US
        line.load += future.load
        if definition.generator:
            data += wire.frame(wire.CREDIT, future.number, more=_CREDIT)
        return data + wire.frame(kind, future.number, body, codec, definition.number)

    @staticmethod
    def _with_options(line: Line, future: Future, encoded: Encoded) -> bytes:
        more: dict[str, Any] = {
            "timeout_s": future.options.timeout_s,
            "kept": future.kept and not _may_fail(future),
            "many": encoded.many,
        }
        bodies: list[bytes | bytearray] = [encoded.body]
        if encoded.inputs or encoded.refs:
            values = [encoding.outcome_of(one) for one in encoded.inputs]
            bodies += [line.forward(one, future) for one in values]
            bodies += encoded.carried.values
            more["codecs"] = [one.codec for one in values]
            more["sizes"] = [len(one) for one in bodies]
            more["paths"] = encoded.paths
            more["objects"] = encoded.carried.listed
        return json.dumps(more).encode() + b"\n" + b"".join(bodies)

    def fill(self, line: Line) -> None:
        """Send a line what it has room for. Under the lock."""
        queue, pieces = self.queue, []
        while queue:
            future = queue[0]
            if future.state >= DONE or future.cancelled:  # while it waited
                queue.popleft()
                continue
            if not self._has_room(line, future) or (self.ordered and not _ready(future)):
                break
            queue.popleft()
            try:
                pieces.append(self._frames(line, future))
            except SerializationError as error:  # an input that was changed here since it came
                self.keeper.drop(future, error)
        if pieces:
            line.write(b"".join(pieces))
            if line.crowded:
                self.leader.expect(line.fd, room=True)
        elif not line.inflight and line not in self._idle:
            self._idle.append(line)

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

    # -- calls that wait for others

    def _wait_for_inputs(self, future: Future, inputs: Sequence[Future]) -> None:
        missing = len(inputs)

        def one_less(producer: Future) -> None:
            nonlocal missing
            with self.lock:
                missing -= 1
                ready = missing == 0
            if producer.error is not None:
                self._fail_for(future, producer.error, producer.name)
            elif ready:
                self._inputs_are_there(future)

        for producer in inputs:
            if not producer.runs_later(one_less):
                one_less(producer)

    def _inputs_are_there(self, future: Future) -> None:
        with self.lock:
            if future in self._waiting:  # or it has ended meanwhile
                self._waiting.remove(future)
                self.queue.append(future)
        self.fill_all()

    def _fail_for(self, future: Future, cause: BaseException, producer: str) -> None:
        error = _copy_of(cause)
        error.__cause__ = cause
        if isinstance(error, FlowError):
            error.message = f"{future.name!r} was not called: its input {producer!r} failed: {error.message}"
        self.finish(future, error)
        self.fill_all()

    # -- reading

    def hear(self, line: Line) -> None:
        """Work in what a worker has sent. Only in the thread that leads."""
        self._flush(line)
        due: Due = []
        future: Future | None = None
        try:
            frames = line.read()
            if frames is None:
                self._lose(line)
                return
            with self.lock:
                inflight = line.inflight
                for frame in frames:
                    if frame[0] != wire.RESULT:
                        due += self._take_in(line, frame)
                        continue
                    _, codec, micros, number, body = frame
                    future = inflight.pop(number, None)
                    if future is not None:
                        future.parcel = line.parcel(codec, body)
                        self._settle(line, future, micros)
                        for function in ending(future, DONE):
                            due.append((function, future))
                if line.returned:
                    line.give_back()
                self.fill(line)
        except BaseException:
            # By Ctrl-C, or for want of a descriptor: what was read is lost, and with it the place in the stream.
            self._tear(line, future)
            call_back(due)
            raise
        if due:
            call_back(due)

    def _flush(self, line: Line) -> None:
        if line.crowded:
            with self.lock:
                if line.flush():
                    self.leader.expect(line.fd, room=False)

    def _tear(self, line: Line, future: Future | None) -> None:
        """Give up a connection in the middle; nobody knows how its calls have ended, `future` the last of them."""
        with self.lock:
            if future is not None and future.state < DONE:
                self.open_calls += future.body is None  # it is off the books already
                line.inflight.setdefault(future.number, future)
        if self.lines.get(line.index) is line:
            self._lose(line)
            self.bury(line, {})

    def hear_out(self, line: Line) -> None:
        """Read the last words of a worker that is gone, whoever else may hold its end of the connection."""
        poll = select.poll()
        poll.register(line.fd, select.POLLIN)
        while self.lines.get(line.index) is line:
            if poll.poll(0):
                self.hear(line)
            else:
                self._lose(line)

    def _settle(self, line: Line, future: Future, micros: int) -> None:
        """Take a call that has ended off the books. Under the lock."""
        future.definition.took(micros / future.count)
        line.load = line.load - future.load if line.inflight else 0.0
        if line.forwarded:
            line.forwarded.pop(future.number, None)
        future.worker = future.body = None
        self.open_calls -= 1
        if future.kept:
            self.keeper.store(future)

    def _take_in(self, line: Line, frame: wire.Frame) -> Due:
        """Work in a frame that is not a plain result. Under the lock. Return the callbacks that are due."""
        kind, number = frame[0], frame[3]
        if kind == wire.RELEASE:
            self._released(line, number)
        elif kind == wire.SEGMENT:
            line.mapped[number] = parcels.Mapped(number, line.descriptors.popleft())
        elif kind == wire.RETIRE:
            line.mapped.pop(number, None)
        elif number in line.inflight:
            return self._take_in_news(line, line.inflight[number], frame)
        return []

    def _take_in_news(self, line: Line, future: Future, frame: wire.Frame) -> Due:
        """Work in what is said of one call. Under the lock."""
        kind, codec, more, _, body = frame
        if kind == wire.LOGGED:
            future.log_range = (line.index, *logged(body))
        elif kind == wire.ITEM and isinstance(future, Stream):
            future.arrive(line.parcel(codec, body))
            return [(wake, future)]
        elif kind == wire.RETURNED and more and isinstance(future, Chunk):
            rest = future.cut(more, self.arena)
            rest.number = next(self._numbers)
            self.open_calls += 1
            self._requeue(line, [rest])
        elif kind == wire.RETURNED:
            del line.inflight[future.number]
            self._requeue(line, [future])
        elif kind == wire.ERROR:
            del line.inflight[future.number]
            return self._failed(line, future, more, json.loads(body))
        return []

    def _released(self, line: Line, number: int) -> None:
        if number >> 63:
            line.foreign.pop(number, None)
        elif self.arena is not None:
            line.lent.discard(number)
            self.arena.give_back(number)
            for retired in self.arena.retired:
                for one in self.lines.values():
                    if retired in one.told:
                        one.told.discard(retired)
                        one.write(wire.frame(wire.RETIRE, retired))
            self.arena.retired.clear()

    def _requeue(self, line: Line, futures: Sequence[Future]) -> None:
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

    def _failed(self, line: Line, future: Future, micros: int, message: dict[str, Any]) -> Due:
        body, kept = future.body, future.kept
        future.kept = False
        self._settle(line, future, micros)
        future.kept = kept
        error = self._error_of(message)
        retries = future.options.retries
        if isinstance(error, retries.on) and _may_fail(future) and not future.cancelled:
            future.body = body
            self.again(future, retries)
            return []
        future.error = error
        if kept:
            self.keeper.store(future)
        return [(function, future) for function in ending(future, FAILED)]

    def again(self, future: Future, retries: Retries) -> None:
        """Make another attempt, after a while. Under the lock."""
        future.attempts += 1
        future.state, future.worker = QUEUED, None
        self.open_calls += 1
        self.keeper.later(retries.delay(future.attempts), future)

    def _error_of(self, message: dict[str, Any]) -> FlowError:
        record = message["record"]
        fields: TaskErrorFields = {"task_id": self.task_id, "log_tail": str(message.get("tail", ""))}
        kind = payload.ENDINGS.get(message.get("why", ""))
        return payload.error_of(record, **fields) if kind is None else kind(str(record["message"]), **fields)

    # -- lost workers

    def _lose(self, line: Line) -> None:
        """A connection has ended: what was sent over it waits for the supervisor's word about the worker."""
        with self.lock:
            self.leader.forget(line.fd)
            line.close()
            if self.lines.get(line.index) is line:
                del self.lines[line.index]
            self.limbo[line.stream] = line
            line.ended_at = time.monotonic()
            line.foreign.clear()
        if line.report is not None:
            self.bury(line, line.report)
        self.keeper.stir()

    def bury(self, line: Line, report: Mapping[str, Any]) -> None:
        """Decide what becomes of the calls of a worker that is gone."""
        with self.lock:
            if self.limbo.pop(line.stream, None) is None:
                return
            calls = list(line.inflight.values())
            line.inflight.clear()
            lost = [one for one in calls if self.ordered or _was_running(one, line, report)]
            rest = [one for one in calls if one not in lost]
            kept = {segment.number for one in calls if one.body for segment in one.body.segments}
            self._requeue(line, rest)
            for number in line.lent - kept:
                if self.arena is not None:
                    self.arena.give_back(number)
        for future in lost:
            self._lost(future, line, report)
        if self.ordered:
            what = f"the worker that held the state of {self.spec.name!r} died"
            self.end(death(what, report, self.task_id))

    def _lost(self, future: Future, line: Line, report: Mapping[str, Any]) -> None:
        """A worker died in the middle of this call, or, where calls keep their order, before it."""
        retries = future.options.retries
        fields: Any = {"task_id": self.task_id, "log_tail": str(report.get("tail", ""))}
        running = _was_running(future, line, report)
        if future.cancelled or (running and report.get("reason") == "cancelled"):
            text = f"the call {future.name!r} was cancelled while it ran; its worker had to be killed"
            self.finish(future, CallCancelledError(text, **fields))
        elif running and report.get("reason") == "timeout":
            self.finish(future, timed_out(future.name, future.options.timeout_s, **fields))
        else:
            with self.lock:
                repeated = future.attempts < retries.lost and not self.ordered and not _has_yielded(future)
                if repeated and self.over is None:
                    self.open_calls -= 1
                    self.again(future, retries)
                    return
            when = "while it ran" if running else "before it ran"
            self.finish(future, death(f"the worker died {when} {future.name!r}", report, self.task_id))

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
        self._waiting.discard(future)
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
            wish = {"do": "cancel", "worker": line.index, "stream": line.stream, "number": future.number}
            self.keeper.say(wish)
        call_back(due)
        return True

    def keep(self, future: Future) -> str:
        """See `Future.id`."""
        self.check_process()
        with self.lock:
            known, future.kept = future.kept, True
            line = future.worker
            if not known and line is not None and not _may_fail(future):
                line.write(wire.frame(wire.KEEP, future.number))
        if not known and future.state >= DONE:
            self.keeper.store(future)
        return f"{self.task_id}:{self.keeper.call_name(future)}"

    def refer(self, future: Future, timeout: float | None) -> ObjectRef:
        """See `Future.object_ref`."""
        from flow_core.kept import ref_of

        return ref_of(self.flow.engine, self.task_id, self.keeper.call_name(future), timeout)

    def logs(self, future: Future) -> str:
        """See `Future.logs`."""
        if future.log_range is None:
            return str(getattr(future.error, "log_tail", ""))
        return self.keeper.log(*future.log_range).decode("utf-8", "replace")

    def decode(self, future: Future, parcel: parcels.Parcel) -> Any:
        """Return the value of a parcel."""
        return encoding.value(parcel, future.definition.codec, self.task_id)

    def credit(self, future: Stream) -> None:
        """Let a generator go on: one of its values was taken."""
        with self.lock:
            line = future.worker
            if line is not None:
                line.write(wire.frame(wire.CREDIT, future.number, more=1))

    # -- the end

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
            left = [*self.queue, *self._waiting, *self.keeper.withdraw()]
            for line in [*self.lines.values(), *self.limbo.values()]:
                left += line.inflight.values()
                line.inflight.clear()
            self.queue.clear()
        closed = isinstance(error, SessionClosedError)
        for future in left:
            text = f"the call {future.name!r} did not end: session {self.task_id} is closed ({error})"
            self.finish(future, CallCancelledError(text, task_id=self.task_id) if closed else _copy_of(error))
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


def _ready(future: Future) -> bool:
    return all(one.state == DONE for one in future.body.inputs)


def _may_fail(future: Future) -> bool:
    """Whether an exception is not the end of the call. Its worker is then not asked to keep what comes of it."""
    return future.attempts < future.options.retries.exceptions and not _has_yielded(future)


def _has_yielded(future: Future) -> bool:
    """Whether values of a generator have come: to begin it again would bring them twice."""
    return isinstance(future, Stream) and future.yielded


def _was_running(future: Future, line: Line, report: Mapping[str, Any]) -> bool:
    """Whether a call had begun when its worker died; to be feared where nobody can tell."""
    if not report:
        return True
    return bool(report["busy"] and (report["stream"], report["number"]) == (line.stream, future.number))


def _copy_of(error: BaseException) -> BaseException:
    """Return an error of one's own for each call: a traceback grows where the same one is raised twice."""
    import copy

    return copy.copy(error) if isinstance(error, FlowError) else error
