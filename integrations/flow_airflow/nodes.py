"""Who a task instance is, as far as Flow needs to know: its key, its name, its labels. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The XCom that holds the id of the Flow task while it runs, for FlowTaskSensor, the listener and for people.
TASK_ID_XCOM = "flow_task_id"


@dataclass(frozen=True)
class Node:
    """One task instance between two clears.

    Two tries have equal nodes exactly when the later is a retry of the earlier, and so may adopt its work.
    """

    dag_id: str
    run_id: str
    task_id: str
    map_index: int
    #: The number of the first try since the task was last cleared. Airflow stores no such number, but a clear
    #: sets `max_tries = try_number + retries` and a retry leaves it alone, so this follows from it; Airflow's
    #: own `get_first_reschedule_date` computes it the same way.
    epoch: int
    #: When the DAG run started. A deleted run that is created again under its id is not the same run, and
    #: neither is the run of another Airflow that has the same DAGs, as staging and production have.
    run_started: datetime | None
    retries: int = 0

    @classmethod
    def from_context(cls, context: Mapping[str, Any]) -> Node:
        """Read the node from the context that Airflow hands to `execute`."""
        ti, task, dag_run = context["ti"], context["task"], context["dag_run"]
        return cls(
            dag_id=ti.dag_id,
            run_id=ti.run_id,
            task_id=ti.task_id,
            map_index=-1 if ti.map_index is None else ti.map_index,
            epoch=ti.max_tries - (task.retries or 0) + 1,
            run_started=dag_run.start_date,
            retries=task.retries or 0,
        )

    @property
    def predecessors(self) -> list[Node]:
        """The nodes that this one may have been before it was last cleared, the likeliest first; most never were."""
        oldest = max(1, self.epoch - 1 - self.retries)
        return [replace(self, epoch=epoch) for epoch in range(self.epoch - 1, oldest - 1, -1)]

    @property
    def key(self) -> str:
        """The idempotency key under which this node's work is submitted, adopted and found."""
        started = None if self.run_started is None else self.run_started.astimezone(timezone.utc).isoformat()
        parts = ["airflow", self.dag_id, self.run_id, self.task_id, self.map_index, self.epoch, started]
        return json.dumps(parts, separators=(",", ":"))

    @property
    def name(self) -> str:
        """A name for people, made of the characters that task names may have."""
        index = "" if self.map_index < 0 else f"-{self.map_index}"
        readable = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{self.dag_id}-{self.task_id}").strip("-_")
        return (readable[: 60 - len(index)] or "task") + index

    @property
    def labels(self) -> dict[str, str]:
        """What the task carries so that a person who finds it knows where it came from."""
        return labels_of(self.dag_id, self.run_id, self.task_id, self.map_index)


def labels_of(dag_id: str, run_id: str, task_id: str, map_index: int) -> dict[str, str]:
    """Return the labels of a task instance's Flow task."""
    labels = {"airflow/dag_id": dag_id, "airflow/run_id": run_id, "airflow/task_id": task_id}
    return labels if map_index < 0 else {**labels, "airflow/map_index": str(map_index)}


def will_retry(context: Mapping[str, Any]) -> bool:
    """Whether Airflow starts another try if this one fails in a way that may be retried."""
    ti = context["ti"]
    return bool(ti.max_tries) and ti.try_number <= ti.max_tries
