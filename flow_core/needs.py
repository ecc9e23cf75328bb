"""What a call needs before it can be sent: values by reference, and the values of other calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flow_core import encoding, losses, staying
from flow_core.errors import FlowError
from flow_core.futures import Future

if TYPE_CHECKING:
    from flow_core.definitions import Definition
    from flow_core.dispatch import Pool
    from flow_core.object_ref import ObjectRef
    from flow_core.objects import Carried


def complete(pool: Pool, made: Future) -> FlowError | None:
    """Add to a call what workers need for its references; return what is wrong with one of its arguments."""
    if len(made.body.body) > encoding.MOST_BYTES:
        raise encoding.too_large(made.name, len(made.body.body))
    if made.definition.lacking:
        _provide(pool, made.definition)
    return _look_up(pool, made) if made.body.refs else None


def _look_up(pool: Pool, made: Future) -> FlowError | None:
    """Add what its worker needs to get the values of its references; return what is wrong with one of them."""
    try:
        carried = _carried(pool, made.body.refs, made.definition.codec)
    except FlowError as error:
        return error
    made.body = made.body._replace(carried=carried)
    return None


def _provide(pool: Pool, definition: Definition) -> None:
    """Add what workers need for the references in a function, or in the object of a method."""
    for one in list(definition.lacking):
        if not one.frame:
            one.provide(_carried(pool, one.refs, one.codec))
    definition.lacking.clear()


def _carried(pool: Pool, refs: Sequence[ObjectRef], codec: str) -> Carried:
    return pool.flow.objects.carried(
        refs,
        provider=pool.flow.provider.name,
        contained=pool.spec.machine()["image"] is not None,
        allow_pickle=codec == "pickle",
    )


def wait_for(pool: Pool, future: Future, inputs: Sequence[Future]) -> None:
    """Have a call queued once its inputs are there, or ended with the error of one of them. Returns at once."""
    missing = len(inputs)

    def ended(producer: Future) -> None:
        if staying.is_elsewhere(producer, pool.task_id):
            staying.bring(producer, lambda error: one_less(producer, error))
        else:
            one_less(producer, producer.error)

    def one_less(producer: Future, error: BaseException | None) -> None:
        nonlocal missing
        with pool.lock:
            missing -= 1
            ready = missing == 0
        if error is not None:
            _fail_for(pool, future, error, producer.name)
        elif ready:
            _inputs_are_there(pool, future)

    for producer in inputs:
        if producer.runs.task_id == pool.task_id:
            producer.runs.let_stay(producer)
        if not producer.runs_later(ended):
            ended(producer)


def follow(pool: Pool) -> None:
    """The session goes on elsewhere: have brought what calls need of what has stayed where it was."""
    with pool.lock:
        left = [
            (future, producer)
            for future in pool.unended()
            if future.body is not None
            for producer in future.body.inputs
            if staying.is_elsewhere(producer, pool.task_id)
        ]
    for future, producer in left:
        try:
            producer.result()
        except FlowError as error:
            _fail_for(pool, future, error, producer.name)


def _inputs_are_there(pool: Pool, future: Future) -> None:
    with pool.lock:
        if future in pool.waiting:  # or it has ended meanwhile
            pool.waiting.remove(future)
            pool.queue.append(future)
    pool.fill_all()


def _fail_for(pool: Pool, future: Future, cause: BaseException, producer: str) -> None:
    error = losses.copy_of(cause)
    error.__cause__ = cause
    if isinstance(error, FlowError):
        error.message = f"{future.name!r} was not called: its input {producer!r} failed: {error.message}"
    pool.finish(future, error)
    pool.fill_all()
