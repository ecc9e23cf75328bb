"""Task: the user's handle on one task. A view on the engine and an id; it owns nothing, so it can be made anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Literal, overload

from flow_core.engine import Engine
from flow_core.errors import FlowError, ResourceNotFoundError
from flow_core.models import LogChunk, Snapshot, TaskConfig, TaskSpec, TaskStatus

#: The label that marks a task as a function call; its result is a value.
KIND_LABEL = "flow/kind"


class Task:
    """A running or ended task.

    What changes with time (`status`, `message`, the times and costs) is looked up when it is read, at most once per
    poll interval of the provider, until the task has ended.
    """

    def __init__(
        self, engine: Engine, task_id: str, *, config: TaskConfig | None = None, seen: Snapshot | None = None
    ) -> None:
        self._engine = engine
        self._task_id = task_id
        self._config = config
        self._seen = seen
        self._seen_at = engine.clock.now()

    def __repr__(self) -> str:
        seen = "" if self._seen is None else f" {self._seen.status.value}"
        return f"<{type(self).__name__} {self._task_id}{seen}>"

    @property
    def task_id(self) -> str:
        """The id, with which any other process finds the task again."""
        return self._task_id

    # -- state

    @property
    def snapshot(self) -> Snapshot:
        """All that is known of the task at this moment, in one consistent value. Raises TaskNotFoundError."""
        now = self._engine.clock.now()
        if self._seen is None or (
            not self._seen.status.final and now - self._seen_at >= self._engine.provider.poll_interval_s
        ):
            self.refresh()
        assert self._seen is not None
        return self._seen

    def refresh(self) -> None:
        """Ask the provider now. Raises TaskNotFoundError when it does not know the task."""
        self._see(self._engine.get(self._task_id))

    def _see(self, seen: Snapshot) -> None:
        self._seen, self._seen_at = seen, self._engine.clock.now()

    @property
    def status(self) -> TaskStatus:
        """Where the task is in its life."""
        return self.snapshot.status

    @property
    def is_running(self) -> bool:
        """Whether the user's command is running now."""
        return self.status is TaskStatus.RUNNING

    @property
    def is_terminal(self) -> bool:
        """Whether the task has ended, however."""
        return self.status.final

    @property
    def name(self) -> str:
        """The name from its configuration."""
        return self.snapshot.name

    @property
    def message(self) -> str | None:
        """What the provider has to say of the status, None when nothing."""
        return self.snapshot.message or None

    @property
    def created_at(self) -> datetime | None:
        """When it was submitted."""
        return self.snapshot.submitted_at

    @property
    def started_at(self) -> datetime | None:
        """When the user's command started, None before."""
        return self.snapshot.started_at

    @property
    def completed_at(self) -> datetime | None:
        """When it ended, None before."""
        return self.snapshot.ended_at

    # -- where it runs, what it costs

    @property
    def instance_type(self) -> str:
        """The machine asked for, in canonical spelling ("8xh100")."""
        return self.snapshot.instance_type

    @property
    def num_instances(self) -> int:
        """The number of machines."""
        return self.snapshot.num_instances

    @property
    def region(self) -> str:
        """Where it runs."""
        return self.snapshot.region

    @property
    def instances(self) -> list[str]:
        """The machines, one per node; empty until they are known."""
        return list(self.snapshot.hosts)

    @property
    def host(self) -> str | None:
        """The machine of node 0, None until it is known."""
        return next(iter(self.snapshot.hosts), None)

    @property
    def cost_per_hour(self) -> str | None:
        """For example "$25.60"; None when the provider does not tell."""
        return _dollars(self.snapshot.cost_per_hour_usd)

    @property
    def total_cost(self) -> str | None:
        """What the task has cost so far, for example "$3.20"; None when the provider does not tell."""
        return _dollars(self.snapshot.total_cost_usd)

    @property
    def ssh_host(self) -> str | None:
        """Address for SSH while the task runs; None where the provider offers none (then use `shell`)."""
        return self.snapshot.ssh_host

    @property
    def ssh_port(self) -> int:
        """Port for SSH."""
        return self.snapshot.ssh_port

    @property
    def ssh_user(self) -> str:
        """User for SSH."""
        return self.snapshot.ssh_user

    @property
    def ssh_command(self) -> str | None:
        """The line to type for an SSH session, None where there is no SSH."""
        return None if self.ssh_host is None else f"ssh -p {self.ssh_port} {self.ssh_user}@{self.ssh_host}"

    @property
    def endpoints(self) -> dict[str, str]:
        """URL by exposed port."""
        return dict(self.snapshot.endpoints)

    @property
    def config(self) -> TaskConfig | None:
        """What was asked for; None once the provider has forgotten."""
        if self._config is None:
            try:
                stored = json.loads(self._engine.collect(self._task_id, "spec.json"))
            except ResourceNotFoundError:
                return None
            spec = TaskSpec.model_validate(stored["spec"])
            own = {name: value for name, value in spec.labels.items() if not name.startswith("flow/")}
            self._config = TaskConfig.from_spec(spec.model_copy(update={"labels": own}))
        return self._config

    # -- waiting and reading

    def wait(self, timeout: float | None = None) -> None:
        """Block until the task has ended, however it ended. Raises TimeoutError after `timeout` seconds."""
        if self._seen is not None and self._seen.status.final:
            return
        self._see(self._engine.wait([self._task_id], timeout=timeout)[self._task_id])

    def result(self, timeout: float | None = None) -> object:
        """Wait for success. A command's result is None; a failed task raises its error. Raises TimeoutError."""
        self.wait(timeout)
        if not self.status.succeeded:
            raise self.error()
        return None

    def error(self) -> FlowError:
        """Return the exception that says how this ended task failed."""
        return self._engine.failure(self.snapshot)

    @overload
    def logs(self, follow: Literal[False] = False, tail: int = 100, *, node: int = 0) -> str: ...
    @overload
    def logs(self, follow: Literal[True], tail: int = 100, *, node: int = 0) -> Iterator[str]: ...
    @overload
    def logs(self, follow: bool, tail: int = 100, *, node: int = 0) -> str | Iterator[str]: ...

    def logs(self, follow: bool = False, tail: int = 100, *, node: int = 0) -> str | Iterator[str]:
        """Return the last `tail` lines of output; with `follow`, an iterator over all lines until the task ends."""
        if follow:
            return self._engine.follow(self._task_id, node=node)
        return self._engine.tail(self._task_id, lines=tail, node=node)

    def read_log(self, offset: int = 0, limit: int = 65536, *, node: int = 0) -> LogChunk:
        """Return up to `limit` bytes of output from byte `offset`; go on from `next_offset` to get every byte once."""
        return self._engine.read_log(self._task_id, node=node, offset=offset, limit=limit)

    # -- acting

    def cancel(self) -> None:
        """Ask the task to stop. After return it will end, also if nobody looks; a task that has ended is left alone."""
        self._engine.cancel([self._task_id])
        self._seen = None if self._seen is None or not self._seen.status.final else self._seen

    def stop(self) -> None:
        """The same as `cancel`."""
        self.cancel()

    def release(self) -> None:
        """Free what the ended task occupies; its result and logs are gone after return."""
        self._engine.release([self._task_id])
        self._seen = None

    def shell(self, command: str | None = None, node: int | None = None) -> int:
        """Run `command` beside the task, or open an interactive shell there; return the exit code."""
        shell = self._engine.provider.shell
        if shell is None:
            raise FlowError(f"the {self._engine.provider.name} provider cannot open a shell beside a task")
        return shell.run(self._task_id, command, node=node or 0)

    def ssh(self, command: str | None = None, node: int | None = None) -> int:
        """The same as `shell`, under its other documented name."""
        return self.shell(command, node)


def _dollars(amount: float | None) -> str | None:
    return None if amount is None else f"${amount:.2f}"
