"""A worker of a warm session: reads calls from its clients' connections, runs them one after the other, answers.

What it runs next is read ahead, so that short calls cost no waiting; should a call turn out to be long, a second thread
gives what was read ahead back to the client, which sends it elsewhere. An outcome is sent before the next call begins,
so the death of this process never takes an earlier call's outcome along. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque

from . import load, parcels, pickles, wire
from .execute import WIRE_VERSION, header_of, not_serializable, prepare_process
from .strict_json import NotSerializable, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from .crew import Slot

_READ_BYTES = 256 * 1024
_STUCK_S = 0.002
_LONG_US = 2000
_RANGE = struct.Struct("<QQ")
_TAIL_BYTES = 4000
_NOTHING = b"null"


class Interrupted(KeyboardInterrupt):
    """The call was cancelled, or its time is over."""


class Gone(Exception):
    """The client's connection has ended."""


class Definition:
    """A function as a client has sent it: loaded when it is first called, so that its errors are the call's."""

    def __init__(self, head: dict[str, Any], payload: bytes) -> None:
        self.kind: str = head["kind"]
        self.name: str = head["name"]
        self.codec = parcels.JSON if head["codec"] == "json" else parcels.PICKLE
        self.streams: bool = head.get("generator", False)
        self.of: int = head.get("of", 0)
        self._sources = head.get("sources") or {}
        self._payload = payload
        self.function: Callable[..., Any] | None = None

    def resolve(self, stream: Stream) -> Callable[..., Any]:
        """Return what is to be called. Raises what loading it raises."""
        if self.kind == "method":
            target = stream.object_of(self.of)
            function: Callable[..., Any] = getattr(target, self.name) if self.name else target
        elif self.kind == "touch":
            stream.object_of(self.of)
            function = _nothing
        else:
            function = pickles.loads_captured(self._payload, self._sources)
        self.function = function
        return function


def _nothing() -> None:
    """Be called in place of a method, when an object is only to be made."""


class Stream:
    """One client's connection."""

    def __init__(self, number: int, client: str, connection: socket.socket) -> None:
        self.number = number
        self.client = client
        self.connection = connection
        self.frames = wire.Frames()
        self.definitions: dict[int, Definition] = {}
        self.made: dict[int, Any] = {}
        self.unmade: dict[int, BaseException] = {}
        self.kept: set[int] = set()
        self.credit: dict[int, int] = {}
        self.descriptors: deque[int] = deque()
        self.mapped: dict[int, parcels.Mapped] = {}
        self.returned: deque[int] = deque()
        self.shares = connection.family == socket.AF_UNIX
        self.arena = parcels.Arena() if self.shares else None
        self.lock = threading.Lock()

    def object_of(self, number: int) -> Any:
        """Return the object of a service, made now if every worker makes its own. Raises what making it raised."""
        if number in self.unmade:
            raise self.unmade[number]
        if number not in self.made:
            maker = self.definitions[number]
            if maker.kind != "each":
                raise RuntimeError("the service has no object: the call that should make it was not made")
            self.made[number] = maker.resolve(self)()
        return self.made[number]

    def receive(self) -> list[wire.Frame]:
        """Return the frames that have come. Raises Gone at the connection's end."""
        try:
            if self.shares:
                data, rights, _, _ = self.connection.recvmsg(_READ_BYTES, 1024)
                for level, kind, packed in rights:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        count = len(packed) // 4
                        self.descriptors.extend(struct.unpack(f"{count}i", packed[: count * 4]))
            else:
                data = self.connection.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            raise Gone
        return self.frames.cut(data)

    def send(self, data: bytes) -> None:
        """Send frames; a client that is gone is noticed when its connection is read."""
        try:
            with self.lock:
                self.connection.sendall(data)
        except OSError:
            pass

    def send_parcel(self, kind: int, number: int, codec: int, body: bytes, more: int, before: bytes) -> None:
        """Send a value's frame after `before`, and what has been let go of meanwhile."""
        if self.returned:
            before += self.releases()
        self.send(before + wire.frame(kind, number, body, codec, more))

    def releases(self) -> bytes:
        """Return the frames that give back the segments which nobody here looks at any more."""
        frames = b""
        while self.returned:
            number = self.returned.popleft()
            if number >> 63:
                self.mapped.pop(number, None)
            frames += wire.frame(wire.RELEASE, number)
        return frames

    def hand_over(self, segment: parcels.Segment) -> None:
        """Let the client map a segment."""
        segment.told = True
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", segment.fd))
        data = wire.frame(wire.SEGMENT, segment.number)
        try:
            with self.lock:
                sent = self.connection.sendmsg([data], [rights])
                self.connection.sendall(data[sent:])
        except OSError:
            pass

    def parcel(self, codec: int, body: bytes) -> parcels.Parcel:
        """Return a value that has arrived, holding the segments that it lies in."""
        if not codec & parcels.PARTS:
            return parcels.Parcel(codec, body)
        loans = {
            number: parcels.Loan(self.mapped[number], self.returned) for number in parcels.segments_of(body)
        }
        return parcels.Parcel(codec, body, loans)

    def close(self) -> None:
        """Forget the client."""
        self.connection.close()
        while self.descriptors:
            os.close(self.descriptors.popleft())
        if self.arena is not None:
            self.arena.close()


