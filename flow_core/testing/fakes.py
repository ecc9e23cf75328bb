"""A provider in memory and a clock that is moved by hand. No process, no file, no time of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from flow_core.errors import ResourceNotFoundError, TaskNotFoundError
from flow_core.ids import TaskId
from flow_core.models import Instance, LogChunk, Snapshot, TaskSpec, TaskStatus
from flow_core.providers.spi import Bell, Provider


class FakeClock:
    """A clock that stands still until somebody sleeps on it; then it jumps."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []
        self.on_sleep: Callable[[float], None] = lambda _now: None

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float, bell: Bell | None = None) -> bool:
        self.slept.append(seconds)
        self.time += seconds
        self.on_sleep(self.time)
        return bell is not None and bell.heard()


class FakeProvider(Provider):
    """A provider in memory: tasks change only when the test says so, and every call is counted."""

    name: ClassVar[str] = "fake"
    poll_interval_s: ClassVar[float] = 1.0

    def __init__(self) -> None:
        self.tasks: dict[str, Snapshot] = {}
        self.logs: dict[str, bytes] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.specs: dict[str, TaskSpec] = {}
        self.calls: list[tuple[str, tuple[str, ...]]] = []
        self.trouble: list[Exception] = []

    def set(self, task_id: str, status: TaskStatus, **fields: Any) -> None:
        """Move a task to a status."""
        self.tasks[task_id] = replace(self.tasks[task_id], status=status, **fields)

    def _count(self, verb: str, ids: Collection[str]) -> None:
        self.calls.append((verb, tuple(ids)))
        if self.trouble:
            raise self.trouble.pop(0)

    def submit(self, spec: TaskSpec, *, task_id: str) -> None:
        self._count("submit", [task_id])
        if task_id not in self.tasks:
            self.specs[task_id] = spec
            self.tasks[task_id] = Snapshot(
                task_id=task_id, name=spec.name, status=TaskStatus.PENDING, labels=spec.labels
            )

    def find(self, digest: str) -> str | None:
        mine = [TaskId.parse(one) for one in self.tasks if TaskId.parse(one).digest == digest]
        return str(max(mine, key=lambda one: one.attempt)) if mine else None

    def list(self, *, limit: int) -> Sequence[str]:
        return list(reversed(self.tasks))[:limit]

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        self._count("poll", task_ids)
        lost = TaskStatus.LOST
        return {
            one: self.tasks.get(one) or Snapshot(task_id=one, name="", status=lost, reason="lost")
            for one in task_ids
        }

    def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
        if task_id not in self.tasks or node != 0:
            raise TaskNotFoundError(f"no task {task_id} with a node {node}")
        data = self.logs.get(task_id, b"")
        start = max(0, len(data) + offset) if offset < 0 else offset
        piece = data[start : start + limit]
        ended = self.tasks[task_id].status.final
        return LogChunk(
            data=piece, next_offset=start + len(piece), end=ended and start + len(piece) >= len(data)
        )

    def cancel(self, task_ids: Collection[str]) -> None:
        self._count("cancel", task_ids)
        for one in task_ids:
            if one in self.tasks and not self.tasks[one].status.final:
                self.set(one, TaskStatus.CANCELLED, reason="cancelled")

    def fetch(self, task_id: str, path: str, into: Path) -> None:
        if (task_id, path) not in self.files:
            raise ResourceNotFoundError(f"no file {path}")
        into.write_bytes(self.files[task_id, path])

    def release(self, task_ids: Collection[str]) -> None:
        self._count("release", task_ids)
        for one in task_ids:
            if one in self.tasks and self.tasks[one].status.final:
                self.set(one, self.tasks[one].status, reason="released")

    def find_instances(self) -> Sequence[Instance]:
        return []
