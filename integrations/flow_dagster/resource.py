"""FlowResource: run commands and functions on GPU machines from Dagster's ops and assets.

It translates only. Submitting once per key, waiting, logs and cancelling are the engine's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from flow_core import Flow, Task, TaskConfig
from flow_core.errors import FlowError, ValidationError
from flow_dagster.call import Call
from flow_dagster.failures import as_failure
from flow_dagster.handle import FlowHandle, FlowResult
from flow_dagster.mapping import fingerprint, run_map
from flow_dagster.step import ENDED_BY_USER, Context, Step
from flow_dagster.watch import cancel, interruptible

#: Fields that say which machine is wanted: any of them replaces the resource's `gpu`.
_MACHINE_FIELDS = ("gpu", "instance_type", "min_gpu_memory_gb")


class FlowResource(dg.ConfigurableResource[Any]):
    """Runs commands and plain Python functions on GPU machines; see `run`, `invoke` and `map`.

    What is not set here comes from Flow's own configuration (`~/.flow/config.yaml`, FLOW_* variables). Every call takes
    the step's `context` (None in a plain test) and any field of TaskConfig as a keyword.

    A call is the same call when its step is retried: a task that still runs, or has succeeded, is taken over instead of
    started again, by whatever process runs the retry. Calls are told apart by the function's (or task's) name and by
    their order in the step; pass `key=` where that order can change from one try to the next.

    Failures are dg.Failure, with the remote traceback and the `flow/*` metadata. They ask for no retry where a retry
    cannot help (a wrong GPU name, arguments that cannot travel, a task that somebody cancelled).
    """

    provider: str | None = Field(default=None, description='Where tasks run, "local" for instance.')
    gpu: str | None = Field(
        default=None, description='The machine of calls that name none: "a100", "8xh100", "cpu" …'
    )
    max_price_per_hour: float | None = Field(
        default=None, description="Price limit in USD of calls that name none."
    )
    max_run_time_hours: float | None = Field(default=None, description="Time limit of calls that name none.")
    code_root: str | None = Field(
        default=None, description="Folder that travels with every call that names none."
    )
    project: str | None = Field(default=None, description="The provider's project.")
    region: str | None = Field(default=None, description="The provider's region.")
    api_key: str | None = Field(
        default=None, repr=False, description='The provider\'s key; use dg.EnvVar("MITHRIL_API_KEY").'
    )

    _flow: Flow | None = PrivateAttr(default=None)
    _started: list[tuple[str | None, str]] = PrivateAttr(default_factory=list)

    @property
    def flow(self) -> Flow:
        """The Flow object behind this resource, made at the first use."""
        if self._flow is None:
            named = {
                "provider": self.provider,
                "project": self.project,
                "region": self.region,
                "api_key": self.api_key,
            }
            self._flow = Flow(**{name: value for name, value in named.items() if value is not None})
        return self._flow

    # -- commands

    def run(
        self,
        context: Context,
        command: str | Sequence[str] | TaskConfig,
        *,
        key: str | None = None,
        **fields: Any,
    ) -> FlowResult:
        """Run a command (a string in a shell, a list as it is, or a whole TaskConfig) and wait for its end.

        What it prints is the step's output, as it comes. Only `code_root` travels, or what a TaskConfig says.
        Raises dg.Failure unless the command succeeds.
        """
        return self.submit(context, command, key=key, **fields).wait()

    def submit(
        self,
        context: Context,
        command: str | Sequence[str] | TaskConfig,
        *,
        key: str | None = None,
        **fields: Any,
    ) -> FlowHandle:
        """Start a command and return its handle at once; see `run`."""
        step = Step(context)
        if isinstance(command, TaskConfig):
            name, given = command.name, fields
        else:
            name = str(fields.get("name") or _slug(step.name) or "run")
            given = self._defaults({**self._upload(fields), "name": name})

        def start(idempotency_key: str) -> Task:
            labels = {**step.labels, **_labels(command), **given.get("labels", {})}
            return self.flow.run(command, idempotency_key=idempotency_key, **{**given, "labels": labels})

        return FlowHandle(self._start(step, name, key, start), returns_value=False)

    # -- functions

    def invoke(
        self,
        context: Context,
        module: str | os.PathLike[str] | ModuleType,
        function: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        **fields: Any,
    ) -> Any:
        """Call a plain function on a GPU machine and return its value.

        `module` is a file, a module that is imported here, or a path or dotted name inside `code_root`. Arguments and
        value travel as JSON (at most 10 MB): pass large data as paths. Raises dg.Failure, its cause the error as the
        engine tells it, when the function raises or the task ends in another way.
        """
        return self.invoke_async(context, module, function, args, kwargs, key=key, **fields).result()

    def invoke_async(
        self,
        context: Context,
        module: str | os.PathLike[str] | ModuleType,
        function: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        **fields: Any,
    ) -> FlowHandle:
        """Start a call and return its handle at once: `handle.result()` is the value; see `invoke`."""
        step = Step(context)
        start = self._call(step, module, function, args, kwargs, fields)
        return FlowHandle(self._start(step, function, key, start), returns_value=True)

    def map(
        self,
        context: Context,
        module: str | os.PathLike[str] | ModuleType,
        function: str,
        items: Iterable[Any],
        *,
        kwargs: Mapping[str, Any] | None = None,
        max_parallel: int | None = None,
        return_errors: bool = False,
        **fields: Any,
    ) -> list[Any]:
        """Call `function(item, **kwargs)` for every item, each as a task of its own; return the values in order.

        At most `max_parallel` tasks exist at once (None: all). Every item runs, also when others fail. Then dg.Failure
        names the items that failed, unless `return_errors` puts each error in its item's place. A retry of the step
        runs only the items that have not succeeded: they are recognised by their value, whatever their order.
        """
        step = Step(context)
        if max_parallel is not None and max_parallel < 1:
            raise as_failure(
                ValidationError(f"max_parallel={max_parallel} must be at least 1, or None for no limit"), {}
            )

        def start(item: int, value: Any) -> Call:
            submit = self._call(step, module, function, [value], kwargs, fields)
            return self._start(step, f"{function}[{fingerprint(value)}]", None, submit, item)

        return run_map(
            self.flow, step, list(items), start, max_parallel=max_parallel, return_errors=return_errors
        )

    # -- life in Dagster

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Cancel what a terminated step had started and was not waiting for when it was interrupted."""
        if not self._started or context.run is None or context.instance is None:
            return
        run = context.instance.get_run_by_id(context.run.run_id)
        if run is None or run.status not in ENDED_BY_USER:
            return
        started = [task_id for run_id, task_id in self._started if run_id == run.run_id]
        live = [task_id for task_id, seen in self.flow.poll(started).items() if not seen.status.final]
        if live:
            cancel(self.flow, live)

    # -- starting

    def _call(  # noqa: PLR0917  # the parts of a call, in the order in which people write them
        self,
        step: Step,
        module: str | os.PathLike[str] | ModuleType,
        function: str,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        fields: Mapping[str, Any],
    ) -> Callable[[str], Task]:
        """Return what starts the call under a key."""
        root = fields.get("code_root", self.code_root)
        given = self._defaults(
            {**fields, "code_root": root, "labels": {**step.labels, **fields.get("labels", {})}}
        )
        where = _module_path(module, root)
        return lambda key: self.flow.invoke_async(where, function, args, kwargs, idempotency_key=key, **given)

    def _start(
        self, step: Step, name: str, key: str | None, submit: Callable[[str], Task], item: int | None = None
    ) -> Call:
        """Start a task under the step's key for `name`, or the user's own. Raises dg.Failure."""
        idempotency_key = step.key(name, key)
        if step.runs_again and step.terminating:  # a retry policy answers to Terminate as well
            raise dg.Failure("The run is being terminated: nothing is started any more.", allow_retries=False)

        def half_started() -> list[str]:
            found = self.flow.find(idempotency_key)
            return [] if found is None or found.is_terminal else [found.task_id]

        try:
            with interruptible(self.flow, step, half_started):
                before = self.flow.find(idempotency_key) if step.runs_again else None
                task = submit(idempotency_key)
                self._started.append((step.run_id, task.task_id))
        except FlowError as error:
            raise as_failure(error, {}) from error
        reattached = before is not None and before.task_id == task.task_id if step.runs_again else None
        if item is None:  # a map says in the end what became of all
            said = "Taken over from an earlier try: task" if reattached else "Started task"
            step.log.info("%s %s (%s)", said, task.task_id, self.flow.provider.name)
        return Call(self.flow, task, step, reattached, item)

    def _defaults(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in what the resource says and the call does not."""
        given = dict(fields)
        for name in ("max_price_per_hour", "max_run_time_hours"):
            if given.get(name) is None and getattr(self, name) is not None:
                given[name] = getattr(self, name)
        if self.gpu is not None and not any(given.get(name) is not None for name in _MACHINE_FIELDS):
            given["instance_type"] = self.gpu
        return given

    def _upload(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A command takes the code root with it, and nothing where there is none: not Dagster's own working folder."""
        root = fields.get("code_root", self.code_root)
        return {**fields, "code_root": root, "upload_code": fields.get("upload_code", root is not None)}


def _labels(command: str | Sequence[str] | TaskConfig) -> Mapping[str, str]:
    return command.labels if isinstance(command, TaskConfig) else {}


def _slug(name: str | None) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name or "").strip("-_")[:40]


def _module_path(module: str | os.PathLike[str] | ModuleType, root: str | None) -> str | Path:
    """Return the file of an imported module, inside the code root where there is one; a path or name as it is."""
    if not isinstance(module, ModuleType):
        return module if isinstance(module, str) else Path(module)
    if not getattr(module, "__file__", None):
        raise as_failure(ValidationError(f"module {module.__name__} has no file that could travel"), {})
    file = Path(str(module.__file__))
    if root is not None and file.resolve().is_relative_to(Path(root).resolve()):
        return file.resolve().relative_to(Path(root).resolve())
    return file
