"""`@task.flow_gpu`: a function of the DAG file, as it is, on a GPU machine. Only translates."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from airflow.sdk.bases.decorator import DecoratedOperator, task_decorator_factory
from airflow.sdk.definitions.context import KNOWN_CONTEXT_KEYS

from flow_airflow.arguments import plain
from flow_airflow.calls import FunctionOperator

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from airflow.sdk import Context
    from airflow.sdk.bases.decorator import TaskDecorator

    from flow_airflow.nodes import Node
    from flow_core import Flow, Task


class FlowGPUDecoratedOperator(DecoratedOperator, FunctionOperator):
    """A call of a live function as an Airflow task: what `@task.flow_gpu` makes.

    The function travels by value with what it refers to: closures, and helpers and classes of the DAG file. What is
    installed travels by name, so the machine needs it too, and the same Python minor version. Airflow is not there:
    context variables are not filled in. Arguments may be anything that can be pickled; `serialization` governs the
    value, JSON by default. What `session` means is FunctionOperator's to say.
    """

    template_fields: Sequence[str] = FunctionOperator.template_fields
    custom_operator_name = "@task.flow_gpu"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_context(python_callable, len(op_args or ()), op_kwargs or {})
        super().__init__(python_callable=python_callable, op_args=op_args, op_kwargs=op_kwargs, **kwargs)

    @property
    def is_async(self) -> bool:
        """Whether Airflow's worker has to await something: the function runs elsewhere, whatever it is."""
        return False

    def callee(self, context: Context) -> Callable[..., Any]:  # noqa: ARG002  # what the other operator needs
        """Return the function itself."""
        return self.python_callable

    def submit(self, context: Context, flow: Flow, node: Node) -> Task:
        """Submit the call, under the node's key."""
        return flow.call_async(
            self.python_callable,
            plain(list(self.op_args)),
            plain(dict(self.op_kwargs)),
            serialization=self.serialization,
            replace=list(_plain_functions(self.python_callable)),
            idempotency_key=node.key,
            result=self.result_form,
            **self.task_fields(context, node),
        )


def flow_gpu_task(
    python_callable: Callable[..., Any] | None = None, multiple_outputs: bool | None = None, **kwargs: Any
) -> TaskDecorator:
    """Make a function a task that runs on a machine with GPUs: `@task.flow_gpu(gpu="a100")`.

    Keywords are those of FlowGPUDecoratedOperator: the fields of TaskConfig, `provider`, `flow_conn_id`,
    `deferrable`, `serialization`, `session`, `result_as`, and Airflow's own.
    """
    return task_decorator_factory(
        python_callable=python_callable,
        multiple_outputs=multiple_outputs,
        decorated_operator_class=FlowGPUDecoratedOperator,
        **kwargs,
    )


def _refuse_context(function: Callable[..., Any], given: int, named: Mapping[str, Any]) -> None:
    """Raise TypeError if the function wants Airflow to fill an argument in."""
    for index, name in enumerate(inspect.signature(function).parameters):
        if name in KNOWN_CONTEXT_KEYS and index >= given and name not in named:
            raise TypeError(
                f"@task.flow_gpu {function.__name__!r} asks for Airflow's context variable {name!r}, which there is "
                "only in Airflow's worker, and not on the machine that runs the function. Pass what it needs as an "
                f"argument, from a template: {function.__name__}(run='{{{{ run_id }}}}'), or from a @task before it."
            )


def _plain_functions(function: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the decorated tasks that a function may refer to, each with its plain function.

    In a DAG file the name of a function stands for its task; in a call of itself, or of another one, it means the
    function.
    """
    plain_function = inspect.unwrap(function)
    cells = [
        cell.cell_contents for cell in getattr(plain_function, "__closure__", None) or () if _filled(cell)
    ]
    for value in [*getattr(plain_function, "__globals__", {}).values(), *cells]:
        if getattr(type(value), "_airflow_is_task_decorator", False):
            yield value, value.function


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises where nothing is in it yet
    except ValueError:
        return False
    return True
