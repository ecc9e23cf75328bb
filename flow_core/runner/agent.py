"""Serves what `machine` does, and a few general verbs, to one client over two descriptors (an SSH channel, a pipe).

No daemon: it lives as long as its connection, or until nothing has been heard for `_IDLE_S`. Requests are served side
by side, so a slow one holds up nobody. A request is ``{"id", "verb", "args"}`` and bytes; its answer is
``{"id", "value"}`` and bytes, or ``{"id", "error": {kind, message, suggestions}}``. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any, Callable, NamedTuple

from . import (
    bell,
    blobs,
    cluster,
    frames,
    inventory,
    logs,
    machine,
    moves,
    notes,
    proc,
    slurm_look,
    slurm_tools,
    sweeping,
)
from .machine import Refused

#: A client asks for a sign of life far more often; one that is silent for so long is gone and nobody told us.
_IDLE_S = 300.0

#: The longest answer of one request; files are read in pieces, and no listing of a cluster is so long.
_MAX_ANSWER = 48 * 1024 * 1024


class Answer(NamedTuple):
    """What a verb answers: a JSON value, and bytes."""

    value: Any = None
    data: bytes = b""


# -- general verbs


def run(
    argv: list[str],
    *,
    deadline_s: float,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    data: bytes = b"",
) -> Answer:
    """Run a program to its end, `data` on its standard input: {code, out: length of stdout}, and stdout + stderr.

    Raises Refused: not-found (no such program), deadline (all that it started is killed), invalid.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            cwd=None if cwd is None else os.path.expanduser(cwd),
            start_new_session=True,
        )
    except FileNotFoundError as error:
        what = f"there is no program {argv[0]!r}" if error.filename == argv[0] else str(error)
        raise Refused("not-found", what) from error
    except (OSError, ValueError) as error:
        raise Refused("invalid", f"{argv[0]!r} could not be started: {error}") from error
    _children.add(process.pid)
    try:
        with process:
            try:
                out, err = process.communicate(data, timeout=deadline_s)
            except BaseException:
                _kill_group(process.pid)
                raise
    except subprocess.TimeoutExpired:
        raise Refused("deadline", f"{argv[0]!r} did not end within {deadline_s:g} s") from None
    finally:
        _children.discard(process.pid)
    if len(out) + len(err) > _MAX_ANSWER:
        raise Refused("invalid", f"{argv[0]!r} printed {len(out) + len(err):,} bytes: too much to send")
    return Answer({"code": process.returncode, "out": len(out)}, out + err)


_children: set[int] = set()


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def read(path: str, offset: int = 0, limit: int = 1 << 20, same: str = "") -> Answer:
    """Read up to `limit` bytes of a file: {size, same}. With `same` from an earlier answer it must be that very file.

    Raises Refused: not-found, invalid (it has been replaced meanwhile).
    """
    try:
        with open(os.path.expanduser(path), "rb") as file:
            status = os.fstat(file.fileno())
            version = f"{status.st_dev}.{status.st_ino}.{status.st_mtime_ns}"
            if same and same != version:
                raise Refused("unavailable", f"{path!r} was replaced while it was read")
            file.seek(offset)
            return Answer({"size": status.st_size, "same": version}, file.read(limit))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise Refused("not-found", f"there is no file {path!r}") from error


