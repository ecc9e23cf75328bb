"""Waits for a task in the triggerer: shows its output, fires once when it has ended or its time is up."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from airflow.triggers.base import BaseTrigger, TriggerEvent

from flow_airflow.channel import shared_channel
from flow_airflow.compat import TRIGGERER_CALLS_ON_KILL
from flow_airflow.hooks import opener
from flow_airflow.logs import TaskLines, fitting
from flow_airflow.poller import Poller, ended, shared_poller, started
from flow_airflow.shown import offsets_shown, origin, worker_log

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from flow_airflow.logs import Line
    from flow_airflow.poller import Watch
    from flow_core import Flow

#: After so many lines others have their turn.
_LINES_AT_ONCE = 20

#: A task's end is not held up any longer by the lines that came before it.
_LAST_LINES_S = 1.0

#: A user's kill must reach the provider within this time.
_KILL_S = 30.0


class FlowEvent(TypedDict):
    """What the trigger tells the worker. Airflow keeps it in its database: it holds no result and no text."""

    flow_task_id: str
    outcome: Literal["ended", "deadline"]  # of the waiting
    log_offsets: list[int]


class FlowTaskTrigger(BaseTrigger):
    """Fires when a Flow task has ended, or at `deadline` (Unix time), when it also cancels the task.

    With `until="started"` it fires when the task runs, or has ended without that.

    Until then the task's output goes to the Airflow task's log, from `log_offsets` on; None leaves it out.
    The first event is held back for `hold_s`: Airflow fails a task whose trigger fires before the scheduler
    has seen the worker leave (apache/airflow#71580). With `cancel_on_kill` a user who marks or clears the
    deferred task ends the work too.

    All triggers of one provider and connection in a triggerer share one poll, and one reading of output, per
    `poll_interval_s`.
    """

    def __init__(  # noqa: PLR0913  # what is stored of it, one by one
        self,
        *,
        flow_task_id: str,
        provider: str | None = None,
        flow_conn_id: str | None = None,
        log_offsets: list[int] | None = None,
        deadline: float | None = None,
        hold_s: float = 10.0,
        poll_interval_s: float = 2.0,
        cancel_on_kill: bool = True,
        until: Literal["ended", "started"] = "ended",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Not `task_id`: the triggerer writes Airflow's own there.
        self.flow_task_id = flow_task_id
        self.provider = provider
        self.flow_conn_id = flow_conn_id
        self.log_offsets = log_offsets
        self.deadline = deadline
        self.hold_s = hold_s
        self.poll_interval_s = poll_interval_s
        self.cancel_on_kill = cancel_on_kill
        self.until = until
        #: Up to here each machine's output is in the log.
        self._shown = list(log_offsets or [])

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class path and the arguments with which another process makes this trigger again."""
        arguments = {
            "flow_task_id": self.flow_task_id,
            "provider": self.provider,
            "flow_conn_id": self.flow_conn_id,
            "log_offsets": self.log_offsets,
            "deadline": self.deadline,
            "hold_s": self.hold_s,
            "poll_interval_s": self.poll_interval_s,
            "cancel_on_kill": self.cancel_on_kill,
            "until": self.until,
        }
        return f"{__name__}.{type(self).__name__}", arguments

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield one event. What the log shows already, it does not get again: see `shown`."""
        held_until = time.monotonic() + self.hold_s
        try:
            event = await self._wait()
            await asyncio.sleep(max(0.0, held_until - time.monotonic()))
        except asyncio.CancelledError:
            if not TRIGGERER_CALLS_ON_KILL:
                await _to_the_end(asyncio.wait_for(self._cancel_if_ended_by_user(), _KILL_S))
            raise
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def on_kill(self) -> None:
        """Cancel the task: a user has marked or cleared the deferred Airflow task."""
        if self.cancel_on_kill:
            self.log.info("Cancelling Flow task %s.", self.flow_task_id)
            await self._poller().cancel(self.flow_task_id)

    # -- waiting

    def _poller(self) -> Poller:
        return shared_poller((self.provider, self.flow_conn_id), self._connect)

    def _connect(self) -> Flow:
        """Blocks: it may ask Airflow for the connection."""
        return opener(self.provider, self.flow_conn_id)()

    async def _wait(self) -> FlowEvent:
        poller, output = self._poller(), None if self.log_offsets is None else self._open_output
        outcome: Literal["ended", "deadline"] = "ended"
        until = started if self.until == "started" else ended
        async with poller.watch(
            self.flow_task_id, interval_s=self.poll_interval_s, until=until, output=output
        ) as watch:
            left = None if self.deadline is None else max(0.0, self.deadline - time.time())
            try:
                await asyncio.wait_for(self._follow(watch), left)
            except asyncio.TimeoutError:
                outcome = "deadline"
        if outcome == "deadline":
            self.log.error("The time is up: cancelling Flow task %s.", self.flow_task_id)
            await poller.cancel(self.flow_task_id)
        return FlowEvent(flow_task_id=self.flow_task_id, outcome=outcome, log_offsets=self._shown)

    async def _follow(self, watch: Watch) -> None:
        """Show the output until what is waited for has come."""
        arrived = False
        while not arrived:
            news = await watch.news()
            if news.trouble:
                self.log.warning("%s", news.trouble)
            if news.lines:
                await self._show_until_over(watch, news.lines)
            arrived = news.arrived is not None

    async def _show_until_over(self, watch: Watch, lines: Sequence[Line]) -> None:
        """Show lines, but once the task has ended only for a moment longer: the worker shows the rest."""
        showing = asyncio.ensure_future(self._show(lines))
        try:
            await asyncio.wait({showing, watch.over}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({showing}, timeout=_LAST_LINES_S)
        finally:
            showing.cancel()
        await asyncio.wait({showing})
        if not showing.cancelled():
            showing.result()

    async def _show(self, lines: Sequence[Line]) -> None:
        """Write lines to the log, as fast as Airflow takes them; several at once where it does not keep pace."""
        channel, begin = shared_channel(), 0
        while begin < len(lines):
            async with channel.turn() as crowded:
                block = fitting(lines, begin) if crowded else fitting(lines, begin)[:_LINES_AT_ONCE]
                for event in [block] if crowded else [[line] for line in block]:
                    text, last = "\n".join(line.text for line in event), event[-1]
                    self.log.info("%s", text, chan=origin(self.flow_task_id, last.node, last.offset))
                    self._shown[last.node] = last.offset
                begin += len(block)

    def _open_output(self) -> TaskLines:
        """Go on where the log ends. Blocks: it looks at files."""
        if self.task_instance is not None:
            self._shown = offsets_shown(worker_log(self.task_instance), self.flow_task_id, self._shown)
        return TaskLines(self._shown)

    async def _cancel_if_ended_by_user(self) -> None:
        """Before Airflow 3.3 a cancelled trigger finds out itself whether its task is still deferred."""
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
        from asgiref.sync import sync_to_async

        ti = self.task_instance
        if ti is None:
            return
        states = await sync_to_async(RuntimeTaskInstance.get_task_states)(
            dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
        )
        name = ti.task_id if ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
        # A cleared task is there and has no state; a run that is not there at all tells nothing.
        if states.get(ti.run_id, {}).get(name, "deferred") != "deferred":
            await self.on_kill()


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` however often we are cancelled meanwhile: Airflow 3.1 cancels a trigger more than once."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    task.result()
