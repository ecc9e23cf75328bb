"""Triggers that wait for the work of their map index, in three ways; the operators that start with them; a probe.

They differ in the trigger alone. Tasks begin in the triggerer (`start_from_trigger`): a thousand first legs on workers
would take longer than all the rest, and cost the same for each.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from airflow.providers.standard.triggers.file import FileTrigger
from airflow.sdk import BaseOperator, Context
from airflow.triggers.base import BaseTrigger, StartTriggerArgs, TriggerEvent

from flow_airflow import FlowTaskTrigger
from tests.benchmarks.airflow_parts.notes import folder, note, task_id

PROBE_EVERY_S = 0.02


class Waiting(BaseTrigger):
    """Notes when it begins to wait and when it fires; a subclass makes the trigger that waits."""

    system: ClassVar[str]

    def __init__(self, interval_s: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.interval_s = interval_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{__name__}.{type(self).__name__}", {"interval_s": self.interval_s}

    def trigger(self, index: int) -> Any:
        raise NotImplementedError

    async def run(self) -> AsyncIterator[TriggerEvent]:
        assert self.task_instance is not None
        index = self.task_instance.map_index
        assert index is not None
        self.inner = self.trigger(index)
        self.inner.task_instance = self.task_instance
        note(f"{self.system}-waiting", f"{index}")
        async for event in self.inner.run():
            note(f"{self.system}-fired", f"{index}")
            yield event

    async def on_kill(self) -> None:
        if hasattr(self, "inner"):
            await self.inner.on_kill()


class OnFlow(Waiting):
    """FlowTaskTrigger, with the task's output."""

    system = "flow"

    def trigger(self, index: int) -> FlowTaskTrigger:
        return FlowTaskTrigger(
            flow_task_id=task_id(index),
            provider="counted",
            log_offsets=[0],
            hold_s=0,
            poll_interval_s=self.interval_s,
        )


class OnFile(Waiting):
    """What FileSensor defers to: looks for a file of this machine."""

    system = "file"

    def trigger(self, index: int) -> FileTrigger:
        return FileTrigger(filepath=str(folder() / "files" / str(index)), poke_interval=self.interval_s)


class OnSSH(Waiting):
    """What SSHRemoteJobOperator defers to, with the remote job's output; its commands and logins are counted."""

    system = "ssh"
    requests: ClassVar[Counter[str]] = Counter()

    def trigger(self, index: int) -> Any:
        from airflow.providers.ssh.triggers.ssh_remote_job import SSHRemoteJobTrigger

        class Counted(SSHRemoteJobTrigger):  # type: ignore[misc]  # it is in one environment only
            async def _connect(self) -> Any:
                note("ssh-requests", "login")
                return await super()._connect()

            async def _run_command(self, *asked: Any) -> Any:
                note("ssh-requests", "command")
                return await super()._run_command(*asked)

        job = folder() / "jobs" / str(index)
        return Counted(
            ssh_conn_id="bench_ssh",
            remote_host=None,
            job_id=str(index),
            job_dir=str(job),
            log_file=str(job / "stdout.log"),
            exit_code_file=str(job / "exit_code"),
            remote_os="posix",
            poll_interval=int(self.interval_s),
        )


class LagProbe(BaseTrigger):
    """Measures, until it is cancelled, how late the triggerer's event loop wakes who sleeps on it."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{__name__}.{type(self).__name__}", {}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        for _ in itertools.count():
            lags, until = [], time.monotonic() + 1.0
            while (before := time.monotonic()) < until:
                await asyncio.sleep(PROBE_EVERY_S)
                lags.append(round((time.monotonic() - before - PROBE_EVERY_S) * 1000, 2))
            note("lags", " ".join(map(str, lags)))
        yield TriggerEvent(None)  # type: ignore[no-untyped-call]


def begin_with(trigger: type[BaseTrigger], **arguments: Any) -> StartTriggerArgs:
    return StartTriggerArgs(
        trigger_cls=f"{__name__}.{trigger.__name__}",
        trigger_kwargs=arguments,
        next_method="execute_complete",
        next_kwargs=None,
        timeout=None,
    )


class Waits(BaseOperator):
    """Waits for the work of its map index, and notes when it goes on."""

    start_from_trigger = True

    def __init__(self, *, system: str, number: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.system = system
        self.number = number

    def execute(self, context: Context) -> None:
        raise RuntimeError("it begins in the triggerer")

    def execute_complete(self, context: Context, event: Any = None) -> None:
        note(f"{self.system}-resumed", f"{context['ti'].map_index}")
