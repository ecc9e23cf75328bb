"""What operators are given: what is refused when the DAG is read, and what becomes of it before it travels. Pure."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_core.errors import close_names

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator, Context


def refuse_unknown(operator: type[BaseOperator], left: Iterable[str]) -> None:
    """Raise TypeError, with the names that look alike, if an argument that is `left` is not one of Airflow's own."""
    airflows, ours = _parameters(operator, airflows=True), _parameters(operator, airflows=False)
    for name in left:
        if name not in airflows and not name.startswith("_airflow_"):
            near = "".join(f" Did you mean {one!r}?" for one in close_names(name, airflows | ours))
            if name == "idempotency_key":
                near = " Airflow says who the node is, and its key follows from that."
            raise TypeError(f"{operator.__name__} takes no argument {name!r}.{near}")


def _parameters(operator: type[BaseOperator], *, airflows: bool) -> set[str]:
    """Return the names of the arguments that Airflow's classes, or others, among an operator's take."""
    inits = [
        vars(one)["__init__"]
        for one in operator.__mro__
        if "__init__" in vars(one) and one.__module__.startswith("airflow.") is airflows and one is not object
    ]
    return {name for init in inits for name in inspect.signature(init).parameters} - {"self", "kwargs"}


def refuse_serialization(operator: BaseOperator, given: str) -> None:
    """Raise ValueError for a way to send values that there is not."""
    if given not in ("json", "pickle"):
        who = f"{type(operator).__name__} {operator.task_id!r}"
        raise ValueError(f"{who}: serialization={given!r} is neither 'json' nor 'pickle'.")


def beside_dag_file(context: Context, path: str | Path) -> Path:
    """Return a path that is relative to the DAG file: a worker's current folder says nothing."""
    return Path(context["dag"].fileloc).parent / Path(path).expanduser()


def plain(value: Any) -> Any:
    """Load the lazy sequences that stand for the XComs of mapped tasks, at any depth of dicts, lists and tuples."""
    if type(value) is dict:
        return {key: plain(one) for key, one in value.items()}
    if type(value) is tuple:
        return tuple(plain(one) for one in value)
    if type(value) is list or (
        isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | tuple | list)
    ):
        return [plain(one) for one in value]
    return value


def text(value: Any) -> Any:
    """Write a number as text: a template that is rendered to a native object makes numbers of what was text."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Write the numbers among the values as text."""
    return {name: text(value) for name, value in values.items()}


def each(given: Any) -> list[Any]:
    """Return what is there of one thing, or of lists of them at any depth: a task that did not run has left None."""
    if given is None or isinstance(given, str):
        return [given] if given else []
    return [one for part in plain(given) for one in each(part)]
