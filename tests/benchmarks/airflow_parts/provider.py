"""A back end that costs next to nothing and counts what it is asked, behind a real socket; and the provider for it.

It stands for an API that holds tasks. What is measured with it is thus the triggerer's side: how often it asks, what
that costs it. Each task prints a line of 64 bytes every 30 seconds, and runs until the benchmark ends it.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from flow_core.errors import ProviderError, ProviderUnavailable, TaskNotFoundError
from flow_core.models import Instance, LogChunk, LogPosition, Snapshot, TaskSpec, TaskStatus
from flow_core.providers.spi import Provider
from tests.benchmarks.airflow_parts.notes import SERVER, task_id

LINE_BYTES, LINE_EVERY_S = 64, 30.0


class BackEnd(socketserver.ThreadingTCPServer):
    """Holds tasks. One request is a line of JSON, and so is its answer."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, count: int) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.started = time.time()
        self.phase = {task_id(index): LINE_EVERY_S * index / count for index in range(count)}
        self.ended: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"{host!s}:{port}"

    def answer(self, verb: str, asked: Any) -> Any:
        self.requests[verb] += 1
        if verb == "cancel":
            for one in asked:
                self.ended.setdefault(one, "cancelled")
        elif verb == "poll":
            return {one: self.ended.get(one, "running") for one in asked if one in self.phase}
        elif verb == "read_logs":
            return [self._news(one, offset) for one, offset in asked]
        return None

    def _news(self, one: str, offset: int) -> list[Any]:
        size = LINE_BYTES * int((time.time() - self.started + self.phase[one]) / LINE_EVERY_S)
        return [max(0, size - offset), one in self.ended]


class Connection(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, BackEnd)
        for line in self.rfile:
            self.wfile.write(json.dumps(self.server.answer(*json.loads(line))).encode() + b"\n")


class CountedProvider(Provider):
    """Asks the back end. It starts nothing: the tasks are there."""

    name: ClassVar[str] = "counted"
    poll_interval_s: ClassVar[float] = 1.0

    def __init__(self, settings: object) -> None:
        self._lock = threading.Lock()
        self._stream: Any = None

    def _ask(self, verb: str, asked: Any) -> Any:
        with self._lock:
            try:
                if self._stream is None:
                    host, _, port = os.environ[SERVER].partition(":")
                    self._stream = socket.create_connection((host, int(port)), timeout=10).makefile("rwb")
                self._stream.write(json.dumps([verb, asked]).encode() + b"\n")
                self._stream.flush()
                return json.loads(self._stream.readline())
            except (OSError, ValueError) as error:
                self._stream = None
                raise ProviderUnavailable(f"the back end does not answer: {error}") from error

    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        said = self._ask("poll", [*task_ids])
        return {one: Snapshot(one, "bench", TaskStatus(said.get(one, "lost"))) for one in task_ids}

    def read_logs(
        self, wanted: Sequence[LogPosition], *, limit: int = 65536
    ) -> Mapping[LogPosition, LogChunk]:
        answer = self._ask("read_logs", [(at.task_id, at.offset) for at in wanted])
        chunks = {}
        for at, (size, end) in zip(wanted, answer, strict=True):
            data = (b"step, loss and whatever else a training says of itself".ljust(LINE_BYTES - 1) + b"\n")[
                at.offset % LINE_BYTES :
            ].ljust(size, b"\n")[:size]
            chunks[at] = LogChunk(data, at.offset + size, end=end)
        return chunks

    def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
        at = LogPosition(task_id, node, offset)
        return self.read_logs([at], limit=limit)[at]

    def cancel(self, task_ids: Collection[str]) -> None:
        self._ask("cancel", [*task_ids])

    def submit(self, spec: TaskSpec, *, task_id: str) -> None:
        raise ProviderError("nothing can be submitted here")

    def find(self, digest: str) -> str | None:
        return None

    def list(self, *, limit: int) -> Sequence[str]:
        return []

    def fetch(self, task_id: str, path: str, into: Path) -> None:
        raise TaskNotFoundError("there are no files here")

    def release(self, task_ids: Collection[str]) -> None:
        """There is nothing to free."""

    def find_instances(self) -> Sequence[Instance]:
        return []


def install(folder: Path) -> None:
    """Make a distribution in a folder of the import path that offers the provider by entry point."""
    about = folder / "flow_bench_counted-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: flow-bench-counted\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        f"[flow_core.providers]\ncounted = {__name__}:{CountedProvider.__name__}\n"
    )
