"""Warm sessions on this machine: the supervisor's socket lies in the task's folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from flow_core.errors import ProviderUnavailable
from flow_core.providers import folder as folders
from flow_core.runner.door import DOOR

#: A socket's path may have 107 bytes on Linux, 103 on macOS.
_PATH_LIMIT = 100


class LocalSessions:
    """Connects to sessions whose folder this machine sees."""

    shares_memory = True

    def __init__(self, tasks: Path) -> None:
        self.tasks = tasks

    def connect(self, task_id: str) -> socket.socket:
        folder = folders.place(self.tasks, task_id)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(connection, folder)
        except OSError as error:
            connection.close()
            raise ProviderUnavailable(f"session {task_id} does not listen: {error.strerror}") from error
        return connection

    @staticmethod
    def _connect(connection: socket.socket, folder: Path) -> None:
        path = str(folder / DOOR)
        if len(os.fsencode(path)) <= _PATH_LIMIT:
            connection.connect(path)
            return
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{here}/{DOOR}")
        finally:
            os.close(here)
