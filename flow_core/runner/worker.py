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
import time

from . import load, parcels, wire
from .ahead import Ahead, Chunk
from .answers import Answers
from .execute import not_serializable, prepare_process
from .streams import Definition, Gone, Stream
from .strict_json import NotSerializable, from_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from .crew import Slot
    from .objects import Resolver

_LONG_US = 2000
_CREDIT_S = 0.01  # the other thread may just have read what we wait for


class Interrupted(KeyboardInterrupt):
    """The call was cancelled, or its time is over."""


class Call:
    """One call, from the frame that asks for it to the frames that answer."""

    __slots__ = ("body", "codec", "definition", "key", "log", "micros", "number", "options", "stream")

    def __init__(self, stream: Stream, frame: wire.Frame) -> None:
        kind, self.codec, more, self.number, self.body = frame
        self.stream = stream
        self.key = (stream.number, self.number)
        self.definition = stream.definitions[more]
        self.options: dict[str, Any] = {}
        if kind == wire.CALL_WITH:
            head, _, self.body = self.body.partition(b"\n")
            self.options = json.loads(head)
            if self.options["kept"]:
                stream.kept.add(self.number)
        self.micros = 0
        self.log = b""

    @property
    def timeout_s(self) -> float | None:
        """How long it may run."""
        return self.options.get("timeout_s")

    @property
    def many(self) -> str:
        """Whether it stands for many: each item is one argument ("one"), or lists them ("star")."""
        return self.options.get("many") or ""


