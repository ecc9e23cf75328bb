"""FlowGPUOperator: a command or a pure function on a GPU machine, as an Airflow task. Only translates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.configuration import conf
from airflow.sdk import BaseOperator

from flow_airflow.compat import AirflowTaskTimeout, TaskDeferralError, TaskDeferralTimeout
from flow_airflow.failures import to_airflow
from flow_airflow.logs import TaskLog
from flow_airflow.nodes import Node, will_retry
from flow_airflow.stopping import Stop, cancel_key
from flow_airflow.triggers import FlowEvent, FlowTaskTrigger
from flow_core.errors import FlowError, FlowTimeoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow.sdk import Context

    from flow_core import Flow, Task
    from flow_core.models import MountSpec, VolumeSpec

#: The XCom that holds the id of the Flow task while it runs, for FlowTaskSensor and for people.
TASK_ID_XCOM = "flow_task_id"

#: Under this name Airflow 3.3 remembers, across tries and clears, which key a task instance last worked
#: under.
_STATE_KEY = "flow_key"

#: The worker looks at the output this often.
_LOOK_S = 0.5

#: Airflow's own timeout of the deferral is this much behind ours: it only matters while no triggerer runs.
_TRIGGERER_GRACE_S = 60.0

#: TaskConfig's fields that are passed on as they are; None stands for "not given".
_FIELDS = (
    *("gpu", "instance_type", "min_gpu_memory_gb", "memory_mb", "env", "image", "working_dir", "volumes"),
    "data_mounts",
    *("max_price_per_hour", "max_run_time_hours", "region", "num_instances", "ssh_keys", "ports"),
)

#: The ways to say what a command is, of which a node has one; a function is the other way.
_COMMANDS = ("command", "shell", "script")


class FlowGPUOperator(BaseOperator):
    """Run a command, or one function of a plain Python file, on a machine with GPUs.

    Give exactly one of

    - `command`: a string for a shell, or a list of exact arguments; also `shell` or `script`, as in
      TaskConfig. The XCom is the last line of output, as BashOperator has it.
    - `module` and `function` with `op_args` and `op_kwargs`, JSON values all. The XCom is what the function
      returns. The file needs no import of ours or of Airflow. Without `code_root` the one file travels, with
      it the folder.

    `code_root`, and `module` without it, may be relative to the DAG file. `provider` and every field of
    TaskConfig (`gpu`, `env`, `volumes`, `max_run_time_hours` …) mean what they mean in `flow_core`; code is
    only uploaded with a command when `code_root` or `upload_code=True` is given. All of them are templated
    and take XComArgs.

    The work outlives the worker: a retry after the worker died adopts the running task, a retry after the
    work itself failed starts anew, and so does a clear after success. Marking or clearing the task and
    `execution_timeout` cancel the work. With `deferrable` the worker waits for the first `defer_after_s`
    seconds, then the triggerer does: it asks every `poll_interval_s`, in one poll with all others that wait
    for tasks of the provider, and tells `hold_event_s` after the deferral at the earliest; see
    FlowTaskTrigger.

    Results stay on the provider for its retention time and are not released here: Airflow stores the XCom
    only after `execute` has returned, and a worker that dies in between must find the result again.
    """

    template_fields: Sequence[str] = (
        *(*_COMMANDS, "module", "function", "op_args", "op_kwargs"),
        *("code_root", "upload_code", "name", "labels", "provider", *_FIELDS),
    )
    template_fields_renderers = dict.fromkeys(_COMMANDS, "bash") | {"op_args": "json", "op_kwargs": "json"}
    ui_color = "#d8f0dc"

    def __init__(  # noqa: PLR0913  # TaskConfig's fields, one by one, so that editors and Airflow's mapping know them
        self,
        *,
        command: str | Sequence[str] | None = None,
        shell: str | None = None,
        script: str | None = None,
        module: str | None = None,
        function: str | None = None,
        op_args: Sequence[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        code_root: str | Path | None = None,
        upload_code: bool | None = None,
        gpu: str | None = None,
        instance_type: str | None = None,
        min_gpu_memory_gb: int | None = None,
        memory_mb: int | None = None,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        image: str | None = None,
        working_dir: str | None = None,
        volumes: Sequence[VolumeSpec | Mapping[str, Any]] | None = None,
        data_mounts: Sequence[MountSpec | Mapping[str, Any]] | None = None,
        max_price_per_hour: float | None = None,
        max_run_time_hours: float | None = None,
        region: str | None = None,
        num_instances: int | None = None,
        ssh_keys: Sequence[str] | None = None,
        ports: Sequence[int] | None = None,
        labels: Mapping[str, str] | None = None,
        provider: str | None = None,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        defer_after_s: float = 10.0,
        hold_event_s: float = 10.0,
        poll_interval_s: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.command = command
        self.shell = shell
        self.script = script
        self.module = module
        self.function = function
        self.op_args = op_args
        self.op_kwargs = op_kwargs
        self.code_root = code_root
        self.upload_code = upload_code
        self.gpu = gpu
        self.instance_type = instance_type
        self.min_gpu_memory_gb = min_gpu_memory_gb
        self.memory_mb = memory_mb
        self.name = name
        self.env = env
        self.image = image
        self.working_dir = working_dir
        self.volumes = volumes
        self.data_mounts = data_mounts
        self.max_price_per_hour = max_price_per_hour
        self.max_run_time_hours = max_run_time_hours
        self.region = region
        self.num_instances = num_instances
        self.ssh_keys = ssh_keys
        self.ports = ports
        self.labels = labels
        self.provider = provider
        self.deferrable = deferrable
        self.defer_after_s = defer_after_s
        self.hold_event_s = hold_event_s
        self.poll_interval_s = poll_interval_s
        self._stop: Stop | None = None
        self._executing = False
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        given = [name for name in (*_COMMANDS, "module") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{type(self).__name__} {self.task_id!r} needs exactly one of command, shell, script "
                f"and module; given: {', '.join(given) or 'none'}."
            )
        if (self.module is None) != (self.function is None):
            raise ValueError(f"{type(self).__name__} {self.task_id!r} needs module and function together.")
        if self.module is None and (self.op_args is not None or self.op_kwargs is not None):
            raise ValueError(
                f"{type(self).__name__} {self.task_id!r}: op_args and op_kwargs go with module and function; "
                "a command takes a list of arguments, or env."
            )

    # -- the legs of a try

    def execute(self, context: Context) -> Any:
        """Submit or adopt the node's task and wait for it; return its result. Defers when it takes long."""
        node = Node.from_context(context)
        with self._leg(context, node) as flow:
            self._retire_predecessors(context, flow, node)
            task = self._submit(flow, node, context)
            context["ti"].xcom_push(key=TASK_ID_XCOM, value=task.task_id)
            self.log.info("Flow task %s.", task.task_id)
            return self._follow(context, task, TaskLog(task, nodes=int(self.num_instances or 1)))

    def execute_complete(self, context: Context, event: FlowEvent) -> Any:
        """Take over from the trigger: show the rest of the output and return the result."""
        node = Node.from_context(context)
        with self._leg(context, node) as flow:
            task = flow.get_task(event["flow_task_id"])
            if event["outcome"] == "deadline":
                task.cancel()
                raise AirflowTaskTimeout(f"Flow task {task.task_id} took over {self.execution_timeout}.")
            return self._follow(context, task, TaskLog(task, offsets=event["log_offsets"]))

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Do what Airflow does, but leave no work behind that nobody will ask for again."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except TaskDeferralTimeout:
            self._abandon(context)
            raise
        except TaskDeferralError:
            if not will_retry(context):
                self._abandon(context)
            raise

    def on_kill(self) -> None:
        """Cancel the node's task: Airflow ends this try."""
        if self._stop is not None:
            self._stop.request()
            if not self._executing:  # it has timed out; in a signal's handler it goes on, and waits itself
                self._stop.wait(30.0)

    @contextmanager
    def _leg(self, context: Context, node: Node) -> Iterator[Flow]:
        """Make `on_kill` work, and translate errors, while `execute` or its continuation runs."""
        self._stop = Stop(self._connect, node.key)
        self._executing = True
        try:
            yield self._connect()
        except Exception as error:
            hopeless = to_airflow(error)
            if hopeless is not None or not will_retry(context):
                self._abandon(context)
            if hopeless is not None:
                raise hopeless from error
            raise
        finally:
            self._executing = False

    def _abandon(self, context: Context) -> None:
        """Cancel what may still run under this node: no later try will come for it."""
        try:
            cancelled = cancel_key(self._connect(), Node.from_context(context).key)
        except FlowError as error:
            self.log.warning("The work may still run, it could not be cancelled: %s", error)
        else:
            if cancelled is not None:
                self.log.info("Cancelled Flow task %s.", cancelled.task_id)

    # -- submitting

    def _connect(self) -> Flow:
        from flow_core import Flow

        return Flow(provider=self.provider)

    def _retire_predecessors(self, context: Context, flow: Flow, node: Node) -> None:
        """Return when nothing runs any more of what this task instance did before it was cleared.

        Whoever was there for the clear has cancelled it, but nobody was when no triggerer ran, or the worker
        was dead and not yet missed; and it may take its time. Airflow 3.3 remembers the key, also across the
        end of the run.
        """
        keys = [one.key for one in node.predecessors]
        store: Any = context.get("task_state_store")
        if store is not None:
            before = store.get(_STATE_KEY)
            if before != node.key:
                keys += [before] if isinstance(before, str) and before not in keys else []
                store.set(_STATE_KEY, node.key)
        for key in keys:
            task = cancel_key(flow, key)
            if task is not None:
                self.log.info(
                    "Waiting for the end of Flow task %s: it ran before this task was cleared.", task.task_id
                )
                self._await_end(task)

    def _await_end(self, task: Task) -> None:
        while not _ends_within(task, _LOOK_S):
            self._check_stop()

    def _submit(self, flow: Flow, node: Node, context: Context) -> Task:
        fields = {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}
        if isinstance(self.env, Mapping):
            fields["env"] = {name: _text(value) for name, value in self.env.items()}
        fields["name"] = self.name or node.name
        fields["labels"] = {**node.labels, **(self.labels or {})}
        root = self._beside_dag_file(context, self.code_root) if self.code_root is not None else None
        if self.module is not None and self.function is not None:
            module = self.module
            if root is None and module.endswith(".py"):
                module = str(self._beside_dag_file(context, module))
            return flow.invoke_async(
                module,
                self.function,
                _plain(self.op_args or []),
                _plain(self.op_kwargs or {}),
                code_root=root,
                idempotency_key=node.key,
                **fields,
            )
        upload = root is not None if self.upload_code is None else self.upload_code
        fields["upload_code"] = upload
        if upload:
            fields["code_root"] = root or self._beside_dag_file(context, ".")
        given = {name: value for name in _COMMANDS if (value := getattr(self, name)) is not None}
        if isinstance(self.command, Sequence) and not isinstance(self.command, str):
            given["command"] = [_text(one) for one in self.command]
        return flow.run(flow.configure(None, {**given, **fields}), idempotency_key=node.key)

    def _beside_dag_file(self, context: Context, path: str | Path) -> Path:
        # A worker's current folder says nothing; where the DAG file lies on this worker does.
        return Path(context["dag"].fileloc).parent / Path(path).expanduser()

    # -- waiting

    def _follow(self, context: Context, task: Task, log: TaskLog) -> Any:
        """Show the output until the task has ended and return its result, or defer."""
        defer_at = time.monotonic() + self.defer_after_s
        ended = False
        while not ended:
            ended = _ends_within(task, _LOOK_S)
            self._check_stop()
            self._show(log)
            if not ended and self.deferrable and time.monotonic() >= defer_at:
                self._defer(context, task, log)
        value = task.result(timeout=0)
        if self.module is None:
            return task.logs(tail=1).rstrip() or None
        return value

    def _check_stop(self) -> None:
        if self._stop is not None:
            self._stop.check()

    def _show(self, log: TaskLog) -> None:
        while not log.ended:
            try:
                lines = log.read()
            except FlowError as error:
                if not error.retryable:
                    raise
                self.log.warning("The output is out of reach at the moment: %s", error.message)
                return
            for line in lines:
                self.log.info("%s", line)
            if log.caught_up:
                return

    def _defer(self, context: Context, task: Task, log: TaskLog) -> NoReturn:
        deadline = self._deadline(context)
        left = None if deadline is None else max(1.0, deadline - time.time())
        self.log.info("Flow task %s goes on; the triggerer waits for it.", task.task_id)
        self.defer(
            trigger=FlowTaskTrigger(
                flow_task_id=task.task_id,
                provider=self.provider,
                log_offsets=log.offsets,
                deadline=deadline,
                hold_s=self.hold_event_s,
                poll_interval_s=self.poll_interval_s,
            ),
            method_name="execute_complete",
            timeout=None if left is None else timedelta(seconds=left + _TRIGGERER_GRACE_S),
        )
        raise AssertionError("defer() returned")

    def _deadline(self, context: Context) -> float | None:
        """When `execution_timeout` is up, as Unix time: Airflow forgets it while a task is deferred."""
        if self.execution_timeout is None:
            return None
        return (context["ti"].start_date + self.execution_timeout).timestamp()


def _text(value: Any) -> Any:
    """Write a number as text: a template that is rendered to a native object makes numbers of what was text."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _plain(value: Any) -> Any:
    """Load the lazy sequences that stand for the XComs of mapped tasks."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_plain(one) for one in value]
    return value


def _ends_within(task: Task, seconds: float) -> bool:
    try:
        task.wait(timeout=seconds)
    except FlowTimeoutError:
        return False
    return True