class Worker:
    """The process's one loop."""

    def __init__(self, folder: str, control: socket.socket, slot: Slot, *, ordered: bool) -> None:
        self.folder = folder
        self.control = control
        self.slot = slot
        self.ordered = ordered
        self.pid = os.getpid()
        self.streams: dict[int, Stream] = {}
        self.poll = select.poll()
        self.poll.register(control, select.POLLIN)
        self.ahead: deque[tuple[Stream, wire.Frame]] = deque()
        self.current: tuple[int, int] | None = None
        self.unwanted: dict[tuple[int, int], str] = {}
        self.stuck = threading.Event()
        self.logged = os.fstat(1).st_size
        self.hurried = False
        self.many: tuple[Stream, int, deque[Any], list[Any]] | None = None

    # -- reading

    def run(self) -> None:
        """Serve until the process is killed."""
        threading.Thread(target=self._give_back, name="flow-give-back", daemon=True).start()
        while True:
            while self.ahead:
                if not self.hurried and self.ahead and not self.ordered:
                    self.hurried = True
                    self.stuck.set()
                try:
                    stream, frame = self.ahead.popleft()
                except IndexError:  # the other thread was faster
                    break
                self._call(stream, frame)
            self._read()

    def _read(self, timeout_ms: int | None = None) -> None:
        try:
            ready = self.poll.poll(timeout_ms)
        except InterruptedError:
            return
        for fd, _ in ready:
            stream = self.streams.get(fd)
            if stream is not None:
                self._take(stream)
            else:
                self._hear()

    def _take(self, stream: Stream) -> None:
        try:
            for frame in stream.receive():
                kind = frame[0]
                if kind == wire.CALL or kind == wire.CALL_WITH:
                    self.ahead.append((stream, frame))
                else:
                    self._note(stream, frame)
        except (Gone, wire.ProtocolError):
            self._leave(stream)

    def _note(self, stream: Stream, frame: wire.Frame) -> None:
        """Obey what needs no turn."""
        kind, _, more, number, body = frame
        if kind == wire.RELEASE and stream.arena is not None:
            stream.arena.give_back(number)
        elif kind == wire.CREDIT:
            stream.credit[number] = stream.credit.get(number, 0) + more
        elif kind == wire.DEFINE:
            head, _, payload = body.partition(b"\n")
            stream.definitions[number] = Definition(json.loads(head), payload)
        elif kind == wire.FORGET:
            stream.definitions.pop(number, None)
            stream.made.pop(number, None)
        elif kind == wire.SEGMENT:
            stream.mapped[number] = parcels.Mapped(number, stream.descriptors.popleft())
        elif kind == wire.RETIRE:
            stream.mapped.pop(number, None)
        elif kind == wire.KEEP:
            stream.kept.add(number)
        else:
            raise wire.ProtocolError(f"a frame of kind {kind}")

    def _hear(self) -> None:
        """Take what the supervisor says; also called by the signal handler, in the middle of anything."""
        try:
            data, rights, _, _ = self.control.recvmsg(65536, 256, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not data:
            os._exit(0)  # the supervisor is gone
        message = json.loads(data)
        if "interrupt" in message:
            stream, number = message["interrupt"]
            self.unwanted[stream, number] = message["why"]
        else:
            (fd,) = struct.unpack("i", rights[0][2][:4])
            connection = socket.socket(fileno=fd)
            connection.setblocking(True)
            stream = Stream(message["stream"], message["client"], connection)
            self.streams[fd] = stream
            self.poll.register(fd, select.POLLIN)

    def _leave(self, stream: Stream) -> None:
        fd = stream.connection.fileno()
        self.poll.unregister(fd)
        del self.streams[fd]
        stream.close()
        kept = [(whose, frame) for whose, frame in self.ahead if whose is not stream]
        self.ahead.clear()
        self.ahead.extend(kept)
        self._tell({"left": stream.number})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self.control.send(json.dumps(message).encode())
        except OSError:
            pass

    def _give_back(self) -> None:
        """Return the calls that were read ahead when the one before them does not end (in a thread of its own)."""
        while True:
            self.stuck.wait()
            begun = self.slot.begun
            time.sleep(_STUCK_S)
            many = self.many
            if many is not None:
                self._cut(many)
            if not self.ahead and many is None:
                self.hurried = False
                self.stuck.clear()
            elif self.slot.begun == begun and self.current is not None:
                self._return_ahead()

    def _cut(self, many: tuple[Stream, int, deque[Any], list[Any]]) -> None:
        """Return the items of a chunk that lie behind one that does not end."""
        stream, number, items, values = many
        done = len(values)
        time.sleep(_STUCK_S)
        if len(values) != done or self.many is not many:
            return
        taken = 0
        try:
            while True:
                items.pop()
                taken += 1
        except IndexError:
            pass
        if taken:
            stream.send(wire.frame(wire.RETURNED, number, more=len(values) + 1))

    def _return_ahead(self) -> None:
        back: dict[Stream, list[bytes]] = {}
        while True:
            try:
                stream, frame = self.ahead.pop()
            except IndexError:
                break
            back.setdefault(stream, []).insert(0, wire.frame(wire.RETURNED, frame[3]))
        for stream, frames in back.items():
            stream.send(b"".join(frames))

    # -- one call

    def on_interrupt(self, _number: int, _frame: Any) -> None:
        """SIGINT: the supervisor has written what is to stop; nothing else is interrupted."""
        self._hear()
        if self.current is not None and self.current in self.unwanted:
            raise Interrupted

    def _call(self, stream: Stream, frame: wire.Frame) -> None:
        kind, codec, more, number, body = frame
        key = (stream.number, number)
        options: dict[str, Any] = {}
        if kind == wire.CALL_WITH:
            head, _, body = body.partition(b"\n")
            options = json.loads(head)
            if options.get("kept") or number in stream.kept:
                stream.kept.add(number)
        self.slot.begin(*key)
        timeout = options.get("timeout_s")
        if timeout is not None:
            self._tell({"deadline": [*key, timeout]})
        definition = stream.definitions[more]
        began = time.perf_counter()
        failed: BaseException | None = None
        value = None
        try:
            try:
                function = definition.function or definition.resolve(stream)
                args, kwargs = self._arguments(stream, codec, body, options)
                self.current = key
                if key in self.unwanted:
                    raise Interrupted
                if options.get("many"):
                    value = self._many(stream, number, function, args, star=options["many"] == "star")
                elif definition.kind == "make":
                    self._make(stream, more, function, args, kwargs)
                else:
                    value = function(*args, **kwargs)
                    if definition.streams:
                        value = self._stream_out(stream, number, definition, value)
                    elif hasattr(type(value), "__await__"):
                        value = load.awaited(value)
                self.current = None
            finally:
                self.current = None
                args = kwargs = ()
        except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt end a call as well
            failed = error
            if definition.kind == "make":
                stream.unmade[more] = error
        if os.getpid() != self.pid:
            os._exit(0)  # the function has forked, and this is the child coming back
        micros = min(int((time.perf_counter() - began) * 1e6), 0xFFFFFFFF)
        log = self._log_frame(number)
        if micros > _LONG_US:  # time enough for the client to have asked that the outcome be kept
            self._read(0)
        if failed is None:
            failed = self._answer(stream, number, definition.codec, value, micros, log)
        if failed is not None:
            self._answer_error(stream, number, failed, self.unwanted.pop(key, ""), micros, log)
            failed = None
        self.slot.end()

    def _arguments(self, stream: Stream, codec: int, body: bytes, options: dict[str, Any]) -> Any:
        if options.get("many"):
            return deque(parcels.loads(stream.parcel(codec, body))), None
        if "sizes" not in options:
            if codec == parcels.PICKLE:
                return pickle.loads(body)  # noqa: S301 - the client's own call
            return parcels.loads(stream.parcel(codec, body))
        at, inputs = options["sizes"][0], []
        for size, one in zip(options["sizes"][1:], options["codecs"]):
            inputs.append(parcels.loads(stream.parcel(one, body[at : at + size])))
            at += size
        main = stream.parcel(codec, body[: options["sizes"][0]])
        if codec & ~parcels.PARTS == parcels.PICKLE:
            return parcels.loads(main, lambda head, buffers: _Unpickler(head, buffers, inputs).load())
        call = parcels.loads(main)
        for path, value in zip(options["paths"], inputs):
            target = call
            for step in path[:-1]:
                target = target[step]
            target[path[-1]] = value
        return call

    def _many(
        self, stream: Stream, number: int, function: Callable[..., Any], items: deque[Any], *, star: bool
    ) -> list[Any]:
        """Call the function for each item; return [values, errors by index as records].

        While one of them takes long the other thread may take items from the end, and give them back.
        """
        values: list[Any] = []
        errors: dict[str, Any] = {}
        append, next_item = values.append, items.popleft
        self.many = (stream, number, items, values)
        self.stuck.set()
        try:
            while items:
                try:
                    if star:
                        while True:
                            append(function(*next_item()))
                    else:
                        while True:
                            append(function(next_item()))
                except Interrupted:
                    raise
                except BaseException as error:  # noqa: BLE001 - one item's fault is not the others'
                    trace = error.__traceback__
                    if isinstance(error, IndexError) and not items and trace and trace.tb_next is None:
                        break  # there is no next item
                    errors[str(len(values))] = self._record(error)
                    append(None)
        finally:
            self.many = None
        return [values, errors]

    def _record(self, error: BaseException) -> dict[str, Any]:
        from . import error_record

        return error_record.record_of(error, self.folder)

    @staticmethod
    def _make(stream: Stream, number: int, target: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Make the object of a service, which stays here."""
        stream.made[number] = target(*args, **kwargs) if isinstance(target, type) else target

    def _stream_out(self, stream: Stream, number: int, definition: Definition, made: Any) -> None:
        """Send what a generator yields, as fast as the client takes it."""
        items = load.iterated(made)
        self._return_ahead()
        for value in items:
            codec, body = self._encoded(stream, definition.codec, value, "the value that was yielded")
            stream.send_parcel(wire.ITEM, number, codec, body, 0, b"")
            stream.credit[number] = stream.credit.get(number, 0) - 1
            while stream.credit[number] <= 0:
                self._read()
                if stream.connection.fileno() < 0:
                    raise Interrupted
                self._return_ahead()
        stream.credit.pop(number, None)

    # -- answering

    def _encoded(self, stream: Stream, codec: int, value: Any, name: str) -> tuple[int, bytes]:
        """Return a value as a parcel whose segments the client has. Raises NotSerializable."""
        if codec == parcels.JSON:
            head: bytes = _NOTHING if value is None else to_json(value, name)
            if len(head) < parcels.LARGE_BYTES or stream.arena is None:
                return codec, head
            buffers: list[Any] = []
        elif value is None or parcels.is_simple((value,)):
            head, buffers = parcels.pickled(value, pickle.dumps)
        else:
            head, buffers = pickles.dumps_with_buffers(value, name)
        size = len(head) + sum(one.nbytes for one in buffers)
        if not buffers and (size < parcels.LARGE_BYTES or stream.arena is None):
            return codec, head
        arena = stream.arena if size >= parcels.LARGE_BYTES else None
        packed, body, segments = parcels.pack(codec, head, buffers, arena)
        for segment in segments:
            if not segment.told:
                stream.hand_over(segment)
        return packed, body

    def _answer(
        self, stream: Stream, number: int, codec: int, value: Any, micros: int, log: bytes
    ) -> BaseException | None:
        """Send a value; return the error when it cannot travel."""
        try:
            if stream.kept and number in stream.kept:
                self._keep(stream, number, codec, value)
            codec, body = self._encoded(stream, codec, value, "result")
        except NotSerializable as error:
            return not_serializable(error)
        except BaseException as error:  # noqa: BLE001 - memory, a full disk, an interrupt that came late
            return error
        stream.send_parcel(wire.RESULT, number, codec, body, micros, log)
        return None

    def _answer_error(
        self, stream: Stream, number: int, error: BaseException, why: str, micros: int, log: bytes
    ) -> None:
        message: dict[str, Any] = {"record": self._record(error)}
        if isinstance(error, Interrupted):
            message["why"] = why or "cancelled"
        if log:
            message["tail"] = self._tail(*_RANGE.unpack(log[-_RANGE.size :]))
        body = json.dumps(message).encode()
        if number in stream.kept:
            stream.kept.discard(number)
            header = {"v": WIRE_VERSION, "ok": False, "error": message["record"], "why": message.get("why")}
            self._store(stream, number, json.dumps(header).encode() + b"\n")
        stream.send_parcel(wire.ERROR, number, parcels.JSON, body, micros, log)

    def _log_frame(self, number: int) -> bytes:
        """Say where the call's output lies in this worker's log; nothing where there is none."""
        for out in (sys.stdout, sys.stderr):
            try:
                out.flush()
            except (
                OSError,
                ValueError,
                AttributeError,
            ):  # a full disk; a stream that the user has closed or replaced
                continue
        size = os.fstat(1).st_size
        if size == self.logged:
            return b""
        before, self.logged = self.logged, size
        return wire.frame(wire.LOGGED, number, _RANGE.pack(before, size))

    @staticmethod
    def _tail(begin: int, end: int) -> str:
        try:
            with open("/proc/self/fd/1", "rb") as file:
                file.seek(max(begin, end - _TAIL_BYTES))
                return file.read(end - begin).decode("utf-8", "replace")
        except OSError:
            return ""

    def _keep(self, stream: Stream, number: int, codec: int, value: Any) -> None:
        """Write a value to the task's folder, for those who ask by the call's id. Raises NotSerializable."""
        stream.kept.discard(number)
        data = to_json(value, "result") if codec == parcels.JSON else pickles.dumps(value, "result")
        header = header_of(data, "json" if codec == parcels.JSON else "pickle")
        self._store(stream, number, json.dumps(header).encode() + b"\n" + data)

    def _store(self, stream: Stream, number: int, data: bytes) -> None:
        folder = os.path.join(self.folder, "calls")
        path = os.path.join(folder, f"{stream.client}-{number}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        try:
            with open(f"{path}.{self.pid}", "wb") as file:
                file.write(data)
            os.replace(f"{path}.{self.pid}", path)
        except OSError as error:
            sys.stderr.write(f"the outcome of call {number} could not be written: {error}\n")


class _Unpickler(pickle.Unpickler):
    """Puts the values that a call has waited for in their places."""

    def __init__(self, head: Any, buffers: Any, inputs: list[Any]) -> None:
        super().__init__(io.BytesIO(head), buffers=buffers)
        self.inputs = inputs

    def persistent_load(self, number: Any) -> Any:
        return self.inputs[number]


def main(folder: str, control: socket.socket, slot: Slot, *, ordered: bool) -> NoReturn:
    """Be a worker. Ends only with the process."""
    prepare_process()
    worker = Worker(folder, control, slot, ordered=ordered)
    signal.signal(signal.SIGINT, worker.on_interrupt)
    worker.run()
    raise SystemExit(0)
