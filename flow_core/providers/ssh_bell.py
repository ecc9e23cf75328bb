"""Hearing of the end of tasks on hosts at once: each host's agent tells when one of its tasks ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

from flow_core.errors import ProviderUnavailable
from flow_core.providers.ssh_hosts import Host
from flow_core.runner.agent import Answer

#: Long tasks are asked about at intervals; nobody minds the difference (seconds).
_PATIENCE_S = 60.0

#: An agent answers so many of these questions at once; who waits for more tasks is in no such hurry.
_MOST_TASKS = 64


class HostsBell:
    """Rings when a task on one of the hosts ends."""

    def __init__(self) -> None:
        self._ears, self._rope = os.pipe()
        os.set_blocking(self._ears, False)
        self._lock = threading.Lock()
        self._open = True

    @classmethod
    def on(cls, wanted: Mapping[Host, Sequence[str]]) -> HostsBell | None:
        """Listen to tasks; None where their hosts are not connected, or where they are too many."""
        if sum(map(len, wanted.values())) > _MOST_TASKS or not all(
            host.transport.connected for host in wanted
        ):
            return None
        bell = cls()
        try:
            for host, task_ids in wanted.items():
                args = {"home": host.home, "task_ids": [*task_ids], "patience_s": _PATIENCE_S}
                host.transport.client.ask("await_end", args, bell._ring)
        except ProviderUnavailable:
            bell.close()
            return None
        return bell

    def _ring(self, answer: Answer | None) -> None:
        with self._lock:
            if self._open and answer is not None and answer.value:
                os.write(self._rope, b".")

    def fileno(self) -> int:
        """See Bell."""
        return self._ears

    def heard(self) -> bool:
        """See Bell."""
        try:
            return bool(os.read(self._ears, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """See Bell."""
        with self._lock:
            self._open = False
            for end in (self._ears, self._rope):
                os.close(end)
