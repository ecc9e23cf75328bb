"""Submit, watch, read, cancel and collect over a provider. The only place that sleeps, on a clock that is injected.

The rules that hold for every provider live here: which attempt a key has reached, when a task is adopted, one poll for
all who wait, what an end means as an exception.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence

from flow_core.errors import (
    TaskCancelledError,
    TaskExecutionError,
    TaskNotFoundError,
    TaskOutOfMemoryError,
    TaskTimeLimitError,
    TimeoutError,
    WorkerDiedError,
)
from flow_core.ids import TaskId, digest
from flow_core.models import LogChunk, LogPosition, Snapshot, TaskSpec, TaskStatus
from flow_core.providers.spi import Provider
from flow_core.watch import Clock, SystemClock, Watch

log = logging.getLogger("flow_core")

#: A waiting call returns to Python at least this often, so that a host's timeout or signal can get at it.
SLICE_S = 0.1

#: An answer of this length is enough for the tail of any log that a person reads in an error message.
_TAIL_BYTES = 65536
_TAIL_LINES = 20


class Engine:
    """All that can be done with tasks of one provider. Thread-safe."""

    def __init__(self, provider: Provider, *, clock: Clock | None = None) -> None:
        self.provider = provider
        self.clock: Clock = clock or SystemClock()
        self.watch = Watch(provider, self.clock)

    # -- submitting

    def submit(self, spec: TaskSpec, *, key: str) -> str:
        """Return the id of the one task for `key`.

        No attempt yet: the first is started. The latest is live or succeeded: it is adopted. It failed, was cancelled
        (or asked to stop), lost or released: the next attempt is started. Two processes that race compute the same id,
        and starting an id is exclusive, so both get the same task. Raises what `Provider.submit` raises.
        """
        latest = self.provider.find(digest(key))
        before = None if latest is None else self.provider.poll([latest])[latest]
        task_id, ended = _next(spec, key, before)
        if not ended:
            self._log_submit(spec, task_id)
            # Also for an adopted one: a submit that died half-way is finished.
            self.provider.submit(spec, task_id=task_id)
        return task_id

    def submit_many(self, tasks: Sequence[tuple[TaskSpec, str]]) -> list[str]:
        """Do `submit` for several (spec, key), in as few requests as the provider allows; return their ids in order.

        After an exception some may have been submitted: do it again with the same keys.
        """
        found = self.provider.find_many([digest(key) for _, key in tasks])
        before = self.provider.poll(list(found.values())) if found else {}
        ids, open_ = [], {}
        for spec, key in tasks:
            latest = found.get(digest(key))
            task_id, ended = _next(spec, key, None if latest is None else before[latest])
            ids.append(task_id)
            if not ended and task_id not in open_:
                self._log_submit(spec, task_id)
                open_[task_id] = spec
        self.provider.submit_many([(spec, task_id) for task_id, spec in open_.items()])
        return ids

    def _log_submit(self, spec: TaskSpec, task_id: str) -> None:
        where = self.provider.name
        log.debug("submitting %s to the %s provider: %s, %s", task_id, where, spec.entry, spec.instance_type)

    def find(self, key: str) -> str | None:
        """Return the id of the newest attempt at `key`, None when there is none."""
        return self.provider.find(digest(key))

    def adopted(self, key: str) -> str | None:
        """Return the id of the task that a submit with this key would hand out again, None where it would start one."""
        latest = self.find(key)
        return latest if latest is not None and adoptable(self.poll([latest])[latest]) else None

    # -- watching

    def poll(self, task_ids: Collection[str]) -> dict[str, Snapshot]:
        """Return fresh snapshots of exactly these tasks, in one round trip."""
        return self.watch.ask(task_ids)

    def get(self, task_id: str) -> Snapshot:
        """Return a fresh snapshot. Raises TaskNotFoundError when nobody knows the task."""
        seen = self.poll([task_id])[task_id]
        if seen.status is TaskStatus.LOST:
            raise TaskNotFoundError(
                f"the {self.provider.name} provider knows no task {task_id!r}",
                suggestions=[
                    "List the tasks with flow.list_tasks().",
                    "Check that the settings are those it was submitted with.",
                ],
            )
        return seen

    def list(self, *, limit: int) -> Sequence[Snapshot]:
        """Return snapshots of up to `limit` tasks, the newest first."""
        ids = self.provider.list(limit=limit)
        answer = self.poll(ids)
        return [answer[task_id] for task_id in ids]

    def wait(
        self, task_ids: Collection[str], *, timeout: float | None = None, any_of: bool = False
    ) -> dict[str, Snapshot]:
        """Block until all tasks are final (with `any_of`: one of them); return the snapshots.

        However many threads wait, the provider is asked once per interval for all of them together. An answer that the
        provider cannot give at the moment is asked for again. Raises TimeoutError after `timeout` seconds.
        """
        deadline = None if timeout is None else self.clock.now() + timeout
        with self.watch.interest(task_ids), contextlib.ExitStack() as closing:
            bell = self.provider.bell(task_ids)
            if bell is not None:
                closing.callback(bell.close)
            interval = self.provider.poll_interval_s if bell is None else SLICE_S
            rung = False
            while True:
                seen = self.watch.look(task_ids, max_age_s=0.0 if rung else interval)
                ended = [one for one in seen.values() if one.status.final]
                if len(ended) == len(set(task_ids)) or (any_of and ended):
                    return seen
                left = None if deadline is None else deadline - self.clock.now()
                if left is not None and left <= 0:
                    if len(seen) < len(set(task_ids)) and self.watch.answers(task_ids):
                        continue  # another thread was asking all the time, and not yet for ours
                    raise _timed_out(task_ids, seen, timeout or 0.0)
                # Long-running work is asked about less often, up to the slice: an end is noticed 5 % late at most.
                interval = min(
                    max(self.provider.poll_interval_s, interval * 1.05),
                    max(SLICE_S, self.provider.poll_interval_s),
                )
                rung = self.clock.sleep(min(SLICE_S, interval, SLICE_S if left is None else left), bell)

    # -- reading

    def read_log(self, task_id: str, *, node: int = 0, offset: int = 0, limit: int = 65536) -> LogChunk:
        """Return a piece of a node's output; see `Provider.read_log`."""
        return self.provider.read_log(task_id, node=node, offset=offset, limit=limit)

    def read_logs(
        self, wanted: Sequence[LogPosition], *, limit: int = 65536
    ) -> Mapping[LogPosition, LogChunk]:
        """Return what many outputs have had added, in one round trip; see `Provider.read_logs`."""
        return self.provider.read_logs(wanted, limit=limit) if wanted else {}

    def follow(self, task_id: str, *, node: int = 0, offset: int = 0) -> Iterator[str]:
        """Yield a node's output line by line, each with its newline, until the task has ended and all has been read."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        begun: list[str] = []  # pieces of a line that may be very long: a progress bar never ends its line
        while True:
            chunk = self.provider.read_log(task_id, node=node, offset=offset)
            offset = chunk.next_offset
            first, *lines = decode(chunk.data, chunk.end).split("\n")
            begun.append(first)
            for line in lines:
                yield "".join(begun) + "\n"
                begun = [line]
            if chunk.end:
                break
            if not chunk.data:
                self.clock.sleep(min(SLICE_S, max(0.05, self.provider.poll_interval_s)))
        if any(begun):
            yield "".join(begun)

    def tail(self, task_id: str, *, lines: int, node: int = 0) -> str:
        """Return the last `lines` lines of a node's output."""
        if lines <= 0:
            return ""
        data, size = b"", _TAIL_BYTES
        while True:
            data = self._from_end(task_id, node, size)
            kept = data.splitlines(keepends=True)
            if len(kept) > lines or len(data) < size:
                return b"".join(kept[-lines:]).decode("utf-8", "replace")
            size *= 8

    def _from_end(self, task_id: str, node: int, size: int) -> bytes:
        chunk = self.provider.read_log(task_id, node=node, offset=-size, limit=size)
        return chunk.data

    # -- ending

    def cancel(self, task_ids: Collection[str]) -> None:
        """Ask tasks to stop; see `Provider.cancel`."""
        self.provider.cancel(list(task_ids))

    def release(self, task_ids: Collection[str]) -> None:
        """Free what ended tasks occupy; see `Provider.release`."""
        self.provider.release(list(task_ids))

    def collect(self, task_id: str, name: str) -> bytes:
        """Return the contents of a file of the task's folder. Raises ResourceNotFoundError."""
        return self.provider.read(task_id, name)

    def failure(self, seen: Snapshot) -> TaskExecutionError:
        """Build the exception for a task that ended without success: what happened, and the end of its output."""
        try:
            tail = self.ending(seen.task_id)
        except TaskNotFoundError:
            tail = ""
        return failure(seen, tail)

    def ending(self, task_id: str) -> str:
        """Return what an error message shows of node 0's output: its last lines, however long they are."""
        lines = self._from_end(task_id, 0, _TAIL_BYTES).splitlines(keepends=True)
        return b"".join(lines[-_TAIL_LINES:]).decode("utf-8", "replace")


