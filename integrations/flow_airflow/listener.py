"""Ends work that no process is there to end, when Airflow's API server or scheduler decides that its task is over.

A running task has its worker and a deferred one the triggerer; but while a try is queued, or waits for its retry, and
after a worker has died in the last one, work may go on with nobody beside it. Those who decide then that the task has
failed, or counts as a success, tell their listeners: this one. It needs to reach the provider from where they run.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow.listeners import hookimpl
from airflow.utils.state import TaskInstanceState

from flow_airflow.nodes import TASK_ID_XCOM, labels_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow.models.dagrun import DagRun

logger = logging.getLogger(__name__)

#: The final states of tasks; of them, those of runs have the same names.
_OVER = (TaskInstanceState.FAILED, TaskInstanceState.SUCCESS, TaskInstanceState.SKIPPED)

#: A decision is looked for this often, and at these intervals.
_LOOKS, _LOOK_S = 20, 0.5


class Account(NamedTuple):
    """What the operator was told about where its work goes."""

    provider: str | None
    flow_conn_id: str | None


@hookimpl
def on_task_instance_failed(task_instance: Any) -> None:
    """Be told by the API server that a user has marked a task, or by the scheduler that it has given one up."""
    _task_is_over(task_instance)


@hookimpl
def on_task_instance_success(task_instance: Any) -> None:
    """Be told by the API server that a user has marked a task."""
    _task_is_over(task_instance)


@hookimpl
def on_dag_run_failed(dag_run: DagRun) -> None:
    """Be told that a run has failed; its tasks that were not running then are skipped without a word."""
    _workers().submit(_end_work, dag_run.dag_id, dag_run.run_id)


@hookimpl
def on_dag_run_success(dag_run: DagRun) -> None:
    """Be told that a run counts as a success, which a user may have said."""
    _workers().submit(_end_work, dag_run.dag_id, dag_run.run_id)


def _task_is_over(ti: Any) -> None:
    from airflow.models.taskinstance import TaskInstance

    # On a worker, where it is a RuntimeTaskInstance, the operator itself has seen to its work.
    if isinstance(ti, TaskInstance) and ti.state in _OVER:
        _workers().submit(_end_work, ti.dag_id, ti.run_id, ti.task_id, ti.map_index)


@cache
def _workers() -> ThreadPoolExecutor:
    """Whoever tells us has other things to do than to wait for a provider."""
    return ThreadPoolExecutor(2, thread_name_prefix="flow-listener")


def _end_work(dag_id: str, run_id: str, task_id: str | None = None, map_index: int | None = None) -> None:
    """Cancel what still runs of the tasks, of a run or of one of them, that are over."""
    try:
        _await_commit(dag_id, run_id, task_id, map_index)
        work: defaultdict[Account, dict[str, dict[str, str]]] = defaultdict(dict)
        for account, flow_task_id, labels in _work_of(dag_id, run_id, task_id, map_index):
            work[account][flow_task_id] = labels
        for account, labels_by_id in work.items():
            cancel(account, labels_by_id)
    except Exception:
        logger.exception("What %s of %s left running could not be ended", task_id or "a task", run_id)


def _await_commit(dag_id: str, run_id: str, task_id: str | None, map_index: int | None) -> None:
    """Return when others can see what we have been told: we are told before it is committed."""
    from airflow.models.dagrun import DagRun
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    if task_id is None:
        query = select(DagRun.state).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)
    else:
        query = select(TaskInstance.state).where(
            TaskInstance.dag_id == dag_id,
            TaskInstance.run_id == run_id,
            TaskInstance.task_id == task_id,
            TaskInstance.map_index == map_index,
        )
    for _ in range(_LOOKS):
        with create_session() as session:
            if session.scalar(query) in _OVER:
                return
        time.sleep(_LOOK_S)


def _work_of(
    dag_id: str, run_id: str, task_id: str | None, map_index: int | None
) -> Iterator[tuple[Account, str, dict[str, str]]]:
    """Yield what each task that is over noted about its Flow task: where, which, and the labels that it carries."""
    from airflow.models.renderedtifields import RenderedTaskInstanceFields
    from airflow.models.taskinstance import TaskInstance
    from airflow.models.xcom import XComModel
    from airflow.utils.session import create_session
    from sqlalchemy import and_, select

    of_this = [TaskInstance.dag_id == dag_id, TaskInstance.run_id == run_id, TaskInstance.state.in_(_OVER)]
    if task_id is not None:
        of_this += [TaskInstance.task_id == task_id, TaskInstance.map_index == map_index]

    def about_it(model: Any) -> Any:
        keys = ("dag_id", "run_id", "task_id", "map_index")
        return and_(*(getattr(model, key) == getattr(TaskInstance, key) for key in keys))

    fields = RenderedTaskInstanceFields
    query = (
        select(TaskInstance.task_id, TaskInstance.map_index, XComModel.value, fields.rendered_fields)
        .join(XComModel, about_it(XComModel))
        .outerjoin(fields, about_it(fields))
        .where(XComModel.key == TASK_ID_XCOM, *of_this)
    )
    with create_session() as session:
        rows = session.execute(query).all()
    for name, index, flow_task_id, rendered in rows:
        account = Account((rendered or {}).get("provider"), (rendered or {}).get("flow_conn_id"))
        yield account, flow_task_id, labels_of(dag_id, run_id, name, index)


def cancel(account: Account, labels_by_id: dict[str, dict[str, str]]) -> None:
    """Cancel those that have not ended and are the work of their Airflow task, and not only named by its XCom."""
    from flow_airflow.hooks import opener  # not at the top: every Airflow process imports this module

    flow = opener(account.provider, account.flow_conn_id)()
    left = [
        flow_task_id
        for flow_task_id, snapshot in flow.poll(list(labels_by_id)).items()
        if not snapshot.status.final and labels_by_id[flow_task_id].items() <= snapshot.labels.items()
    ]
    if left:
        logger.info("Cancelling %s: the Airflow task is over", ", ".join(left))
        flow.cancel(left)
