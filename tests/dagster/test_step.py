"""When a call is the same call again."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from flow_dagster.step import Step, first_run_id
from tests.dagster import jobs


def keys(folder: Path) -> list[list[str]]:
    """The keys of every try so far."""
    return [line.split() for line in (folder / "keys").read_text().splitlines()]


def run(
    instance: dg.DagsterInstance,
    options: dg.ReexecutionOptions | None = None,
    tags: dict[str, str] | None = None,
) -> dg.JobExecutionResult:
    job = dg.reconstructable(jobs.load_named_job)
    return dg.execute_job(
        job, instance=instance, reexecution_options=options, tags=tags, raise_on_error=False
    )


def run_from_failure(instance: dg.DagsterInstance, before: dg.JobExecutionResult) -> dg.JobExecutionResult:
    """Re-execute as the UI and the automatic retries of runs do; the tag is theirs."""
    options = dg.ReexecutionOptions.from_failure(before.run_id, instance)
    return run(instance, options, jobs.FROM_FAILURE)


def test_a_key_names_the_run_the_step_and_the_call(instance: dg.DagsterInstance, folder: Path) -> None:
    run_id = run(instance).run_id
    assert keys(folder)[0] == [
        f"dagster/{run_id}/named/f/1",
        f"dagster/{run_id}/named/f/2",
        f"dagster/{run_id}/named/g/1",
        f"dagster/{run_id}/named/mine",
    ]


def test_a_retry_within_the_run_has_the_same_keys(instance: dg.DagsterInstance, folder: Path) -> None:
    run(instance)
    first, second = keys(folder)
    assert first == second


def test_re_executions_from_failure_have_the_same_keys(instance: dg.DagsterInstance, folder: Path) -> None:
    first = run(instance)
    second = run_from_failure(instance, first)
    (folder / "gate").touch()
    assert run_from_failure(instance, second).success
    tries = keys(folder)
    assert len(tries) == 5
    assert all(one == tries[0] for one in tries)


def test_any_other_re_execution_has_new_keys(instance: dg.DagsterInstance, folder: Path) -> None:
    (folder / "gate").touch()
    first = run(instance)
    run(instance, dg.ReexecutionOptions(parent_run_id=first.run_id))
    before, after = keys(folder)
    assert not set(before) & set(after)


def test_without_a_run_every_call_is_new() -> None:
    step = Step(None)
    built = Step(dg.build_op_context())
    assert len({step.key("f"), step.key("f"), step.key("f", "mine"), built.key("f"), built.key("f")}) == 5
    assert (step.run_id, step.name, step.labels, step.runs_again) == (None, None, {}, False)


def test_a_deleted_run_still_names_its_successors(instance: dg.DagsterInstance, folder: Path) -> None:
    first = run(instance)
    second = run_from_failure(instance, first)
    instance.delete_run(first.run_id)
    found = instance.get_run_by_id(second.run_id)
    assert found is not None
    assert first_run_id(instance, found) == first.run_id
