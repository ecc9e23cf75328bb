"""Hearing of a local task's end at once: the kernel tells when a folder gets its exit record (Linux, inotify)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from flow_core.runner.light import libc

_IN_NONBLOCK, _IN_CLOEXEC, _IN_MOVED_TO = 0o4000, 0o2000000, 0x80

#: Each folder is a watch, and a user has not many; who waits for more tasks is in no such hurry.
_MOST_FOLDERS = 64


class FolderBell:
    """Rings when one of the folders gets its exit record, which is written under another name and then renamed."""

    _free = threading.Semaphore(8)  # a user has a hundred for all programs together

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def on(cls, folders: Iterable[Path]) -> FolderBell | None:
        """Listen to task folders; None where that cannot be done for all of them."""
        paths = [os.fsencode(folder) for folder in folders]
        if len(paths) > _MOST_FOLDERS or not cls._free.acquire(blocking=False):
            return None
        try:
            descriptor = libc("inotify_init1", _IN_NONBLOCK | _IN_CLOEXEC)
        except OSError:  # another system
            descriptor = -1
        if descriptor < 0:
            cls._free.release()
            return None
        bell = cls(descriptor)
        if any(libc("inotify_add_watch", descriptor, path, _IN_MOVED_TO) < 0 for path in paths):
            bell.close()
            return None
        return bell

    def fileno(self) -> int:
        return self._descriptor

    def heard(self) -> bool:
        try:
            return b"exit.json" in os.read(self._descriptor, 65536)
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._descriptor)
        self._free.release()
