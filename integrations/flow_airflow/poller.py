"""What happens to the tasks that triggers wait for: one question per tick to each provider, however many wait.

Asks, reads and hands out; never decides. A tick is two requests, for the statuses and for what was printed, made one
after the other in a thread of the poller's own; the event loop only passes on what they brought.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

from asgiref.sync import sync_to_async

from flow_core import LogPosition, TaskStatus
from flow_core.errors import FlowError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Hashable, Mapping, Sequence

    from flow_airflow.logs import Line, TaskLines
    from flow_core.models import LogChunk, Snapshot

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: While a provider is out of reach it is asked again after a growing delay, up to this one.
LONGEST_PAUSE_S = 60.0

#: So much output is read in one tick, for all who wait: to write it down takes the event loop's time.
OUTPUT_BYTES = 131_072

#: Where there is more, the next tick comes this soon.
BACKLOG_S = 0.5

#: Cancels that come within this time are one request: a failed DAG run ends all its deferred tasks at once.
GATHER_S = 0.05

#: Such a task has not printed anything new.
_SILENT = (TaskStatus.PENDING, TaskStatus.PROVISIONING)


class Backend(Protocol):
    """What the poller needs of a `flow_core.Flow`."""

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        """Return snapshots of exactly these tasks."""

    def read_logs(
        self, wanted: Sequence[LogPosition], *, limit: int = 65536
    ) -> Mapping[LogPosition, LogChunk]:
        """Return what has been printed since."""

    def cancel(self, task_ids: Collection[str]) -> None:
        """Ask tasks to stop."""


@dataclass(frozen=True)
class News:
    """What has happened to a task: further `lines`, what was waited for, or that nothing can be learnt now."""

    lines: Sequence[Line] = ()
    arrived: Snapshot | None = None
    trouble: str = ""


def ended(status: TaskStatus) -> bool:
    """Whether a task has ended, however."""
    return status.final


def started(status: TaskStatus) -> bool:
    """Whether a task runs, or has ended already."""
    return status is TaskStatus.RUNNING or status.final


class Watch:
    """A task that somebody waits for. `news` may be called by one at a time."""

    def __init__(
        self,
        task_id: str,
        interval_s: float,
        open_output: Callable[[], TaskLines] | None = None,
        until: Callable[[TaskStatus], bool] = ended,
    ) -> None:
        self.task_id = task_id
        self.interval_s = interval_s
        self.until = until
        #: Resolved once no further news will come.
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: Whether what was told so far has been dealt with: until then no more output is read.
        self.hungry = True
        self._open_output = open_output
        self._output: TaskLines | None = None
        self._box: asyncio.Queue[News | Exception] = asyncio.Queue()

    async def news(self) -> News:
        """Wait for something to happen. Raises an error that asking again cannot mend."""
        self.hungry = self._box.empty()
        told = await self._box.get()
        self.hungry = False
        if isinstance(told, Exception):
            raise told
        return told

    def tell(self, news: News | Exception, *, last: bool = False) -> None:
        """Have `news` return this, or raise it."""
        self._box.put_nowait(news)
        if last:
            self.over.set_result(None)

    def output(self) -> TaskLines | None:
        """Return what takes the task's output, None where it is not wanted; for the poller's thread."""
        if self._output is None and self._open_output is not None:
            self._output = self._open_output()
        return self._output


@dataclass
class _Look:
    """What one tick has brought."""

    seen: Mapping[str, Snapshot]
    lines: dict[Watch, list[Line]] = field(default_factory=dict)
    trouble: str = ""
    backlog: bool = False


@dataclass
class _Batch:
    """Tasks that are cancelled in one request."""

    task_ids: list[str] = field(default_factory=list)
    done: asyncio.Future[None] | None = None


class Poller:
    """Watches the tasks of one provider in one event loop, for as long as somebody waits for one of them."""

    def __init__(self, connect: Callable[[], Backend]) -> None:
        self._connect = connect
        self._backend: Backend | None = None
        self._connecting = asyncio.Lock()
        # One to ask, and one to cancel while a provider takes its time to answer.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="flow-poller")
        self._watches: dict[Watch, None] = {}
        self._asking: asyncio.Task[None] | None = None
        self._batch: _Batch | None = None
        self._trouble = ""

    @asynccontextmanager
    async def watch(
        self,
        task_id: str,
        *,
        interval_s: float,
        until: Callable[[TaskStatus], bool] = ended,
        output: Callable[[], TaskLines] | None = None,
    ) -> AsyncIterator[Watch]:
        """Yield a Watch, whose news are looked for every `interval_s`, or more often where another wants that.

        There are news until the task has a status for which `until` holds, as it does for every final one.
        `output` makes, in another thread, what takes the task's output; without it, that is not read.
        """
        watch = Watch(task_id, interval_s, output, until)
        self._watches[watch] = None
        if self._asking is None or self._asking.done():
            self._asking = _apart(self._ask_repeatedly())
        try:
            yield watch
        finally:
            del self._watches[watch]

    async def cancel(self, task_id: str) -> None:
        """Ask a task to stop, in one request with all that are to stop now. Raises FlowError."""
        if self._batch is None:
            self._batch = _Batch()
            self._batch.done = _apart(self._cancel(self._batch))
        batch = self._batch
        batch.task_ids.append(task_id)
        assert batch.done is not None
        await asyncio.shield(batch.done)

    async def _cancel(self, batch: _Batch) -> None:
        await asyncio.sleep(GATHER_S)
        self._batch = None
        backend = await self._connected()
        await self._in_thread(partial(backend.cancel, batch.task_ids))

    # -- asking

    async def _ask_repeatedly(self) -> None:
        outage_s = 0.0
        while watches := [watch for watch in self._watches if not watch.over.done()]:
            pause = min(watch.interval_s for watch in watches)
            try:
                backend = await self._connected()
                look = await self._in_thread(partial(_look, backend, watches))
            except Exception as error:  # noqa: BLE001  # the ones who wait decide what it means to them
                if not (isinstance(error, FlowError) and error.retryable):
                    self._end(watches, error)
                    continue
                pause = outage_s = min(max(pause, outage_s) * 2, LONGEST_PAUSE_S)
                self._tell_trouble(watches, error.message)
            else:
                outage_s = 0.0
                self._tell_trouble(watches, look.trouble)
                self._tell(watches, look)
                pause = min(pause, BACKLOG_S) if look.backlog else pause
            await asyncio.sleep(pause)

    # -- telling

    def _tell(self, watches: list[Watch], look: _Look) -> None:
        for watch in watches:
            seen = look.seen.get(watch.task_id)
            arrived = seen if seen is not None and watch.until(seen.status) else None
            lines = look.lines.get(watch, ())
            if lines or arrived:
                watch.tell(News(lines, arrived), last=arrived is not None)

    def _tell_trouble(self, watches: list[Watch], trouble: str) -> None:
        """Tell of an outage when it begins, and when it is over."""
        if bool(trouble) == bool(self._trouble):
            return
        self._trouble = trouble
        said = f"No answer at the moment, asking again: {trouble}" if trouble else "There is an answer again."
        logger.warning("%d tasks: %s", len(watches), said)
        for watch in watches:
            watch.tell(News(trouble=said))

    def _end(self, watches: list[Watch], error: Exception) -> None:
        for watch in watches:
            watch.tell(error, last=True)

    # -- blocking

    async def _connected(self) -> Backend:
        async with self._connecting:
            if self._backend is None:
                # Airflow 3.1 and 3.2 answer the question for a connection in such a thread alone.
                connect = sync_to_async(self._connect, thread_sensitive=False, executor=self._threads)
                self._backend = await connect()
        return self._backend

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _look(backend: Backend, watches: list[Watch]) -> _Look:
    """Ask for statuses and output. Blocks."""
    look = _Look(backend.poll(list({watch.task_id: None for watch in watches})))
    readers = {
        watch: output
        for watch in watches
        if watch.hungry
        and look.seen[watch.task_id].status not in _SILENT
        and (output := watch.output()) is not None
    }
    wanted = {
        LogPosition(watch.task_id, node, offset): None
        for watch, output in readers.items()
        for node, offset in output.wanted.items()
    }
    try:
        chunks = backend.read_logs(list(wanted), limit=OUTPUT_BYTES) if wanted else {}
    except FlowError as error:  # how a task has ended is known all the same
        look.trouble = f"the output is out of reach: {error.message}"
        return look
    for watch, output in readers.items():
        look.lines[watch] = output.take(
            {
                node: chunks[at]
                for node, offset in output.wanted.items()
                if (at := LogPosition(watch.task_id, node, offset)) in chunks
            }
        )
    look.backlog = sum(len(chunk.data) for chunk in chunks.values()) > OUTPUT_BYTES // 2
    return look


def _apart(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a task that is nobody's in particular: in a trigger's context it would write to that trigger's log."""
    task: asyncio.Task[None] = contextvars.Context().run(asyncio.ensure_future, work)
    task.add_done_callback(
        lambda done: done.cancelled() or done.exception()
    )  # looked at, so not reported as lost
    return task


#: A triggerer has one event loop; a test, or `dag.test()`, has one after the other.
_pollers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, Poller]] = WeakKeyDictionary()


def shared_poller(key: Hashable, connect: Callable[[], Backend]) -> Poller:
    """Return this loop's poller for `key`, a provider and how it is reached, made by `connect` for the first to ask."""
    pollers = _pollers.setdefault(asyncio.get_running_loop(), {})
    if key not in pollers:
        pollers[key] = Poller(connect)
    return pollers[key]
