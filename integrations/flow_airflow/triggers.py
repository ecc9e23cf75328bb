"""Waits for a task in the triggerer: shows its output, fires once when it has ended or its time is up."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from airflow.triggers.base import BaseTrigger, TriggerEvent

from flow_airflow.compat import TRIGGERER_CALLS_ON_KILL
from flow_airflow.hooks import opener
from flow_airflow.logs import TaskLog
from flow_airflow.poller import shared_poller
from flow_core.errors import FlowError, ResourceNotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from flow_core import Flow
    from flow_core.models import Snapshot

#: Between two looks at the output; a quiet task is looked at less and less often.
SHORTEST_LOOK_S, LONGEST_LOOK_S = 1.0, 10.0


#: A user's kill must reach the provider within this time.
_KILL_S = 30.0


class FlowEvent(TypedDict):
    """What the trigger tells the worker. Airflow keeps it in its database: it holds no result and no text."""

    flow_task_id: str
    outcome: Literal["ended", "deadline"]
    log_offsets: list[int]


class FlowTaskTrigger(BaseTrigger):
    """Fires when a Flow task has ended, or at `deadline` (Unix time), when it also cancels the task.

    Until then the task's output goes to the Airflow task's log, from `log_offsets` on; None leaves it out.
    The first event is held back for `hold_s`: Airflow fails a task whose trigger fires before the scheduler
    has seen the worker leave (apache/airflow#71580). With `cancel_on_kill` a user who marks or clears the
    deferred task ends the work too.

    All triggers of one provider and connection in a triggerer share one poll per `poll_interval_s`.
    """

    def __init__(
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
        }
        return f"{__name__}.{type(self).__name__}", arguments

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield one event. After a triggerer's restart the output since the deferral is shown again."""
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
            flow = await asyncio.to_thread(self._connect)
            await asyncio.to_thread(flow.cancel, [self.flow_task_id])

    async def _wait(self) -> FlowEvent:
        flow = await asyncio.to_thread(self._connect)
        output = None if self.log_offsets is None else _Output(flow, self.flow_task_id, self.log_offsets)
        poller = shared_poller((self.provider, self.flow_conn_id), self.poll_interval_s, flow.poll)
        async with poller.watch(self.flow_task_id) as ended:
            outcome = await self._watch(ended, output)
        if outcome == "deadline":
            self.log.error("The time is up: cancelling Flow task %s.", self.flow_task_id)
            await asyncio.to_thread(flow.cancel, [self.flow_task_id])
        offsets = output.offsets if output is not None else []
        return FlowEvent(flow_task_id=self.flow_task_id, outcome=outcome, log_offsets=offsets)

    async def _watch(
        self, ended: asyncio.Future[Snapshot], output: _Output | None
    ) -> Literal["ended", "deadline"]:
        pause = SHORTEST_LOOK_S
        while not ended.done():
            news = await self._show(output)
            pause = SHORTEST_LOOK_S if news else min(pause * 1.5, LONGEST_LOOK_S)
            left = float("inf") if self.deadline is None else self.deadline - time.time()
            if left <= 0:
                return "deadline"
            await asyncio.wait({ended}, timeout=min(pause, left))
        ended.result()  # raises what the poller could not mend
        await self._show(output)
        return "ended"

    async def _show(self, output: _Output | None) -> bool:
        """Emit the output so far; return whether there was any. What is out of reach is tried again later."""
        news = False
        while output is not None:
            try:
                lines, more = await asyncio.to_thread(output.read)
            except ResourceNotFoundError:  # what became of the task is for the poller to say
                break
            except FlowError as error:
                if not error.retryable:
                    raise
                self.log.warning("The output is out of reach at the moment: %s", error.message)
                break
            for line in lines:
                self.log.info("%s", line)
            news = news or bool(lines)
            if not more:
                break
        return news

    def _connect(self) -> Flow:
        """Blocks: it may ask Airflow for the connection."""
        return opener(self.provider, self.flow_conn_id)()

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


class _Output:
    """A task's output, looked up when it is first read, and again until that works."""

    def __init__(self, flow: Flow, task_id: str, offsets: list[int]) -> None:
        self._flow = flow
        self._task_id = task_id
        self._log: TaskLog | None = None
        self._offsets = offsets

    def read(self) -> tuple[list[str], bool]:
        """Return further lines, and whether reading on at once is worth while. Blocks."""
        if self._log is None:
            self._log = TaskLog(self._flow.get_task(self._task_id), offsets=self._offsets)
        lines = self._log.read()
        return lines, not self._log.caught_up

    @property
    def offsets(self) -> list[int]:
        return self._offsets if self._log is None else self._log.offsets
