"""Flow: settings, a provider and an engine in one object."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flow_core import config, providers
from flow_core.calls import (
    InvokeTask,
    ResultForm,
    Serialization,
    completed,
    live_call,
    named_call,
    reference_over,
    task_name,
)
from flow_core.engine import SPEC_LABEL, Engine
from flow_core.errors import FlowError, ObjectNotFoundError, ProviderError, ValidationError
from flow_core.ids import random_key
from flow_core.models import Instance, LogChunk, LogPosition, Snapshot, SpecFile, TaskConfig, TaskSpec, Volume
from flow_core.object_ref import ObjectRef, pickled_refs, revived
from flow_core.objects import Objects
from flow_core.providers.spi import Provider, Volumes
from flow_core.requirements import meets, parse_requirements
from flow_core.task import KIND_LABEL, Task


class _How(NamedTuple):
    """What a call asks for beyond its task."""

    key: str | None
    serialization: Serialization
    result: ResultForm | None


class Flow:
    """Submits tasks to one provider and finds them again.

    `provider` is a name ("local") or a Provider; further settings override the configuration file and the environment.
    Cheap to make, thread-safe, and stateless: two Flow objects with the same settings see the same tasks.
    """

    def __init__(self, provider: str | Provider | None = None, **settings: Any) -> None:
        if isinstance(provider, str):
            settings["provider"] = provider
        self.settings = config.load(**settings)
        if self.settings.debug:
            _log_to_stderr()
        self.provider = provider if isinstance(provider, Provider) else providers.load(self.settings)
        self.engine = Engine(self.provider)
        self.objects = Objects(self.settings, self.engine)

    # -- running

    def run(
        self,
        command_or_config: str | Sequence[str] | TaskConfig,
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> Task:
        """Start a task and return its handle; TaskConfig's fields are keywords.

        A string runs in a shell, a list is an exact argument list. After return the task starts without our help and
        outlives this process. With `idempotency_key` (any string) the same key gets the same task, whoever asks and
        however often, until it has failed or was cancelled. The current folder, or `code_root`, is uploaded unless
        `upload_code=False`. Raises ValidationError, SpecRejected, ProviderUnavailable.
        """
        wanted = self.configure(command_or_config, fields)
        files = self.upload(wanted.code_root or Path.cwd()) if wanted.upload_code else ()
        return Task(self.engine, self._submit(wanted, files, idempotency_key), config=wanted)

    def run_many(
        self,
        commands_or_configs: Sequence[str | Sequence[str] | TaskConfig],
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> list[Task]:
        """Do `run` for several, in as few requests as the provider allows; return the handles in order.

        Slurm gets those that ask for the same as one array. `fields` are for all of them, and a folder is packed once.
        With `idempotency_key` each has its own key, from this one and its place. Raises what `run` raises; some may
        have been started by then, and the same key finds them.
        """
        wanted = [self.configure(one, fields) for one in commands_or_configs]
        folders = {one.code_root or Path.cwd() for one in wanted if one.upload_code}
        packed = {folder: self.upload(folder) for folder in folders}
        tasks = []
        for index, one in enumerate(wanted):
            files = packed[one.code_root or Path.cwd()] if one.upload_code else ()
            key = f"{idempotency_key}[{index}]" if idempotency_key else one.idempotency_key or random_key()
            tasks.append((self._spec(one, files), key))
        ids = self.engine.submit_many(tasks)
        return [Task(self.engine, task_id, config=one) for task_id, one in zip(ids, wanted, strict=True)]

    def invoke_async(
        self,
        module_path: str | Path,
        function_name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        code_root: str | Path | None = None,
        idempotency_key: str | None = None,
        serialization: Serialization = "json",
        result: ResultForm | None = None,
        **task_params: Any,
    ) -> InvokeTask:
        """Start a call of a plain function in a plain file; return its handle. TaskConfig's fields are keywords.

        Without `code_root` the one file travels; with it the whole folder, and `module_path` is a path or a dotted name
        inside it. Arguments are checked and written before anything starts: SerializationError (a TypeError) names what
        JSON cannot carry. In place of a reference (`ObjectRef`) the function gets the value.

        `serialization="pickle"` lets the value be anything, and references lead to pickles: it says that you trust
        whoever wrote them. `result="ref"` leaves the value where the call ran and gives a reference to it, "value" the
        value, a number the value unless it takes more bytes; without a word `objects.reference_over_bytes` is that
        number. Raises also what `run` raises, and
        ObjectNotFoundError or ObjectError for a reference that leads nowhere.
        """
        refs: list[ObjectRef] = []
        given, named = revived([list(args or ()), dict(kwargs or {})], refs)
        files = named_call(module_path, function_name, given, named, code_root, codec=serialization)
        if code_root is not None:
            files += self.upload(Path(code_root))
        how = _How(idempotency_key, serialization, result)
        return self._call(files, refs, function_name, task_params, how)

    def invoke(
        self,
        module_path: str | Path,
        function_name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        code_root: str | Path | None = None,
        idempotency_key: str | None = None,
        **task_params: Any,
    ) -> Any:
        """Call a plain function in a plain file on a machine with GPUs and return its value; see `invoke_async`.

        All keywords of `invoke_async` are keywords here.

        Raises RemoteExecutionError, also an instance of the function's own exception class, when it raised; the
        error of the task when it ended in another way. If this call is interrupted, the task is cancelled.
        """
        key = idempotency_key or random_key()
        try:
            task = self.invoke_async(
                module_path,
                function_name,
                args,
                kwargs,
                code_root=code_root,
                idempotency_key=key,
                **task_params,
            )
            return task.get_result()
        except (KeyboardInterrupt, SystemExit):
            started = self.engine.find(key)  # also when it was submitted and we have not been told
            if started is not None:
                self.cancel([started])
            raise

    def call_async(
        self,
        function: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        serialization: Serialization = "pickle",
        replace: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (),
        idempotency_key: str | None = None,
        result: ResultForm | None = None,
        **task_params: Any,
    ) -> InvokeTask:
        """Start a call of a live function, which travels by value with what it needs; return its handle.

        `serialization` governs the result: "pickle" takes any value, "json" plain ones. `replace` maps objects that
        cannot travel to ones that stand in for them there; pairs do as well. The machine's Python must have our
        major.minor version.
        References and `result` are those of `invoke_async`.
        """
        given, named = revived([tuple(args), dict(kwargs or {})], [])
        with pickled_refs() as refs:  # wherever the function refers to them
            files = live_call(function, given, named, serialization, replace)
        how = _How(idempotency_key, serialization, result)
        return self._call(files, refs, getattr(function, "__name__", "call"), task_params, how)

    def _call(
        self,
        files: tuple[SpecFile, ...],
        refs: Sequence[ObjectRef],
        function_name: str,
        params: Mapping[str, Any],
        how: _How,
    ) -> InvokeTask:
        wanted = self.configure(None, {"name": task_name(function_name), **params, "upload_code": False})
        if wanted.command is not None or wanted.shell is not None or wanted.script is not None:
            raise ValidationError("a function call takes no command, shell or script")
        over = reference_over(how.result, self.settings)
        key = how.key or wanted.idempotency_key or random_key()
        try:
            with self.objects.inputs(
                refs,
                provider=self.provider.name,
                contained=wanted.image is not None,
                allow_pickle=how.serialization == "pickle",
            ) as inputs:
                files = completed(files, inputs, by_reference=over is not None)
                task_id = self._submit(wanted, files, key, kind="call")
        except ObjectNotFoundError:
            adopted = self.engine.adopted(key)  # it has what it was given
            if adopted is None:
                raise
            task_id = adopted
        return InvokeTask(
            self.engine,
            task_id,
            config=wanted,
            objects=self.objects,
            serialization=how.serialization,
            result=how.result,
        )

    def start_session(
        self, files: Sequence[SpecFile], *, idempotency_key: str | None = None, **task_params: Any
    ) -> Task:
        """Start a task that serves calls, of which `files` hold the orders; TaskConfig's fields are keywords.

        Raises FlowError where the provider has no sessions, and what `run` raises.
        """
        if self.provider.sessions is None:
            raise FlowError(
                f"the {self.provider.name} provider has no warm sessions",
                suggestions=["Use invoke(), which starts a task for each call."],
            )
        wanted = self.configure(None, {"name": "session", **task_params, "upload_code": False})
        task_id = self._submit(wanted, files, idempotency_key, kind="session")
        return Task(self.engine, task_id, config=wanted)

    def configure(
        self, command_or_config: str | Sequence[str] | TaskConfig | None, fields: Mapping[str, Any]
    ) -> TaskConfig:
        """Build the validated TaskConfig of a call: `fields` win over a given one. Raises ValidationError."""
        given = dict(fields)
        if isinstance(command_or_config, TaskConfig):
            if not given:
                return command_or_config
            return command_or_config.replace(**given)
        if command_or_config is not None:
            given["command"] = (
                command_or_config if isinstance(command_or_config, str) else list(command_or_config)
            )
        if not any(given.get(name) is not None for name in ("instance_type", "gpu", "min_gpu_memory_gb")):
            given["instance_type"] = self.settings.default_instance_type
        return TaskConfig(**given)

    def upload(self, root: Path) -> tuple[SpecFile, ...]:
        """Pack a folder for a task. Raises ValidationError when it is too large."""
        from flow_core import bundle

        return (SpecFile(name="code.tar.gz", path=bundle.pack(root).path),)

    def _submit(
        self, wanted: TaskConfig, files: Sequence[SpecFile], key: str | None, *, kind: str | None = None
    ) -> str:
        spec = self._spec(wanted, files, kind=kind)
        return self.engine.submit(spec, key=key or wanted.idempotency_key or random_key())

    def _spec(self, wanted: TaskConfig, files: Sequence[SpecFile], *, kind: str | None = None) -> TaskSpec:
        spec = TaskSpec.from_config(wanted, files=tuple(files))
        labels = {**spec.labels, SPEC_LABEL: _fingerprint(spec)}
        if kind is not None:
            spec = spec.model_copy(update={"entry": "call"})
            labels[KIND_LABEL] = kind
        return spec.model_copy(update={"labels": labels})

    # -- finding

    def get_task(
        self, task_id: str, *, serialization: Serialization = "json", result: ResultForm | None = None
    ) -> Task:
        """Return the handle of an existing task; a function call's is an InvokeTask. Raises TaskNotFoundError.

        `serialization` and `result` are for a call, as in `InvokeTask.from_id`.
        """
        return self._handle(self.engine.get(task_id), serialization, result)

    def _handle(
        self, seen: Snapshot, serialization: Serialization = "json", result: ResultForm | None = None
    ) -> Task:
        if seen.labels.get(KIND_LABEL) == "call":
            return InvokeTask(
                self.engine,
                seen.task_id,
                seen=seen,
                objects=self.objects,
                serialization=serialization,
                result=result,
            )
        return Task(self.engine, seen.task_id, seen=seen)

    def task_url(self, task_id: str) -> str | None:
        """Return the address of a page about a task: what `task_url` in the settings says, or the provider's own.

        None where there is no such page.
        """
        if self.settings.task_url is not None:
            return self.settings.task_url.replace("{task_id}", task_id)
        return self.provider.task_url(task_id)

    def find(self, idempotency_key: str) -> Task | None:
        """Return the newest task that was submitted with this key, None when there is none."""
        task_id = self.engine.find(idempotency_key)
        return None if task_id is None else self.get_task(task_id)

    def list_tasks(self, limit: int = 100) -> list[Task]:
        """Return up to `limit` tasks, the newest first."""
        return [self._handle(seen) for seen in self.engine.list(limit=limit)]

    # -- many at once

    def poll(self, task_ids: Collection[str]) -> dict[str, Snapshot]:
        """Return fresh snapshots of exactly these tasks in one round trip; unknown ones are LOST."""
        return self.engine.poll(task_ids)

    def read_logs(
        self, wanted: Sequence[LogPosition], *, limit: int = 65536
    ) -> Mapping[LogPosition, LogChunk]:
        """Return what many tasks have printed since these positions, up to `limit` bytes in all, in one round trip.

        The bytes are shared out fairly; a task that nobody knows, or whose machine is silent, is left out.
        """
        return self.engine.read_logs(wanted, limit=limit)

    def cancel(self, task_ids: Collection[str]) -> None:
        """Ask tasks to stop; ended and unknown ones are left alone."""
        self.engine.cancel(task_ids)

    def release(self, task_ids: Collection[str]) -> None:
        """Free what ended tasks occupy, once their results are stored elsewhere."""
        self.engine.release(task_ids)

    def wait(
        self, task_ids: Collection[str], *, timeout: float | None = None, any_of: bool = False
    ) -> dict[str, Snapshot]:
        """Block until all of these tasks (with `any_of`: one) have ended; return snapshots. Raises TimeoutError."""
        return self.engine.wait(task_ids, timeout=timeout, any_of=any_of)

    # -- instances and volumes

    def find_instances(
        self, requirements: Mapping[str, Any] | None = None, limit: int = 10
    ) -> list[Instance]:
        """Return up to `limit` instance types that meet the requirements, the cheapest first.

        Requirements: instance_type, gpu_type, min_gpu_count, gpu_memory_gb (each GPU at least), max_price (per hour),
        region. Raises ValidationError for any other.
        """
        wanted = parse_requirements(requirements or {})
        if not 1 <= limit <= 100:
            raise ValidationError(f"limit={limit} must lie between 1 and 100")
        found = [one for one in self.provider.find_instances() if meets(one, wanted)]
        return sorted(found, key=lambda one: (one.price_per_hour is None, one.price_per_hour or 0.0))[:limit]

    def create_volume(
        self, size_gb: int, name: str | None = None, interface: Literal["block", "file"] = "block"
    ) -> Volume:
        """Create persistent storage of `size_gb`, or return the volume that has this name already."""
        return self._volumes.create(name=name, size_gb=size_gb, interface=interface)

    def list_volumes(self, limit: int = 100) -> list[Volume]:
        """Return up to `limit` volumes, sorted by name."""
        return list(self._volumes.list())[:limit]

    def delete_volume(self, volume_id: str) -> None:
        """Delete a volume by id or name. Raises VolumeNotFoundError, VolumeError while a task uses it."""
        self._volumes.delete(volume_id)

    def mount_volume(self, volume_id: str, task_id: str) -> None:
        """Show a volume to a running task. Raises VolumeNotFoundError, TaskNotFoundError, ValidationError."""
        self._volumes.mount(volume_id, task_id)

    @property
    def _volumes(self) -> Volumes:
        volumes = self.provider.volumes
        if volumes is None:
            raise ProviderError(f"the {self.provider.name} provider has no volumes")
        return volumes


#: Variables that say who submits, not what: the place in a trace (https://www.w3.org/TR/trace-context/).
_OF_ONE_SUBMIT = frozenset({"TRACEPARENT", "TRACESTATE"})


def _fingerprint(spec: TaskSpec) -> str:
    """Return 16 hex digits for what is asked for, without the labels and the code.

    Code may change between two tries, and a live function is not pickled alike twice.
    """
    env = {name: value for name, value in spec.env.items() if name not in _OF_ONE_SUBMIT}
    what = spec.model_copy(update={"env": env})
    asked = hashlib.sha256(what.model_dump_json(exclude={"labels", "files"}).encode())
    for file in spec.files:
        if file.name == "call.json":
            asked.update(file.data or b"")
    return asked.hexdigest()[:16]


def _log_to_stderr() -> None:
    """Show what flow_core logs, down to DEBUG; a host that has its own handlers keeps them."""
    logger = logging.getLogger("flow_core")
    logger.setLevel(logging.DEBUG)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
