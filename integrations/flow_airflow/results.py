"""How a node's result reaches the next task: as a value, as a reference, or with words that say why not.

A result that an XCom cannot take is not lost and the work is not repeated: it stays with its Flow task, and whoever
tries again, or clears the failed task, collects it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from airflow.configuration import conf
from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.execution_time.xcom import XCom

from flow_airflow.hooks import opener
from flow_airflow.legs import FlowOperator
from flow_airflow.nodes import TASK_ID_XCOM
from flow_airflow.xcom_values import Flaw, flaw, without_nan
from flow_core import ObjectRef
from flow_core.errors import FlowError, ResultError, SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.sdk import Context

    from flow_airflow.nodes import Node
    from flow_core import Flow, Task

ResultAs = Literal["auto", "value", "reference"]

#: From here on "auto" means a reference. Airflow's API server holds an XCom in memory, and its database for ever.
REFERENCE_OVER_BYTES = 1024 * 1024

#: So many bytes that no result is passed by reference for its size; but it may be taken so later.
_NEVER = 2**63

#: The key under which Airflow stores what `execute` returns.
_RETURN_VALUE = "return_value"

#: What else can be done about a result that is there but cannot come, by the error's code.
_COLLECTABLE = {
    "result-pickled": ('Let it come as a pickle, if you trust the machine: serialization="pickle".',),
    "result-too-large": (),
}


class ResultOperator(FlowOperator):
    """An operator whose Flow task returns a value: what becomes of it as an XCom.

    With `result_as="auto"` a result of up to `reference_over_bytes` is the XCom, a larger one stays where it is and its
    reference is the XCom: the next Flow node gets the value by itself, `flow_airflow.load()` gets it anywhere else.
    "value" and "reference" say one of the two for every size. A result that is mapped over, or is stored as
    `multiple_outputs`, is a value.

    The next task gets a value that is equal and of the same type, or this one fails and says which part of the result
    is to blame. `nan_as_none=True` hands on None for nan and infinities, for which JSON has no form.
    """

    def __init__(
        self,
        *,
        result_as: ResultAs = "auto",
        reference_over_bytes: int = REFERENCE_OVER_BYTES,
        nan_as_none: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.result_as = result_as
        self.reference_over_bytes = reference_over_bytes
        self.nan_as_none = nan_as_none
        who = f"{type(self).__name__} {self.task_id!r}"
        if result_as not in ("auto", "value", "reference"):
            raise ValueError(f"{who}: result_as={result_as!r} is neither 'auto', 'value' nor 'reference'.")
        if result_as == "reference" and self.multiple_outputs:
            raise ValueError(
                f"{who}: multiple_outputs stores parts of the result, which a reference has not."
            )

    @property
    def result_form(self) -> Literal["ref"] | int:
        """How flow_core is to bring the result: a reference, or a value of at most so many bytes."""
        if self.result_as == "reference":
            return "ref"
        if self.result_as == "value" or self.multiple_outputs or _mapped_over(self):
            return _NEVER
        return self.reference_over_bytes

    def outcome(self, task: Task) -> Any:
        """Return the value of an ended task. Raises what says how it failed."""
        return task.result(timeout=0)

    def value(self, context: Context, task: Task) -> Any:
        """Return the XCom of an ended task. Raises SerializationError, with the way out, for what it would lose."""
        try:
            value = self.outcome(task)
        except ResultError as error:
            if error.error_code not in _COLLECTABLE:
                raise
            ways = [*_COLLECTABLE[error.error_code], *_ways_out(task.task_id)]
            raise SerializationError(
                f"the result of Flow task {task.task_id} cannot be an XCom: {error.message}", suggestions=ways
            ) from error
        return self.checked(context, value, partial(_refused, task_id=task.task_id))

    def checked(self, context: Context, value: Any, refused: Callable[[Flaw], SerializationError]) -> Any:
        """Return the XCom that a value becomes. Raises what `refused` makes of the part that no XCom can take."""
        if not self.do_xcom_push:
            return value
        if self.nan_as_none:
            value, replaced = without_nan(value)
            if replaced:
                more = f" and {len(replaced) - 1} more" if len(replaced) > 1 else ""
                self.log.warning("%s%s: no number. None is handed on in its place.", replaced[0], more)
        wrong = self.flaw_of(context, value)
        if wrong is not None:
            raise refused(wrong)
        if value is None and context["ti"].map_index is not None and context["ti"].map_index >= 0:
            # Airflow stores no None, and the list of what a mapped task returned would be one shorter.
            context["ti"].xcom_push(key=_RETURN_VALUE, value=None)
        return value

    def flaw_of(self, context: Context, value: Any) -> Flaw | None:
        """Return what of a value no XCom can take, None where all of it can be one."""
        mapping = None if _is_mapped(context) else _mapped_over(self)
        if mapping is not None and (wrong := _unmappable(value)):
            return Flaw("", f"{wrong}, and {mapping!r} maps over it")
        if self.multiple_outputs and (wrong := _no_outputs(value)):
            return Flaw("", f"{wrong}, and multiple_outputs stores each value of a dict under its key")
        return flaw(value) if _keeps_airflows_rules() else None

    def adopt(self, context: Context, flow: Flow, node: Node) -> Task | None:
        """Return the task that ended well before this one was cleared, if no XCom has taken its result and one can."""
        task_id = _uncollected(context, flow, node) if self.do_xcom_push else None
        if task_id is None:
            return None
        task = self.reopen(flow, task_id)
        try:
            value = self.value(context, task)
        except FlowError as error:
            self.log.warning(
                "The result of Flow task %s still cannot be handed on: %s", task_id, error.message
            )
            return None
        if value is None:  # which is no XCom, so that this may well have been a success
            return None
        self.log.info(
            "Collecting the result of Flow task %s, which ended before this task was cleared: no XCom has taken it. "
            "Clear this task once more to run the work again.",
            task_id,
        )
        return task


def _uncollected(context: Context, flow: Flow, node: Node) -> str | None:
    """Return the id of the node's task from before a clear if that succeeded, and its result never became an XCom."""
    server: Any = getattr(context["ti"], "_ti_context_from_server", None)
    stored = getattr(server, "xcom_keys_to_clear", None) or ()  # what the try before has left behind
    if TASK_ID_XCOM not in stored or _RETURN_VALUE in stored:
        return None
    for earlier in node.predecessors:
        task = flow.find(earlier.key)
        if task is not None:
            return task.task_id if task.status.succeeded else None
    return None


