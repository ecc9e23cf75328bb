"""Where in Dagster a call stands: what makes it the same call again, where its metadata goes, who ended the run.

Everything that knows Dagster's contexts is here. Nothing here knows tasks.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import dagster as dg

Context: TypeAlias = dg.OpExecutionContext | dg.AssetExecutionContext | dg.AssetCheckExecutionContext | None
"""What ops, assets and asset checks get as `context`; None in a plain test."""

#: A re-execution "from failure" carries one of these; the other kinds mean to run everything again.
_RESUME_TAGS = ("dagster/is_resume_retry", "dagster/is_asset_resume_retry")

#: What a run is when somebody has asked Dagster to end it.
ENDED_BY_USER = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)

#: How often each name was called within one attempt of one step. Keyed by Dagster's own object for that attempt.
_calls: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()

#: The ends of the tasks of one attempt of one step.
_ends: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


class Step:
    """One attempt of a Dagster step, or no step at all: `context` None, or one that a test built."""

    def __init__(self, context: Context) -> None:
        self._op: Any = getattr(context, "op_execution_context", context)
        self._attempt: Any = _attempt(self._op)
        self._own_ends: list[Any] = []

    def key(self, name: str, given: str | None = None) -> str:
        """Return what makes the next call of `name` in this step the same call when the step runs again.

        It is made of the run where the work was first asked for, the step (with its mapping key), the name and how
        often the step has called that name; `given` takes the place of the last two. So a retry of the step, by
        whatever process, gets the same key: within the run, in a resumed run, and in a re-execution from failure. Any
        other re-execution gets new keys. Outside of a run nothing is asked for twice, and every key is new.
        """
        if self._attempt is None:
            return f"dagster/{uuid.uuid4()}"
        if given is None:
            calls = _calls.setdefault(self._attempt, Counter())
            calls[name] += 1
            given = f"{name}/{calls[name]}"
        return "/".join(("dagster", self._first_run_id, self._attempt.step.key, given))

    @cached_property
    def _first_run_id(self) -> str:
        return first_run_id(self._op.instance, self._op.run)

    @property
    def runs_again(self) -> bool:
        """Whether an earlier try of this step may have started something."""
        return self._attempt is not None and (
            self._op.retry_number > 0 or self._first_run_id != self._op.run_id
        )

    @property
    def run_id(self) -> str | None:
        """The Dagster run, None outside of one."""
        return None if self._attempt is None else str(self._op.run_id)

    @property
    def name(self) -> str | None:
        """The step's key, None outside of a run."""
        return None if self._attempt is None else str(self._attempt.step.key)

    @property
    def labels(self) -> dict[str, str]:
        """What a person who finds the task wants to know about who started it."""
        if self._attempt is None:
            return {}
        labels = {
            "dagster/run_id": self._op.run_id,
            "dagster/job": self._op.job_name,
            "dagster/step": self._attempt.step.key,
        }
        if self._op.has_partition_key:
            labels["dagster/partition"] = self._op.partition_key
        return labels

    @property
    def log(self) -> logging.Logger:
        """Dagster's log of the run; Python's own outside of one."""
        return logging.getLogger(__name__) if self._op is None else self._op.log

    def ended_by_user(self) -> bool:
        """Whether an interrupt is the user's: only the run's status tells it from that of a dying process.

        Outside of a run, and in one that no other process can ever continue, it is always the user's.
        """
        return self._attempt is None or self._op.instance.is_ephemeral or self.terminating

    @property
    def terminating(self) -> bool:
        """Whether somebody has asked Dagster to end this run."""
        try:
            run = self._op.instance.get_run_by_id(self._op.run_id)
        except Exception:  # the instance may be what is going down
            self.log.warning("Cannot read the run's status: taken for not terminated.", exc_info=True)
            return False
        return run is not None and run.status in ENDED_BY_USER

    def ends(self) -> list[Any]:
        """The ends of all tasks of this attempt of the step so far: a list to append to."""
        return self._own_ends if self._attempt is None else _ends.setdefault(self._attempt, [])

    def attach(self, metadata: Mapping[str, Any]) -> None:
        """Put `metadata` on every output of this step that is not dynamic: asset page and run events show it."""
        if self._op is None:
            return
        if self._attempt is None:
            self._attach_in_test(metadata)
            return
        for output in self._op.op_def.output_defs:
            if output.name in self._op.selected_output_names and self._open(output):
                self._op.add_output_metadata(metadata, output_name=output.name)

    def _open(self, output: dg.OutputDefinition) -> bool:
        return not output.is_dynamic and not self._attempt.has_seen_output(output.name)

    def _attach_in_test(self, metadata: Mapping[str, Any]) -> None:
        """A context from `build_op_context` accepts metadata once per output, and only while an op is called."""
        properties = getattr(self._op, "per_invocation_properties", None)
        outputs = [] if properties is None else self._op.op_def.output_defs
        for output in outputs:
            if not output.is_dynamic and self._op.get_output_metadata(output.name) is None:
                self._op.add_output_metadata(metadata, output_name=output.name)


def first_run_id(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """Return the run that `run` continues: back through re-executions from failure, and no further.

    Those of the UI, of GraphQL and of automatic retries carry a tag that says so. Any other may have another
    configuration, and so other arguments; `ReexecutionOptions.from_failure` in Python counts among those
    unless `tags={"dagster/is_resume_retry": "true"}` is passed with it.
    """
    seen = {run.run_id}
    while run.parent_run_id and any(run.tags.get(tag) == "true" for tag in _RESUME_TAGS):
        if run.parent_run_id in seen:
            break
        seen.add(run.parent_run_id)
        before = instance.get_run_by_id(run.parent_run_id)
        if before is None:  # deleted meanwhile: its id is all that is needed, unless it continued another run
            return run.parent_run_id
        run = before
    return run.run_id


def _attempt(op: Any) -> Any:
    """Dagster's object for this attempt of the step; None where a test built the context."""
    try:
        return None if op is None else op.get_step_execution_context()
    except dg.DagsterError:
        return None
