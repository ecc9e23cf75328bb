"""What is too old in a machine's home, and how it goes. Standard library only, Python 3.8+."""

from __future__ import annotations

import os
import shutil
import time

from . import machine, task

_SWEEP_EVERY_S = 3600.0
_MOST_LOG_BYTES = 1024 * 1024
_MOVED_S = 90 * 86400.0
_DRAFT_S = 86400.0  # a submit that still copies its files is younger


def sweep(home: str, retention_s: float) -> None:
    """Remove tasks that ended longer ago than the retention time; looked for once an hour at most."""
    stamp = os.path.join(home, ".swept")
    now = time.time()
    try:
        if now - os.stat(stamp).st_mtime < _SWEEP_EVERY_S:
            return
    except FileNotFoundError:
        pass
    os.close(os.open(stamp, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    os.utime(stamp)
    log = os.path.join(home, "runner.log")
    if os.path.exists(log) and os.path.getsize(log) > _MOST_LOG_BYTES:
        machine.remove(log)
    for key in _entries(os.path.join(home, "tasks")):
        for attempt in _entries(key.path):
            if attempt.name.startswith(".new-"):  # of a submit that was killed
                _remove_older(attempt.path, now - _DRAFT_S)
                continue
            last = task.read_json(attempt.path, "exit.json") or task.read_json(attempt.path, "cleared") or {}
            ended = last.get("ended_at", now)
            if now - ended > retention_s:
                _retire(attempt.path, now - ended - retention_s)
    for blob in _entries(os.path.join(home, "blobs")):
        _remove_older(
            blob.path, now - (_DRAFT_S if blob.name.startswith(".") else max(retention_s, _DRAFT_S))
        )


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _retire(folder: str, overdue_s: float) -> None:
    """Remove a task. Of one that came from another machine the record stays: nobody may bring it once more."""
    if (task.read_json(folder, "spec.json") or {}).get("moves") and overdue_s < _MOVED_S:
        if not any(os.path.exists(os.path.join(folder, name)) for name in ("released", "moved")):
            machine.strip(folder)
        return
    _remove_task(folder)


def _remove_task(folder: str) -> None:
    trash = os.path.join(os.path.dirname(folder), ".old-" + os.urandom(8).hex())
    try:
        os.rename(folder, trash)  # gone at once for everybody who looks, then removed at leisure
    except FileNotFoundError:  # somebody else sweeps too
        return
    shutil.rmtree(trash, ignore_errors=True)


def _remove_older(path: str, limit: float) -> None:
    try:
        if os.stat(path).st_mtime >= limit:
            return
    except FileNotFoundError:
        return
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        machine.remove(path)
