"""Future: the outcome of one call that runs elsewhere.

One class for all dialects. A future is made by what runs calls (`flow_core.dispatch`), which also completes it; this
module owns how people wait, and knows nothing of workers or wires.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from flow_core.errors import CallCancelledError, TimeoutError

if TYPE_CHECKING:
    from flow_core.object_ref import ObjectRef
    from flow_core.runner.parcels import Parcel

log = logging.getLogger("flow_core")

#: Where a call is: waiting for its inputs or a worker; sent to one; ended.
QUEUED, SENT, DONE, FAILED = range(4)
_NONE: list[Callable[[Any], object]] = []
_STATUS = ("queued", "running", "done", "failed")


class Runs(Protocol):
    """What a future needs of whatever runs its call."""

    task_id: str

    @property
    def lock(self) -> AbstractContextManager[Any, Any]:
        """Held while the future changes; who holds it may take it again."""

    def drive(self, future: Future, deadline: float | None) -> None:
        """Block until the future has ended, or until the deadline (`time.monotonic()`) is over."""

    def cancel(self, future: Future) -> bool:
        """See `Future.cancel`."""

    def keep(self, future: Future) -> str:
        """See `Future.id`."""

    def let_stay(self, future: Future) -> None:
        """Have a large value stay where it is made, if it has not been made yet and workers there can read it."""

    def refer(self, future: Future, timeout: float | None) -> ObjectRef:
        """Return the reference to the value of a call that has succeeded and is kept. Raises TimeoutError."""

    def logs(self, future: Future) -> str:
        """See `Future.logs`."""

    def decode(self, future: Future, parcel: Parcel) -> Any:
        """Return the value of a parcel that has arrived for the call."""


class Writing(threading.local):
    """Whether this thread is just writing arguments, where a future stands for the value to come."""

    arguments = False


writing = Writing()


class HoldsFutures(Exception):
    """There is a future among the values that are being pickled."""


class Future:
    """The outcome of a call. Equal only to itself; pickled, it travels by its id."""

    __slots__ = (
        "__weakref__",
        "attempts",
        "body",
        "callbacks",
        "cancelled",
        "count",
        "definition",
        "error",
        "kept",
        "load",
        "log_range",
        "number",
        "options",
        "outcome",
        "parcel",
        "runs",
        "state",
        "stays",
        "waiters",
        "worker",
    )

    def __init__(self, runs: Runs, definition: Any = None, options: Any = None) -> None:
        self.runs = runs
        self.definition = definition
        self.options = options
        self.number = 0
        self.count = 1
        self.body: Any = None
        self.load = 0.0
        self.state = QUEUED
        self.error: BaseException | None = None
        self.parcel: Parcel | None = None
        self.outcome: tuple[Any] | None = None
        self.callbacks: list[Callable[[Any], object]] | None = None
        self.waiters: list[Any] | None = None
        self.worker: Any = None
        self.log_range: tuple[str, int, int, int] | None = None
        self.attempts = 0
        self.cancelled = False
        self.kept = False
        self.stays = False  # whether a large value is to stay where it is made

    # -- the value

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the call and return its value, the same object every time.

        Raises RemoteExecutionError, also an instance of the function's own exception class, when the function raised;
        WorkerDiedError when its worker was lost; CallTimeoutError, CallCancelledError or SessionClosedError when it was
        ended; TimeoutError after `timeout` seconds, and then the call goes on.
        """
        if self.state < DONE:
            self._wait(timeout)
        if self.error is not None:
            raise self.error
        parcel = self.parcel
        if parcel is not None:  # several threads may read it at once, and get the same
            outcome = (self.runs.decode(self, parcel),)
            with self.runs.lock:
                if self.outcome is None:
                    self.outcome, self.parcel = outcome, None
        assert self.outcome is not None
        return self.outcome[0]

    def get(self, timeout: float | None = None) -> Any:
        """The same as `result`."""
        return self.result(timeout)

    def get_result(self, timeout: float | None = None) -> Any:
        """The same as `result`."""
        return self.result(timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the call to succeed, and leave its value where it is. Raises what `result` raises."""
        if self.state < DONE:
            self._wait(timeout)
        if self.error is not None:
            raise self.error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the call and return what `result` would raise, None where it would return. Raises TimeoutError."""
        if self.state < DONE:
            self._wait(timeout)
        return self.error

    def _wait(self, timeout: float | None) -> None:
        self.runs.drive(self, None if timeout is None else time.monotonic() + timeout)
        if self.state < DONE:
            raise TimeoutError(
                f"waited {timeout:g} s and the call {self.name!r} is {self.status}",
                suggestions=["The call goes on: wait again, or stop it with cancel()."],
            )

    # -- without waiting

    @property
    def name(self) -> str:
        """The name of the function."""
        return getattr(self.definition, "name", "call")

    def done(self) -> bool:
        """Whether the call has ended, however it ended."""
        return self.state >= DONE

    @property
    def status(self) -> str:
        """`queued`, `running` (sent to a worker), `done`, `failed` or `cancelled`."""
        return "cancelled" if isinstance(self.error, CallCancelledError) else _STATUS[self.state]

    @property
    def task_id(self) -> str:
        """The task that the call runs in: that of its session."""
        return self.runs.task_id

    @property
    def id(self) -> str:
        """The name under which any process can get at the outcome: see `from_id`. Short, and plain text.

        Whoever reads it wants the outcome kept: from then on it is written to the task's folder when it is there.
        """
        return self.runs.keep(self)

    @property
    def call_id(self) -> str:
        """The same as `id`."""
        return self.id

    @classmethod
    def from_id(cls, call_id: str, **settings: Any) -> Future:
        """Return the future of a call that some process with the same settings has made and whose `id` it has read.

        `serialization="pickle"` says that you trust the call's result and want it unpickled. Raises TaskNotFoundError.
        """
        from flow_core.kept import future_of

        return future_of(call_id, **settings)

    def ref(self) -> Future:
        """Return the future itself, which is the reference to its value: pass it on instead of the value."""
        return self

    def object_ref(self, timeout: float | None = None) -> ObjectRef:
        """Wait for the call and return a reference to its value that outlives its session and fits into an XCom.

        The value is written to the task's folder, where it stays until the task is released; any later call gets it in
        place of the reference. Asked for while the call runs, its worker writes it. Raises what `result` raises.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.runs.let_stay(self)
        self.runs.keep(self)
        self.wait(timeout)
        return self.runs.refer(self, time_left(deadline))

    def cancel(self) -> bool:
        """Ask the call to stop; return False when it had ended already.

        One that waits will not start. One that runs is interrupted, as by Ctrl-C, and if it goes on its worker is
        killed; it ends as CallCancelledError unless it was faster.
        """
        return self.state < DONE and self.runs.cancel(self)

    def logs(self) -> str:
        """Return what the call has printed. For a call that runs: so far."""
        return self.runs.logs(self)

    def add_done_callback(self, function: Callable[[Future], object]) -> None:
        """Call `function(self)` once the call has ended, in whatever thread notices; at once if it has ended.

        What it raises is logged. Those that were added first are called first.
        """
        if not self.runs_later(function):
            _call_back(function, self)

    def runs_later(self, function: Callable[[Future], object]) -> bool:
        """Add a callback unless the call has ended. Return whether it will be called."""
        with self.runs.lock:
            if self.state >= DONE:
                return False
            if self.callbacks is None:
                self.callbacks = []
            self.callbacks.append(function)
            return True

    def __await__(self) -> Generator[Any, None, Any]:
        if self.state < DONE:
            yield from self._ended().__await__()
        return self.result()

    async def _ended(self) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def tell(_: Future) -> None:
            with contextlib.suppress(RuntimeError):  # nobody waits any more: the loop is closed
                loop.call_soon_threadsafe(ended.set)

        if self.runs_later(tell):
            await ended.wait()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.name!r}: {self.status}>"

    def __reduce__(self) -> tuple[Any, ...]:
        if writing.arguments:
            raise HoldsFutures
        return _from_id, (self.id,)


def _from_id(call_id: str) -> Future:
    return Future.from_id(call_id)


def ending(future: Future, state: int) -> list[Callable[[Future], object]]:
    """Give a future its final state; return the callbacks that are due. Who waits for it is woken. Under the lock."""
    future.state = state
    if future.waiters is not None:
        wake(future)
    if future.callbacks is None:
        return _NONE
    callbacks, future.callbacks = future.callbacks, None
    return callbacks


class Sleeper(Protocol):
    """A thread that waits for a future, and can be woken."""

    def wake(self) -> None:
        """Let it go on; more than once is fine."""


def follow(future: Future, waiter: Sleeper) -> bool:
    """Have `waiter` woken when the future ends, or has another value; return False when it has ended."""
    with future.runs.lock:
        if future.state >= DONE:
            return False
        if future.waiters is None:
            future.waiters = []
        future.waiters.append(waiter)
        return True


def wake(future: Future) -> None:
    """Wake all who wait for a future; who waits on will follow again. Under the lock."""
    waiters, future.waiters = future.waiters, None
    for waiter in waiters or ():
        waiter.wake()


def _call_back(function: Callable[[Future], object], future: Future) -> None:
    try:
        function(future)
    except Exception:
        log.exception("a callback of %r failed", future)


def call_back(due: Iterable[tuple[Callable[[Future], object], Future]]) -> None:
    """Run callbacks; what they raise is logged, but for what ends a program, which is raised when all have run."""
    left = iter(due)
    try:
        for function, future in left:
            _call_back(function, future)
    except BaseException:
        call_back(left)
        raise


def time_left(deadline: float | None) -> float | None:
    """Return the seconds until a deadline (`time.monotonic()`), None where there is none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
