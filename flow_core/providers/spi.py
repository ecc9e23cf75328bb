"""The provider interface: a handful of verbs over task ids, and a few optional capabilities.

A provider is synchronous, thread-safe and never sleeps. It holds nothing that a second process could not rebuild from
the settings and a task id. Which attempt a key has reached is not its business: the engine decides that, a provider
only promises that one id is started once. `flow_core.testing.ProviderContract` checks every sentence below.
"""

from __future__ import annotations

import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from flow_core.errors import TaskNotFoundError
from flow_core.models import Instance, LogChunk, LogPosition, Snapshot, TaskSpec, Volume


class Provider(ABC):
    """One back end that runs tasks."""

    #: The name under which settings and messages know the provider.
    name: ClassVar[str]

    #: How often asking again can be worth while (seconds); the engine's clock, not the provider's.
    poll_interval_s: ClassVar[float]

    #: Whether tasks run in the file system of this process, where a path means the same file for both.
    shares_files: ClassVar[bool] = False

    @abstractmethod
    def submit(self, spec: TaskSpec, *, task_id: str) -> None:
        """Start `spec` under `task_id`, once.

        After return the task exists and will start without anybody's help. An id that exists already is left as it is,
        whatever `spec` says, except that a submit which died half-way is finished. However many processes call this
        at once, however often, and wherever they are killed, the user's command starts at most once per id, and it
        starts only when the last process of the attempt before (same digest, attempt minus one) is gone.

        Raises SpecRejected: this provider can never run it, nothing exists now. Raises ProviderUnavailable: nothing is
        known to have changed, ask again with the same id.
        """

    def submit_many(self, tasks: Sequence[tuple[TaskSpec, str]]) -> None:
        """Do `submit` for several (spec, task id), in as few requests as the back end allows.

        What `submit` promises holds for each of them. After an exception some may exist: do it again with the same ids.
        """
        for spec, task_id in tasks:
            self.submit(spec, task_id=task_id)

    @abstractmethod
    def find(self, digest: str) -> str | None:
        """Return the id of the newest attempt at the key with this digest, None when there is none."""

    def find_many(self, digests: Collection[str]) -> Mapping[str, str]:
        """Return the newest attempts at the keys with these digests, those that exist, in one round trip."""
        found = {digest: self.find(digest) for digest in digests}
        return {digest: task_id for digest, task_id in found.items() if task_id is not None}

    @abstractmethod
    def list(self, *, limit: int) -> Sequence[str]:
        """Return the ids of up to `limit` tasks, the newest first."""

    @abstractmethod
    def poll(self, task_ids: Collection[str]) -> Mapping[str, Snapshot]:
        """Return a snapshot for exactly the ids asked for, in one round trip. Ids that nobody knows are LOST.

        A final status never changes again. A native state that we do not know is not an end.
        """

    def bell(self, task_ids: Collection[str]) -> Bell | None:  # noqa: ARG002
        """Return something that rings as soon as one of these tasks ends; None where nothing does.

        Only a hint that it is time to ask: it may ring for nothing, or not at all. The caller closes it.
        """
        return None

    @abstractmethod
    def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
        """Return up to `limit` bytes of a node's output from byte `offset`; a negative offset counts from the end.

        Never blocks. `end` is True only when the task is final and its output has been read to the last byte, so
        reading from `next_offset` until `end` yields every byte once. Pieces may split a character.
        Raises TaskNotFoundError.
        """

    def read_logs(
        self, wanted: Sequence[LogPosition], *, limit: int = 65536
    ) -> Mapping[LogPosition, LogChunk]:
        """Return what many outputs have had added since these positions, in one round trip.

        Each piece is as `read_log` would return it, from an offset that is not negative. They have up to `limit` bytes
        in all (or one byte each where that is more), shared out so that nobody's flood holds up another: who has little
        to say gets it in full. What cannot be read is left out: unknown tasks, machines that are silent; `poll` says
        what became of those. Raises ProviderUnavailable when nothing can be read.
        """
        chunks: dict[LogPosition, LogChunk] = {}
        for count, at in zip(range(len(wanted), 0, -1), wanted, strict=True):
            try:
                chunk = self.read_log(
                    at.task_id, node=at.node, offset=at.offset, limit=max(1, limit // count)
                )
            except TaskNotFoundError:
                continue
            chunks[at] = chunk
            limit -= len(chunk.data)
        return chunks

    @abstractmethod
    def cancel(self, task_ids: Collection[str]) -> None:
        """Ask tasks to stop. After return each of them will end, also if it has not started and nobody looks.

        Idempotent; final and unknown ids are left alone. The effect shows in `poll`: reason "cancelling" until the last
        process is gone, then CANCELLED.
        """

    @abstractmethod
    def fetch(self, task_id: str, path: str, into: Path) -> None:
        """Copy a file of the task's folder to `into`, whole or not at all.

        Raises TaskNotFoundError, ResourceNotFoundError (no such file), ValidationError (a path that leaves the folder).
        """

    def read(self, task_id: str, path: str) -> bytes:
        """Return the content of a file of the task's folder. Raises what `fetch` raises."""
        with tempfile.TemporaryDirectory(prefix="flow-") as folder:
            into = Path(folder) / "file"
            self.fetch(task_id, path, into)
            return into.read_bytes()

    def task_url(self, task_id: str) -> str | None:  # noqa: ARG002
        """Return the address of a page about a task in the back end's own console; None where there is none."""
        return None

    def locate(self, task_id: str, path: str) -> str | None:  # noqa: ARG002
        """Return where tasks that are submitted now can open a file of this task's folder; None where they cannot.

        Raises as `fetch` does.
        """
        return None

    @abstractmethod
    def release(self, task_ids: Collection[str]) -> None:
        """Free what ended tasks occupy: the host has stored their results.

        After return their logs, results and files are gone; status, exit code and times stay readable for the retention
        time, and the key's next submit is a new attempt. Idempotent; unknown ids and tasks that have not ended are left
        alone.
        """

    @abstractmethod
    def find_instances(self) -> Sequence[Instance]:
        """Return what can be asked for, with price and what is free now."""

    @property
    def volumes(self) -> Volumes | None:
        """Persistent storage, None where the back end has none."""
        return None

    @property
    def shell(self) -> Shell | None:
        """Commands beside a running task, None where the back end cannot."""
        return None

    @property
    def sessions(self) -> Sessions | None:
        """Byte streams to a running task's supervisor of calls, None where the back end has none."""
        return None


class Bell(Protocol):
    """Tells when it is time to ask for tasks again."""

    def fileno(self) -> int:
        """Return a descriptor that can be read when there is something to hear."""

    def heard(self) -> bool:
        """Take in what there is to hear, without waiting; return whether it says that a task has ended."""

    def close(self) -> None:
        """Hear no more."""


class Volumes(Protocol):
    """The capability to keep storage beyond a task's life."""

    def create(self, *, name: str | None, size_gb: int, interface: Literal["block", "file"]) -> Volume:
        """Create a volume, or return the one that has this name. After return it exists until it is deleted."""

    def list(self) -> Sequence[Volume]:
        """Return all volumes, sorted by name."""

    def delete(self, volume: str) -> None:
        """Delete a volume and what is on it, by id or name. Raises VolumeNotFoundError, VolumeError while in use."""

    def mount(self, volume: str, task_id: str) -> None:
        """Show a volume to a running task. Raises VolumeNotFoundError, TaskNotFoundError, ValidationError."""


class Shell(Protocol):
    """The capability to run something beside a task, where the task runs and with its environment."""

    def run(self, task_id: str, command: str | None, *, node: int = 0) -> int:
        """Run `command` (None: interactively) on our terminal; return its exit code. Raises TaskNotFoundError."""


class Sessions(Protocol):
    """The capability to speak with a task that serves calls (`flow_core.runner.serve`)."""

    shares_memory: bool
    """Whether the streams are Unix sockets, over which memory can be shared."""

    def connect(self, task_id: str) -> socket.socket:
        """Return a new byte stream to the Unix socket `door` in the task's folder, as a connected, blocking socket.

        Nothing has been said over it: the handshake, with a key that lies in the task's folder, is the caller's.
        Raises ProviderUnavailable when nobody listens there (not yet, or no more), TaskNotFoundError.
        """
