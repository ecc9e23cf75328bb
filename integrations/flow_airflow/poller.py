"""One question per tick to each provider, however many triggers wait in this process. Asks; never decides."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from flow_core.errors import FlowError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Hashable, Mapping

    from flow_core.models import Snapshot

logger = logging.getLogger(__name__)

#: While a provider is out of reach it is asked again after a growing delay, up to this one.
LONGEST_PAUSE_S = 60.0


class Watch(NamedTuple):
    """A task that somebody waits for: `ended` resolves to its final snapshot."""

    ended: asyncio.Future[Snapshot]
    watchers: int


class Poller:
    """Watches the tasks of one provider in one event loop, for as long as somebody waits for one of them."""

    def __init__(self, poll: Callable[[Collection[str]], Mapping[str, Snapshot]], interval_s: float) -> None:
        self._poll = poll
        self._interval_s = interval_s
        self._watches: dict[str, Watch] = {}
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def watch(self, task_id: str) -> AsyncIterator[asyncio.Future[Snapshot]]:
        """Yield a future: the snapshot of the ended task, or an error that asking again cannot mend."""
        known = self._watches.get(task_id)
        if known is None or known.ended.done():
            known = Watch(asyncio.get_running_loop().create_future(), known.watchers if known else 0)
        self._watches[task_id] = known._replace(watchers=known.watchers + 1)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._ask_repeatedly(), name="flow-poller")
        try:
            yield known.ended
        finally:
            left = self._watches[task_id]
            if left.watchers > 1:
                self._watches[task_id] = left._replace(watchers=left.watchers - 1)
            else:
                del self._watches[task_id]
                if left.ended.done() and not left.ended.cancelled():
                    left.ended.exception()  # looked at, so that asyncio does not report it as lost

    async def _ask_repeatedly(self) -> None:
        pause = self._interval_s
        while waiting := [task_id for task_id, watch in self._watches.items() if not watch.ended.done()]:
            try:
                answer = await asyncio.to_thread(self._poll, waiting)
            except FlowError as error:
                if not error.retryable:
                    self._fail(waiting, error)
                    continue
                pause = min(pause * 2, LONGEST_PAUSE_S)
                logger.warning(
                    "No answer about %d tasks, asking again in %.0f s: %s", len(waiting), pause, error.message
                )
            except Exception as error:  # noqa: BLE001  # the ones who wait decide what it means to them
                self._fail(waiting, error)
                continue
            else:
                pause = self._interval_s
                self._report(answer)
            await asyncio.sleep(pause)

    def _report(self, answer: Mapping[str, Snapshot]) -> None:
        for task_id, snapshot in answer.items():
            watch = self._watches.get(task_id)
            if snapshot.status.final and watch is not None and not watch.ended.done():
                watch.ended.set_result(snapshot)

    def _fail(self, task_ids: list[str], error: Exception) -> None:
        for task_id in task_ids:
            watch = self._watches.get(task_id)
            if watch is not None and not watch.ended.done():
                watch.ended.set_exception(error)


#: A triggerer has one event loop; a test, or `dag.test()`, has one after the other.
_pollers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Hashable, float], Poller]] = (
    WeakKeyDictionary()
)


def shared_poller(
    key: Hashable, interval_s: float, poll: Callable[[Collection[str]], Mapping[str, Snapshot]]
) -> Poller:
    """Return this loop's poller for `key` (a provider and how it is reached), made with `poll` if it is the first."""
    pollers = _pollers.setdefault(asyncio.get_running_loop(), {})
    return pollers.setdefault((key, interval_s), Poller(poll, interval_s))