#: The label that stands for what was asked for, so that a key which is used for something else is noticed.
SPEC_LABEL = "flow/spec"


def _next(spec: TaskSpec, key: str, before: Snapshot | None) -> tuple[str, bool]:
    """Return which attempt a submit gets, and whether that has ended already. `before` is the latest there is."""
    if before is None:
        return str(TaskId.first(spec.name, key)), False
    if not adoptable(before):
        return str(TaskId.parse(before.task_id).next()), False
    _tell_adoption(before, spec)
    return before.task_id, before.status.final


def _tell_adoption(before: Snapshot, spec: TaskSpec) -> None:
    started, asked = before.labels.get(SPEC_LABEL), spec.labels.get(SPEC_LABEL)
    if started is not None and asked is not None and started != asked:
        log.warning(
            "this key was used before for something else: task %s (%s) is handed out as it was started, "
            "not with the command, arguments or settings given now",
            before.task_id,
            before.status.value,
        )
    else:
        log.info("adopting task %s (%s)", before.task_id, before.status.value)


def adoptable(seen: Snapshot) -> bool:
    """Whether a new submit with the same key gets this task instead of a new attempt."""
    if seen.reason in ("cancelling", "released"):
        return False
    return seen.status.succeeded or not seen.status.final


_ERRORS: Mapping[str, type[TaskExecutionError]] = {
    "cancelled": TaskCancelledError,
    "time-limit": TaskTimeLimitError,
    "out-of-memory": TaskOutOfMemoryError,
    "runner-died": WorkerDiedError,
    "reboot": WorkerDiedError,
    "node-failed": WorkerDiedError,
    "preempted": WorkerDiedError,
    "lost": WorkerDiedError,
}

