"""Waits for a task in the triggerer: shows its output, fires once when it has ended or its time is up."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from airflow.triggers.base import BaseTrigger, TriggerEvent

from flow_airflow.compat import TRIGGERER_CALLS_ON_KILL
from flow_airflow.logs import TaskLog
from flow_airflow.poller import shared_poller
from flow_core.errors import FlowError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from flow_core import Flow
    from flow_core.models import Snapshot

#: Between two looks at the output; a quiet task is looked at less and less often.
SHORTEST_LOOK_S, LONGEST_LOOK_S = 1.0, 10.0


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

    All triggers of one provider in a triggerer share one poll per `poll_interval_s`.
    """

    def __init__(
        self,
        *,
        flow_task_id: str,
        provider: str | None = None,
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
            if not TRIGGERER_CALLS_ON_KILL and await self._ended_by_user():
                await self.on_kill()
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
        task = await asyncio.to_thread(flow.get_task, self.flow_task_id)
        log = None if self.log_offsets is None else TaskLog(task, offsets=self.log_offsets)
        poller = shared_poller(self.provider, self.poll_interval_s, flow.poll)
        async with poller.watch(self.flow_task_id) as ended:
            outcome = await self._watch(ended, log)
        if outcome == "deadline":
            self.log.error("The time is up: cancelling Flow task %s.", self.flow_task_id)
            await asyncio.to_thread(flow.cancel, [self.flow_task_id])
        return FlowEvent(
            flow_task_id=self.flow_task_id, outcome=outcome, log_offsets=[] if log is None else log.offsets
        )

    async def _watch(
        self, ended: asyncio.Future[Snapshot], log: TaskLog | None
    ) -> Literal["ended", "deadline"]:
        pause = SHORTEST_LOOK_S
        while not ended.done():
            seen = await self._show(log)
            pause = SHORTEST_LOOK_S if seen else min(pause * 1.5, LONGEST_LOOK_S)
            left = float("inf") if self.deadline is None else self.deadline - time.time()
            if left <= 0:
                return "deadline"
            await asyncio.wait({ended}, timeout=min(pause, left))
        ended.result()  # raises what the poller could not mend
        await self._show(log)
        return "ended"

    async def _show(self, log: TaskLog | None) -> int:
        """Emit the output so far; return the number of lines. What is out of reach is tried again later."""
        count = 0
        while log is not None and not log.ended:
            try:
                lines = await asyncio.to_thread(log.read)
            except FlowError as error:
                if not error.retryable:
                    raise
                self.log.warning("The output is out of reach at the moment: %s", error.message)
                break
            for line in lines:
                self.log.info("%s", line)
            count += len(lines)
            if log.caught_up:
                break
        return count

    def _connect(self) -> Flow:
        from flow_core import Flow

        return Flow(provider=self.provider)

    async def _ended_by_user(self) -> bool:
        """Before Airflow 3.3 a cancelled trigger finds out itself whether its task is still deferred."""
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
        from asgiref.sync import sync_to_async

        ti = self.task_instance
        if ti is None:
            return False
        states = await sync_to_async(RuntimeTaskInstance.get_task_states)(
            dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
        )
        name = ti.task_id if ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
        # A cleared task is there and has no state; a run that is not there at all tells nothing.
        return bool(states.get(ti.run_id, {}).get(name, "deferred") != "deferred")
