"""A task together with the step that started it: what is shown of it, and what its end means here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flow_core import Flow, Task
from flow_core.models import Snapshot
from flow_dagster.metadata import Seen, describe, plain
from flow_dagster.step import Step
from flow_dagster.watch import Echo


@dataclass
class Call:
    """One task of one step. `reattached` says whether an earlier try had started it; None in a first try."""

    flow: Flow
    task: Task
    step: Step
    reattached: bool | None = None
    item: int | None = None
    echo: Echo = field(init=False)

    def __post_init__(self) -> None:
        self.echo = Echo(self.task, "" if self.item is None else f"[{self.item}] ")

    def end(self, snapshot: Snapshot) -> Seen:
        """Note the end among those of the step. Call once."""
        error = None if snapshot.status.succeeded else self.task.error()
        seen = Seen(snapshot, self.flow.provider.name, self.reattached, self.item, error)
        self.step.ends().append(seen)
        if self.item is None:
            self.step.log.info("Task ended: %s", plain(describe([seen])))
        return seen

    def value(self) -> Any:
        """Return what the function returned. Raises the task's FlowError."""
        return self.task.result()
