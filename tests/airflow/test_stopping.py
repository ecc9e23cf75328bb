"""Why does Airflow end this try? A signal says nothing; the state that Airflow shows at that moment does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flow_airflow.compat import AirflowException
from flow_airflow.stopping import Stop, next_try_takes_over
from flow_core import Flow, Task


def context(answer: Any, *, retries: int = 1, map_index: int = -1) -> Any:
    """The context of a first try, in whose Airflow a question for the task's state gets `answer`."""

    def get_task_states(**asked: Any) -> Any:
        assert asked == {"dag_id": "dag", "task_ids": ["node"], "run_ids": ["run"], "map_index": map_index}
        if isinstance(answer, Exception):
            raise answer
        return answer

    ti = SimpleNamespace(
        dag_id="dag", run_id="run", task_id="node", map_index=map_index, try_number=1, max_tries=retries
    )
    ti.get_task_states = get_task_states
    return {"ti": ti}


@pytest.mark.parametrize("state", ["failed", "success", "skipped", "restarting", "removed"])
def test_what_a_user_or_a_deadline_has_ended_is_not_taken_over(state: str) -> None:
    assert not next_try_takes_over(context({"run": {"node": state}}))


@pytest.mark.parametrize("state", ["running", "up_for_retry", "scheduled", "queued", None])
def test_what_a_worker_ends_by_itself_is_taken_over_by_the_next_try(state: str | None) -> None:
    assert next_try_takes_over(context({"run": {"node": state}}))
    assert next_try_takes_over(context({"run": {"node_3": state}}, map_index=3))


def test_without_a_next_try_nothing_is_taken_over() -> None:
    assert not next_try_takes_over(context({"run": {"node": "running"}}, retries=0))


def test_an_airflow_that_does_not_answer_has_not_said_that_a_user_wants_the_end() -> None:
    assert next_try_takes_over(context(ConnectionError("no answer")))


@pytest.fixture
def work(home: Path) -> Task:
    return Flow(provider="local").run(["sleep", "60"], upload_code=False, idempotency_key="work")


def stop(*, taken_over: bool) -> Stop:
    return Stop(lambda: Flow(provider="local"), "work", lambda: taken_over)


def test_a_stop_ends_the_work(work: Task) -> None:
    stopping = stop(taken_over=False)
    stopping.check()
    stopping.request(ask=True)
    with pytest.raises(AirflowException, match="cancelled"):
        stopping.check()
    work.wait(30)
    assert work.status.value == "cancelled"


def test_a_stop_leaves_the_work_to_whoever_takes_it_over(work: Task) -> None:
    stopping = stop(taken_over=True)
    stopping.request(ask=True)
    with pytest.raises(AirflowException, match="goes on"):
        stopping.check()
    work.refresh()
    assert not work.is_terminal


def test_when_the_time_is_up_nobody_is_asked(work: Task) -> None:
    stopping = stop(taken_over=True)
    stopping.request(ask=False)
    stopping.wait(30)
    work.wait(30)
    assert work.status.value == "cancelled"
