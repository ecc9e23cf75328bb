"""A body that cannot run without Prefect is refused before anything is submitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import prefect
import pytest
from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.variables import Variable

from flow_core import ValidationError
from flow_prefect.checks import check_body


@task
def prepare() -> int:
    return 1


@flow
def subflow() -> int:
    return 1


def helper() -> Any:
    return prepare()


class Model:
    def fit(self) -> Any:
        return prepare()


@task
def calls_a_task() -> Any:
    return prepare()


@task
def submits_a_task_in_a_comprehension() -> list[Any]:
    return [prepare.submit() for _ in range(3)]


@task
def calls_a_flow() -> Any:
    return subflow()


@task
def uses_the_module() -> None:
    prefect.get_run_logger().info("hello")


@task
def imports_prefect() -> None:
    from prefect.artifacts import create_link_artifact  # noqa: F401


@task
def makes_an_artifact() -> None:
    create_markdown_artifact("# done")


@task
def reads_a_variable() -> Any:
    return Variable.get("name")


@task
def asks_a_helper() -> Any:
    return helper()


@task
def uses_a_class() -> Any:
    return Model().fit()


def enclosing() -> Callable[..., Any]:
    inner = prepare

    @task
    def closes_over_a_task() -> Any:
        return inner()

    return closes_over_a_task


REFUSED: list[tuple[Any, str]] = [
    (calls_a_task, "prepare is a Prefect task"),
    (submits_a_task_in_a_comprehension, "prepare is a Prefect task"),
    (calls_a_flow, "subflow is a Prefect flow"),
    (uses_the_module, "prefect is part of Prefect"),
    (imports_prefect, "'import prefect.artifacts' is an import of Prefect"),
    (makes_an_artifact, "create_markdown_artifact is part of Prefect"),
    (reads_a_variable, "Variable is part of Prefect"),
    (asks_a_helper, "prepare is a Prefect task"),
    (uses_a_class, "prepare is a Prefect task"),
    (enclosing(), "inner is a Prefect task"),
]


@pytest.mark.parametrize(("refused", "why"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_prefect_in_a_body_is_named(refused: Task[Any, Any], why: str) -> None:
    with pytest.raises(ValidationError) as error:
        check_body(refused)
    assert f"task {refused.name!r} uses Prefect in its body: {why}" in str(error.value)
    assert error.value.suggestions


@task
def logs() -> None:
    get_run_logger().info("hello")


@task
def has_an_attribute_called_task(thing: Any) -> Any:
    return thing.task, thing.flow, sorted([3, 1, 2])


@task
def recurses_in_a_helper() -> Any:
    return countdown(3)


def countdown(n: int) -> int:
    return 0 if n == 0 else countdown(n - 1)


@pytest.mark.parametrize("fine", [logs, has_an_attribute_called_task, recurses_in_a_helper])
def test_a_body_without_prefect_passes(fine: Task[Any, Any]) -> None:
    check_body(fine)


def test_a_generator_is_refused() -> None:
    @task
    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(ValidationError, match=r"generator.*\n.*Return a list"):
        check_body(numbers)