def write(path: str, mode: int = 0o600, data: bytes = b"") -> None:
    """Make a file be there with this content, whole or not at all; missing folders are made for the owner alone."""
    path = os.path.expanduser(path)
    machine.private(os.path.dirname(os.path.abspath(path)))
    fd, draft = tempfile.mkstemp(prefix="." + os.path.basename(path) + ".", dir=os.path.dirname(path) or ".")
    try:
        with open(fd, "wb") as file:
            file.write(data)
            os.fchmod(fd, mode)
        os.rename(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def stat(paths: list[str]) -> list[dict[str, Any] | None]:
    """Describe each path, None where nothing is: {kind: file | folder | other, size, mtime}. Links are followed."""
    found: list[dict[str, Any] | None] = []
    for path in paths:
        try:
            status = os.stat(os.path.expanduser(path))
        except (FileNotFoundError, NotADirectoryError):
            found.append(None)
            continue
        kind = {0o040000: "folder", 0o100000: "file"}.get(status.st_mode & 0o170000, "other")
        found.append({"kind": kind, "size": status.st_size, "mtime": status.st_mtime})
    return found


def listdir(path: str) -> list[str]:
    """Return the names in a folder, sorted; none when there is no such folder."""
    try:
        return sorted(os.listdir(os.path.expanduser(path)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove(paths: list[str]) -> None:
    """Remove files; those that are not there are fine."""
    for path in paths:
        try:
            os.unlink(os.path.expanduser(path))
        except FileNotFoundError:
            pass


def facts(python: str | None = None) -> dict[str, Any]:
    """Describe this machine as far as that takes no time; `inventory.gpus` has the rest."""
    python = python or sys.executable
    connection = os.environ.get("SSH_CONNECTION", "").split()
    return {
        "python": python,
        "version": list(sys.version_info[:3]),
        "node": os.uname().nodename,
        "boot": proc.boot_id(),
        "engine": inventory.container_engine(),
        "can_mount": inventory.can_mount(),
        "environment": inventory.base_environment(python),
        "address": connection[2] if len(connection) > 2 else None,
        "cpus": os.cpu_count() or 1,
    }


# -- verbs of the machine, as they travel


def create(
    home: str,
    task_id: str,
    *,
    job: dict[str, Any],
    spec: dict[str, Any],
    files: list[dict[str, Any]],
    data: bytes = b"",
) -> bool:
    """Do `machine.create`; a file with `size` has its content in `data`, one after the other."""
    return machine.create(home, task_id, job=job, spec=spec, files=_whole(files, data))


def read_log(home: str, task_id: str, node: int, offset: int, limit: int) -> Answer:
    """Do `logs.read_log`: {next_offset, end}, and the bytes."""
    data, next_offset, end = logs.read_log(home, task_id, node, offset, limit)
    return Answer({"next_offset": next_offset, "end": end}, data)


def read_logs(home: str, wanted: list[tuple[str, int, int]], limit: int) -> Answer:
    """Do `logs.read_logs`: {news, lost}, and the bytes of one after the other.

    `news` is a list of [index, number of bytes, end], without those that neither have news nor end; `lost` are indexes.
    """
    news, lost, pieces = [], [], []
    for index, one in enumerate(logs.read_logs(home, wanted, limit)):
        if one is None:
            lost.append(index)
        elif one[0] or one[2]:
            news.append([index, len(one[0]), one[2]])
            pieces.append(one[0])
    return Answer({"news": news, "lost": lost}, b"".join(pieces))


def _whole(files: list[dict[str, Any]], data: bytes) -> list[dict[str, Any]]:
    """Give each file that has a `size` its part of the data: they come one after the other."""
    offset, whole = 0, []
    for file in files:
        if "size" in file:
            whole.append({**file, "data": data[offset : offset + file["size"]]})
            offset += file["size"]
        else:
            whole.append(file)
    return whole


def start(home: str, task_id: str, *, files: list[dict[str, Any]], data: bytes = b"", **how: Any) -> bool:
    """Do `notes.start`; a file with `size` has its content in `data`, one after the other."""
    return notes.start(home, task_id, files=_whole(files, data), **how)


def pack(home: str, task_id: str) -> Answer:
    """Do `moves.pack`."""
    return Answer(*moves.pack(home, task_id))


def prepare(
    home: str, task_id: str, *, files: list[dict[str, Any]], data: bytes = b"", **how: Any
) -> str | None:
    """Do `moves.prepare`; a file with `size` has its content in `data`, one after the other."""
    return moves.prepare(home, task_id, files=_whole(files, data), **how)


def adopt(home: str, task_id: str, *, files: list[dict[str, Any]], data: bytes = b"", **how: Any) -> None:
    """Do `moves.adopt`; a file with `size` has its content in `data`, one after the other."""
    moves.adopt(home, task_id, files=_whole(files, data), **how)


def slurm_submit(home: str, tasks: list[dict[str, Any]], *, data: bytes = b"", **how: Any) -> None:
    """Do `cluster.submit`; the files of all tasks have their content in `data`."""
    offset = 0
    for one in tasks:
        size = sum(file.get("size", 0) for file in one["files"])
        one["files"] = _whole(one["files"], data[offset : offset + size])
        offset += size
    cluster.submit(home, tasks, **how)


VERBS: dict[str, Callable[..., Any]] = {
    "ping": lambda: None,
    "facts": facts,
    "gpus": inventory.remembered_gpus,
    "run": run,
    "read": read,
    "write": write,
    "stat": stat,
    "listdir": listdir,
    "remove": remove,
    "create": create,
    "launch": machine.launch,
    "missing_blobs": blobs.missing_blobs,
    "keep_blob": blobs.keep_blob,
    "missing_parts": blobs.missing_parts,
    "join_blob": blobs.join_blob,
    "find": machine.find,
    "find_many": machine.find_many,
    "attempts": machine.attempts,
    "newest": machine.newest,
    "poll": machine.poll,
    "survey": machine.survey,
    "read_log": read_log,
    "read_logs": read_logs,
    "locate": machine.locate,
    "cancel": machine.cancel,
    "release": machine.release,
    "sweep": sweeping.sweep,
    "await_end": bell.await_end,
    "look": notes.look,
    "put_note": notes.put,
    "start": start,
    "watch": notes.watch,
    "queue": moves.queue,
    "pack": pack,
    "prepare": prepare,
    "withdraw": moves.withdraw,
    "settle": moves.settle,
    "abandon": moves.abandon,
    "adopt": adopt,
    "clear": moves.clear,
    "slurm_submit": slurm_submit,
    "slurm_look": slurm_look.look,
    "slurm_cancel": cluster.dequeue,
    "slurm_nodes": slurm_tools.nodes,
    "slurm_setting": slurm_tools.setting,
}
_WITH_DATA = frozenset({"run", "write", "create", "keep_blob", "start", "prepare", "adopt", "slurm_submit"})


def perform(verb: str, args: dict[str, Any], data: bytes = b"") -> Answer:
    """Do what is asked for. Raises Refused, and nothing else."""
    if verb not in VERBS:
        raise Refused("invalid", f"this agent does not know {verb!r}")
    try:
        value = VERBS[verb](**args, **({"data": data} if verb in _WITH_DATA else {}))
    except OSError as error:
        raise Refused("unavailable", f"{verb}: {error}") from error
    return value if isinstance(value, Answer) else Answer(value)


class Agent:
    """One client's requests, until its connection ends."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._writing = threading.Lock()
        self._streams: dict[int, frames.Stream] = {}

    def serve(self) -> None:
        """Answer until the connection ends."""
        parser = frames.Parser()
        while select.select([self._incoming], [], [], _IDLE_S)[0]:
            data = os.read(self._incoming, 1 << 18)
            if not data:
                return
            for head, content in parser.feed(data):
                self._take(head, content)

    def _take(self, head: dict[str, Any], data: bytes) -> None:
        if "stream" in head:
            stream = self._streams.get(head["stream"])
            if stream is not None:
                stream.take(head, data)
        elif head["verb"] == "ping":
            self.send({"id": head["id"], "value": None})
        elif head["verb"] == "stream":
            self._open(head)
        else:
            threading.Thread(target=self._answer, args=(head, data), daemon=True).start()

    def _answer(self, head: dict[str, Any], data: bytes) -> None:
        try:
            answer = perform(head["verb"], head["args"], data)
            self.send({"id": head["id"], "value": answer.value}, answer.data)
        except Refused as refused:
            self._refuse(head, refused)
        except Exception as error:  # noqa: BLE001 - a mistake in here must reach the client as an answer
            import traceback

            where = traceback.format_exc().strip().splitlines()[-3:]
            self._refuse(head, Refused("broken", f"{head['verb']} failed: {error!r}", tuple(where)))

    def _refuse(self, head: dict[str, Any], refused: Refused) -> None:
        told = {"kind": refused.kind, "message": refused.message, "suggestions": list(refused.suggestions)}
        self.send({"id": head["id"], "error": told})

    def _open(self, head: dict[str, Any]) -> None:
        """Connect the client with a Unix socket of this machine, or a program, under the request's number."""
        args, number = head["args"], head["id"]
        try:
            if "argv" in args:
                end = frames.connect_program(args["argv"], slurm_tools.environment())
            else:
                end = frames.connect_unix(os.path.expanduser(args["path"]))
        except OSError as error:
            what = args.get("path") or args["argv"][0]
            self._refuse(head, Refused("unavailable", f"nobody listens at {what!r}: {error.strerror}"))
            return
        stream = frames.Stream(number, end, self.send, self._forget)
        self._streams[number] = stream
        self.send({"id": number, "value": None})
        stream.start()

    def _forget(self, number: int) -> None:
        self._streams.pop(number, None)

    def send(self, head: dict[str, Any], data: bytes = b"") -> None:
        """Send one message whole."""
        message = memoryview(frames.pack(head, data))
        with self._writing:
            while message:
                message = message[os.write(self._outgoing, message) :]


def main() -> None:
    """Serve the client at the standard input and output, then end with all that was started for it."""
    incoming, outgoing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # whatever prints here must not end up among the messages
    for number in (signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        Agent(incoming, outgoing).serve()
    finally:
        for pid in list(_children):
            _kill_group(pid)
        os._exit(0)  # no thread is waited for: whom they served is gone