_ADVICE: Mapping[str, str] = {
    "time-limit": "Raise max_run_time_hours, or save checkpoints and go on from there.",
    "out-of-memory": "Use smaller batches, or an instance with more memory.",
    "runner-died": "Submit again with the same key: this is a new attempt.",
    "reboot": "Submit again with the same key: this is a new attempt.",
    "node-failed": "Submit again with the same key: this is a new attempt.",
    "preempted": "Submit again with the same key, or ask for machines that nobody takes away.",
    "storage": "Free some space on the machine's disk.",
}


def failure(seen: Snapshot, tail: str) -> TaskExecutionError:
    """Say in one exception how a task ended. Pure."""
    kind = _ERRORS.get(seen.reason, TaskExecutionError)
    said = {TaskStatus.LOST: "is not known any more", TaskStatus.CANCELLED: "was cancelled"}.get(
        seen.status, "failed"
    )
    detail = f": {seen.message}" if seen.message and said != "is not known any more" else ""
    advice = [_ADVICE[seen.reason]] if seen.reason in _ADVICE else []
    return kind(
        f"task {seen.task_id} {said}{detail}",
        suggestions=advice,
        task_id=seen.task_id,
        exit_code=seen.exit_code,
        signal=seen.signal,
        reason=seen.reason,
        log_tail=tail,
    )


def _timed_out(task_ids: Collection[str], seen: Mapping[str, Snapshot], timeout: float) -> TimeoutError:
    open_ = [one for one in dict.fromkeys(task_ids) if one not in seen or not seen[one].status.final]
    what = f"{len(open_)} tasks have not ended"
    if len(open_) == 1:
        (one,) = open_
        what = (
            f"task {one} is {seen[one].status.value}"
            if one in seen
            else f"nothing is known of task {one} yet"
        )
    return TimeoutError(
        f"waited {timeout:g} s and {what}",
        suggestions=["The work goes on: wait again, or stop it with cancel()."],
    )