class Worker:
    """The process's one loop."""

    def __init__(self, folder: str, control: socket.socket, slot: Slot, *, ordered: bool) -> None:
        self.folder = folder
        self.control = control
        self.slot = slot
        self.ordered = ordered
        self.pid = os.getpid()
        self.streams: dict[int, Stream] = {}
        self.poll = select.epoll()  # another thread may add to it while this one waits
        self.poll.register(control, select.EPOLLIN)
        self.current: tuple[int, int] | None = None
        self.unwanted: dict[tuple[int, int], str] = {}
        self.answers = Answers(folder)
        self.ahead = Ahead(self.streams, self._note, lambda: slot.begun, self._hear_beside)

    # -- reading

    def run(self) -> None:
        """Serve until the process is killed."""
        if not self.ordered:  # or nobody else could run what is given back
            self.ahead.start()
        calls, watch = self.ahead.calls, self.ahead.watch
        while True:
            while calls:
                try:
                    stream, frame = calls.popleft()
                except IndexError:  # it was given back just now
                    break
                watch()
                try:
                    call = Call(stream, frame)
                except (LookupError, ValueError, TypeError):  # a function that it never told of
                    self._leave(stream)
                    continue
                self._call(call)
            self._read()

    def _read(self, timeout_s: float | None = None) -> None:
        try:
            ready = self.poll.poll(timeout_s)
        except InterruptedError:
            return
        for fd, _ in ready:
            stream = self.streams.get(fd)
            if stream is None:
                self._hear()
                continue
            try:
                self.ahead.take_in(stream)
            except (Gone, wire.ProtocolError):
                self._leave(stream)

    def _note(self, stream: Stream, frame: wire.Frame) -> None:
        """Obey what needs no turn. Raises ProtocolError for what makes no sense."""
        try:
            self._obey(stream, frame)
        except (LookupError, ValueError, TypeError, OSError) as error:
            raise wire.ProtocolError(f"a frame of kind {frame[0]}: {error!r}") from error

    def _obey(self, stream: Stream, frame: wire.Frame) -> None:
        kind, _, more, number, body = frame
        if kind == wire.RELEASE and stream.arena is not None:
            stream.arena.give_back(number)
            stream.retire()
        elif kind == wire.CREDIT:
            stream.credit[number] = stream.credit.get(number, 0) + more
        elif kind == wire.DEFINE:
            head, _, payload = body.partition(b"\n")
            stream.definitions[number] = Definition(number, json.loads(head), payload)
        elif kind == wire.FORGET:
            stream.definitions.pop(number, None)
            stream.made.pop(number, None)
        elif kind == wire.SEGMENT:
            stream.mapped[number] = parcels.Mapped(number, stream.descriptors.popleft())
        elif kind == wire.RETIRE:
            stream.mapped.pop(number, None)
        elif kind == wire.KEEP:
            stream.kept.add(number)
        elif kind == wire.STAY:
            stream.staying.add(number)
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
            if message["begun"] in (0, self.slot.begun):  # or it is about an attempt that is over
                self.unwanted[stream, number] = message["why"]
        else:
            (fd,) = struct.unpack("i", rights[0][2][:4])
            connection = socket.socket(fileno=fd)
            connection.setblocking(True)
            stream = Stream(message["stream"], message["client"], connection, shares_memory=message["memory"])
            self.streams[fd] = stream
            self.poll.register(fd, select.EPOLLIN)

    def _hear_beside(self) -> None:
        """The same from another thread, while a call runs: it may be the one that is to stop."""
        unwanted = len(self.unwanted)
        self._hear()
        if len(self.unwanted) != unwanted:
            os.kill(self.pid, signal.SIGINT)  # the signal that came with it may have found nothing to hear

    def _leave(self, stream: Stream) -> None:
        fd = stream.connection.fileno()
        if fd < 0:  # left already
            return
        self.poll.unregister(fd)
        del self.streams[fd]
        stream.close()
        self.ahead.drop(stream)
        self._tell({"left": stream.number})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self.control.send(json.dumps(message).encode())
        except OSError:
            pass

    # -- one call

    def on_interrupt(self, _number: int, _frame: Any) -> None:
        """SIGINT: the supervisor has written what is to stop; nothing else is interrupted."""
        self._hear()
        if self.current is not None and self.current in self.unwanted:
            raise Interrupted

    def _call(self, call: Call) -> None:
        self.slot.begin(*call.key)
        if call.timeout_s is not None:
            if self.unwanted.get(call.key) == "timeout":  # of the attempt before, which was over by itself
                del self.unwanted[call.key]
            self._tell({"deadline": [*call.key, call.timeout_s, self.slot.begun]})
        value, failed = None, None
        began = time.perf_counter()
        self.ahead.running = True
        try:
            value = self._value_of(call)
        except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt end a call as well
            failed = error
        self.ahead.running = False
        self.current = None
        if os.getpid() != self.pid:
            os._exit(0)  # the function has forked, and this is the child coming back
        call.micros = min(int((time.perf_counter() - began) * 1e6), 0xFFFFFFFF)
        call.log = self.answers.log_frame(call.number)
        if call.micros > _LONG_US:  # time enough for the client to have asked that the outcome be kept
            self._read(0)
        if failed is None:
            failed = self.answers.answer(call, value)
        if failed is not None:
            interrupted = isinstance(failed, Interrupted)
            why = self.unwanted.pop(call.key, "cancelled") if interrupted else ""
            self.answers.answer_error(call, failed, why)
        self.slot.end()

    def _value_of(self, call: Call) -> Any:
        self.current = call.key
        try:
            if self.unwanted and call.key in self.unwanted:
                raise Interrupted
            definition, stream = call.definition, call.stream
            function = definition.function or definition.resolve(stream)
            args, kwargs = self._arguments(call)
            if call.many:
                return self._many(Chunk(stream, call.number, args), function, star=call.many == "star")
            if definition.kind == "make":
                return self._make(call, function, args, kwargs)
            value = function(*args, **kwargs)
            if definition.streams:
                return self._stream_out(call, value)
            return load.awaited(value) if hasattr(type(value), "__await__") else value
        finally:
            self.current = None

    def _arguments(self, call: Call) -> Any:
        stream, codec, body, options = call.stream, call.codec, call.body, call.options
        if "sizes" in options:
            arguments = self._assembled(call)
        elif codec == parcels.PICKLE and not call.many:
            return pickle.loads(body)  # noqa: S301 - the client's own call
        elif codec == parcels.JSON:
            arguments = from_json(body)
        else:
            arguments = parcels.loads(stream.parcel(codec, body))
        return (arguments, None) if call.many else arguments

    def _assembled(self, call: Call) -> Any:
        """Return arguments with what belongs into them: values that the call has waited for, values by reference."""
        stream, options, at, pieces = call.stream, call.options, 0, []
        for size in options["sizes"]:
            pieces.append(call.body[at : at + size])
            at += size
        main, codecs = stream.parcel(call.codec, pieces[0]), options["codecs"]
        inputs = [self._input(stream, *one) for one in zip(codecs, pieces[1:])]
        resolver = None
        if options["objects"]:
            from .objects import Resolver

            resolver = Resolver(self.folder, options["objects"], pieces[1 + len(codecs) :])
        if call.codec & ~parcels.PARTS == parcels.PICKLE:
            return parcels.loads(
                main, lambda head, buffers: _Unpickler(head, buffers, inputs, resolver).load()
            )
        arguments = parcels.loads(main)
        if resolver is not None:
            arguments = resolver.in_json(arguments)
        for path, value in zip(options["paths"], inputs):
            target = arguments
            for step in path[:-1]:
                target = target[step]
            target[path[-1]] = value
        return arguments

    def _input(self, stream: Stream, codec: int, body: bytes) -> Any:
        if codec != parcels.STAYS:
            return parcels.loads(stream.parcel(codec, body))
        from .objects import Resolver

        where = json.loads(body)
        return Resolver(self.folder, [where]).value(where)

    def _many(self, chunk: Chunk, function: Callable[..., Any], *, star: bool) -> list[Any]:
        """Call the function for each item that is not given back; return [values, errors by index as records]."""
        values, items = chunk.done, chunk.items
        errors: dict[str, Any] = {}
        append = values.append
        self.ahead.chunk = chunk
        try:
            while True:
                try:
                    if star:
                        for item in items:
                            append(function(*item))
                    else:
                        for item in items:
                            append(function(item))
                    break
                except Interrupted:
                    raise
                except BaseException as error:  # noqa: BLE001 - one item's fault is not the others'
                    errors[str(len(values))] = self.answers.record(error)
                    append(None)
        finally:
            self.ahead.chunk = None
            chunk.end()
        return [values, errors]

    @staticmethod
    def _make(call: Call, target: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Make the object of a service, which stays here."""
        number = call.definition.number
        try:
            call.stream.made[number] = target(*args, **kwargs) if isinstance(target, type) else target
        except BaseException as error:
            call.stream.unmade[number] = error
            raise

    def _stream_out(self, call: Call, made: Any) -> None:
        """Send what a generator yields, as fast as the client takes it."""
        stream, number, codec = call.stream, call.number, call.definition.codec
        self.ahead.give_back()
        for value in load.iterated(made):
            self.current = None  # an interrupt while a frame is sent or read would tear it
            try:
                encoded = self.answers.encoded(stream, codec, value, "the value that was yielded")
            except NotSerializable as error:
                raise not_serializable(error) from None
            stream.answer(wire.ITEM, number, *encoded)
            stream.credit[number] = stream.credit.get(number, 0) - 1
            self.ahead.running = False  # while it waits, this thread reads itself
            while stream.credit[number] <= 0:
                self._read(_CREDIT_S)
                if stream.connection.fileno() < 0 or call.key in self.unwanted:
                    raise Interrupted
                self.ahead.give_back()
            self.ahead.running = True
            self.current = call.key
            if call.key in self.unwanted:
                raise Interrupted
        stream.credit.pop(number, None)


class _Unpickler(pickle.Unpickler):
    """Puts the values that a call has waited for in their places, and those that it was given by reference."""

    def __init__(self, head: Any, buffers: Any, inputs: list[Any], resolver: Resolver | None) -> None:
        super().__init__(io.BytesIO(head), buffers=buffers)
        self.inputs = inputs
        self.resolver = resolver

    def persistent_load(self, number: Any) -> Any:
        return self.inputs[number]

    def find_class(self, module: str, name: str) -> Any:
        if self.resolver is not None:
            from .objects import RESTORE

            if (module, name) == RESTORE:
                return self.resolver.value
        return super().find_class(module, name)


def main(folder: str, control: socket.socket, slot: Slot, *, ordered: bool) -> NoReturn:
    """Be a worker. Ends only with the process."""
    prepare_process()
    worker = Worker(folder, control, slot, ordered=ordered)
    signal.signal(signal.SIGINT, worker.on_interrupt)
    worker.run()
    raise SystemExit(0)
