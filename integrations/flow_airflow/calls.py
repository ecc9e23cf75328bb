"""A call of a function as an Airflow task: in a Flow task of its own, or on a warm worker of a session."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flow_airflow.arguments import plain, refuse_serialization
from flow_airflow.legs import DEFERRABLE
from flow_airflow.nodes import Node
from flow_airflow.results import ResultOperator
from flow_airflow.task_fields import FIELDS, FlowTaskOperator
from flow_core.errors import FlowTimeoutError, SerializationError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from airflow.sdk import Context

    from flow_core import Flow, Future, Task

_LOOK_S = 0.5


class FunctionOperator(ResultOperator, FlowTaskOperator):
    """An operator that calls a function; the XCom is what it returns, see ResultOperator.

    With `session`, the id of a FlowStartSessionOperator's session, the call runs on a warm worker there, and its
    arguments travel as `serialization` says. It waits in Airflow's worker and a retry makes it again: a call belongs to
    the process that made it, which alone can cancel it, so `deferrable=True` is refused.
    """

    template_fields: Sequence[str] = ("op_args", "op_kwargs", "session", *FlowTaskOperator.template_fields)

    op_args: Any
    op_kwargs: Any

    def __init__(
        self,
        *,
        serialization: Literal["json", "pickle"] = "json",
        session: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.serialization = serialization
        self.session = session
        self._in_session = session is not None
        refuse_serialization(self, serialization)
        if session is not None:
            self._refuse_what_the_session_says()

    def _refuse_what_the_session_says(self) -> None:
        given = [name for name in FIELDS if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"{self._who}: {given[0]} is the session's to say, where its workers are started."
            )
        if self.deferrable and not DEFERRABLE:
            raise ValueError(
                f"{self._who}: a call in a session is not deferred: nobody but the process that made it can cancel "
                "it, so that it would run on after a user has ended the deferred task. Leave deferrable=True out, or "
                "say deferrable=False where default_args have it; for long work, leave session out."
            )
        self.deferrable = False

    @property
    def _who(self) -> str:
        """How messages name this operator."""
        return f"{self.operator_name} {self.task_id!r}"

    @abstractmethod
    def callee(self, context: Context) -> Callable[..., Any]:
        """Return the function as a session gets it."""

    def execute(self, context: Context) -> Any:
        """Make the call, in a task of its own or in the session; return its value."""
        if not self._in_session:
            return super().execute(context)
        with self.leg(context, Node.from_context(context)) as flow:
            if not self.session:
                raise ValidationError(
                    f"session={self.session!r} names no session",
                    suggestions=["Pass the XCom of a FlowStartSessionOperator that has succeeded."],
                )
            function = self.callee(context)
            self.log.info("Calling %s in session %s.", function.__name__, self.session)
            value = call_in_session(
                flow,
                self.session,
                function,
                plain(list(self.op_args or [])),
                plain(dict(self.op_kwargs or {})),
                serialization=self.serialization,
                by_reference=self.result_as == "reference",
                check=self.check_stop,
                show=lambda line: self.log.info("%s", line),
            )
            return self.checked(context, value, _refused)

    def reopen(self, flow: Flow, task_id: str) -> Task:
        """Return the handle of the call's task."""
        return flow.get_task(task_id, serialization=self.serialization, result=self.result_form)


def _refused(wrong: object) -> SerializationError:
    return SerializationError(f"the result of the call cannot be an XCom: {wrong}")


def call_in_session(  # noqa: PLR0913  # what a call is, and how it is waited for
    flow: Flow,
    session_id: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    serialization: Literal["json", "pickle"],
    by_reference: bool,
    check: Callable[[], None],
    show: Callable[[str], None],
) -> Any:
    """Call a live function on a worker of a session, one that the fewest others use; return its value, or a reference.

    `check` is called every half second. When it raises, or anything else does, the call is cancelled; the session goes
    on. `show` gets each line that the call has printed, at the end. Raises SessionClosedError when the session has
    ended, and what the call raises.
    """
    from flow_core import Session

    with Session.from_id(session_id, flow=flow) as session:
        future: Any = session.function(serialization=serialization)(function).remote(*args, **kwargs)
        try:
            _wait(future, check)
            return future.object_ref() if by_reference else future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            for line in future.logs().splitlines():
                show(line)


def _wait(future: Future, check: Callable[[], None]) -> None:
    while not future.done():
        with suppress(FlowTimeoutError):
            future.exception(_LOOK_S)
        check()


def function_of(module: str | Path, name: str) -> Callable[..., Any]:
    """Return a function that calls the function `name` of a module, which is imported where it runs and not here.

    The text of a file (`train.py`) travels and becomes a module there, once per worker for as long as it is the same; a
    dotted name is a module that is installed there. Raises ValidationError for a file that is not there.
    """
    text = str(module)
    file, stem, source = Path(text).name, Path(text).stem, ""
    if text.endswith(".py"):
        try:
            source = Path(text).read_text()
        except OSError as error:
            raise ValidationError(f"module={text!r} cannot be read: {error.strerror}") from error

    # It travels by value, as what can be found under no name does, and so uses nothing of this module.
    def call(*args: Any, **kwargs: Any) -> Any:
        import hashlib
        import importlib
        import linecache
        import sys
        import types

        known_as = text
        if text.endswith(".py"):
            known_as = f"flow_call_{stem}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
            if known_as not in sys.modules:
                made = sys.modules[known_as] = types.ModuleType(known_as)
                made.__file__ = file
                linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
                try:
                    exec(compile(source, file, "exec", dont_inherit=True), vars(made))  # noqa: S102
                except BaseException:
                    del sys.modules[known_as]
                    raise
        found = importlib.import_module(known_as)
        function = getattr(found, name, None)
        if function is None:
            there = ", ".join(key for key, one in vars(found).items() if callable(one) and key[0] != "_")
            raise AttributeError(f"{file!r} has no function {name!r}. Its functions: {there or 'none'}")
        return function(*args, **kwargs)

    call.__name__ = name
    return call