def _refused(wrong: Flaw, task_id: str) -> SerializationError:
    nan = ["Hand on None in its place: nan_as_none=True."] if wrong.is_nan else []
    return SerializationError(
        f"the result of Flow task {task_id} cannot be an XCom: {wrong}",
        suggestions=[*nan, *_ways_out(task_id)],
    )


def _ways_out(task_id: str) -> list[str]:
    """Say what can be done about a result that is there and that no XCom can take."""
    return [
        'Hand on a reference: result_as="reference". The next Flow node gets the value as it is, any other task loads '
        "it with flow_airflow.load().",
        f"The work is done, and its result is kept with Flow task {task_id}: change the operator and clear this "
        "task. It then collects that result and runs nothing again.",
    ]


def load(value: Any, *, flow_conn_id: str | None = None, allow_pickle: bool = False) -> Any:
    """Return an XCom with the values in place of the references in it, at any depth; what holds none is returned as is.

    `flow_conn_id` is that of the operator that made them, if it has one. `allow_pickle=True` says that you trust
    whoever wrote them, which a result of `serialization="pickle"` needs. Raises ObjectNotFoundError for a value that is
    gone, ObjectError for one that is damaged or not to be read here.
    """

    @cache
    def flow() -> Flow:
        return opener(None, flow_conn_id)()

    def loaded(one: Any) -> Any:
        if ObjectRef.stands_in(one):
            return flow().objects.get(one, allow_pickle=allow_pickle)
        if isinstance(one, Mapping):
            return {key: loaded(part) for key, part in one.items()}
        if isinstance(one, tuple):
            return tuple(map(loaded, one))
        if isinstance(one, Sequence) and not isinstance(one, str | bytes | bytearray):
            return [loaded(part) for part in one]  # also of what stands for the XComs of a mapped task
        return one

    return loaded(value)


def _mapped_over(operator: ResultOperator) -> str | None:
    """Return the id of a task that is mapped over this one's result, None where there is none."""
    follower = next(iter(operator.iter_mapped_dependants()), None) if operator.has_dag() else None  # type: ignore[no-untyped-call]
    return None if follower is None else follower.node_id


def _is_mapped(context: Context) -> bool:
    return bool(getattr(context["ti"], "is_mapped", False))


def _unmappable(value: Any) -> str:
    if isinstance(value, ObjectRef):
        return "is a reference"
    if not isinstance(value, dict | list | tuple):
        return "is None" if value is None else f"is a {type(value).__name__}"
    most = conf.getint("core", "max_map_length", fallback=1024)
    return f"has {len(value):,} parts, more than core.max_map_length={most}" if len(value) > most else ""


def _no_outputs(value: Any) -> str:
    if not isinstance(value, dict) or isinstance(value, ObjectRef):
        return f"is a {type(value).__name__} and no dict"
    taken = [key for key in value if key in ("", _RETURN_VALUE, TASK_ID_XCOM)]
    return f"has the key {taken[0]!r}, which is not free" if taken else ""


def _keeps_airflows_rules() -> bool:
    """Whether XComs are stored as Airflow does it; another backend has its own rules, and its own errors."""
    if XCom.serialize_value is BaseXCom.serialize_value:
        return True
    # Airflow's own backend for object storage stores the same values.
    return any(one.__name__ == "XComObjectStorageBackend" for one in XCom.__mro__)
