"""Hearing of a task's end at once: the kernel tells when a folder gets its exit record (Linux, inotify).

Standard library only, Python 3.8+.
"""

from __future__ import annotations

import os
import select
import threading
import time

from . import machine
from .light import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import ClassVar

_IN_NONBLOCK, _IN_CLOEXEC, _IN_MOVED_TO = 0o4000, 0o2000000, 0x80

#: Each folder is a watch, and a user has not many; who waits for more tasks is in no such hurry.
_MOST_FOLDERS = 64


class FolderBell:
    """Rings when one of the folders gets its exit record, which is written under another name and then renamed."""

    _free = threading.Semaphore(8)  # a user has a hundred for all programs together

    #: One that is kept: the kernel takes ten milliseconds and more to close one.
    _spare: ClassVar[list[int]] = []

    def __init__(self, descriptor: int, watches: list[int]) -> None:
        self._descriptor = descriptor
        self._watches = watches

    @classmethod
    def on(cls, folders: Iterable[str | os.PathLike[str]]) -> FolderBell | None:
        """Listen to task folders; None where that cannot be done for all of them."""
        paths = [os.fsencode(folder) for folder in folders]
        if len(paths) > _MOST_FOLDERS or not cls._free.acquire(blocking=False):
            return None
        descriptor = cls._opened()
        if descriptor < 0:
            cls._free.release()
            return None
        watches = [libc("inotify_add_watch", descriptor, path, _IN_MOVED_TO) for path in paths]
        bell = cls(descriptor, watches)
        if any(watch < 0 for watch in watches):
            bell.close()
            return None
        return bell

    @classmethod
    def _opened(cls) -> int:
        try:
            return cls._spare.pop()
        except IndexError:
            pass
        try:
            return libc("inotify_init1", _IN_NONBLOCK | _IN_CLOEXEC)
        except OSError:  # another system
            return -1

    @classmethod
    def in_child(cls) -> None:
        """Leave the spare one to the process that this one was forked from."""
        while cls._spare:
            os.close(cls._spare.pop())

    def fileno(self) -> int:
        """Return what can be read when there is something to hear."""
        return self._descriptor

    def heard(self) -> bool:
        """Take in what there is to hear; return whether a task has ended."""
        return b"exit.json" in self._news()

    def _news(self) -> bytes:
        try:
            return os.read(self._descriptor, 65536)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Hear no more."""
        for watch in self._watches:
            libc("inotify_rm_watch", self._descriptor, watch)
        while self._news():  # also of the watches' own end
            pass
        if self._spare:
            os.close(self._descriptor)
        else:
            self._spare.append(self._descriptor)
        self._free.release()


os.register_at_fork(after_in_child=FolderBell.in_child)


def await_end(home: str, task_ids: list[str], patience_s: float) -> bool:
    """Return when one of these tasks has ended, or after `patience_s`: whether it is worth while to ask."""
    folders = [machine.place(home, task_id) for task_id in task_ids]
    bell = FolderBell.on(folders)
    if bell is None:
        return False
    try:
        if any(os.path.exists(os.path.join(folder, "exit.json")) for folder in folders):
            return True
        end = time.monotonic() + patience_s
        while select.select([bell], [], [], max(0.0, end - time.monotonic()))[0]:
            if bell.heard():
                return True
        return False
    finally:
        bell.close()
