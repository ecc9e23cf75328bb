"""FlowGPUOperator: a command or a pure function on a GPU machine, as an Airflow task. Only translates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flow_airflow.arguments import beside_dag_file, plain, refuse_serialization, text, texts
from flow_airflow.legs import FlowOperator
from flow_airflow.results import ResultOperator
from flow_airflow.tracing import TRACEPARENT, HandedOn, handed_on

if TYPE_CHECKING:
    from airflow.sdk import Context

    from flow_airflow.nodes import Node
    from flow_core import Flow, Task
    from flow_core.models import MountSpec, VolumeSpec

#: TaskConfig's fields that are passed on as they are, whatever the task is; None stands for "not given".
FIELDS = (
    *("gpu", "instance_type", "min_gpu_memory_gb", "memory_mb", "env", "image", "working_dir", "volumes"),
    "data_mounts",
    *("max_price_per_hour", "max_run_time_hours", "region", "num_instances", "ssh_keys", "ports"),
)

#: The ways to say what a command is, of which a node has one; a function is the other way.
_COMMANDS = ("command", "shell", "script")


class FlowTaskOperator(FlowOperator):
    """An operator whose task is described by the fields of TaskConfig, under their names there.

    All of them are templated and take XComArgs, at any depth; text that a template makes of a number is read
    as one. A template that ends in ".sh" is text like any other, not the name of a file.
    """

    template_fields: Sequence[str] = ("name", "labels", "provider", "flow_conn_id", *FIELDS)

    def __init__(  # noqa: PLR0913  # TaskConfig's fields, one by one, so that editors and Airflow's mapping know them
        self,
        *,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
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

    @property
    def machines(self) -> int:
        """The number of machines whose output there is."""
        return int(self.num_instances or 1)

    def task_fields(self, context: Context, node: Node) -> dict[str, Any]:
        """Return the fields of the node's TaskConfig, without what it runs."""
        fields = {name: plain(value) for name in FIELDS if (value := getattr(self, name)) is not None}
        fields["name"] = self.name or node.name
        traced = HandedOn()
        if self.env is None or isinstance(self.env, Mapping):
            own = texts(self.env or {})
            traced = traced if TRACEPARENT in own else handed_on(context)
            fields["env"] = {**traced.env, **own}
        fields["labels"] = {**node.labels, **traced.labels, **(self.labels or {})}
        return fields


class FlowGPUOperator(ResultOperator, FlowTaskOperator):
    """Run a command, or one function of a plain Python file, on a machine with GPUs.

    Give exactly one of

    - `command`: a string for a shell, or a list of exact arguments; also `shell` or `script`, as in
      TaskConfig. The XCom is the last line of output, as BashOperator has it.
    - `module` and `function` with `op_args` and `op_kwargs`, JSON values all. The XCom is what the function
      returns. The file needs no import of ours or of Airflow. Without `code_root` the one file travels, with
      it the folder. `serialization="pickle"` lets the value be anything that Airflow can store as an XCom.

    `code_root`, and `module` without it, may be relative to the DAG file. `provider` and every field of
    TaskConfig (`gpu`, `env`, `volumes`, `max_run_time_hours` …) mean what they mean in `flow_core`; code is
    only uploaded with a command when `code_root` or `upload_code=True` is given. What becomes of the task in
    retries, clears, kills and timeouts is FlowOperator's to say, and so is `deferrable`; what becomes of the
    result, ResultOperator's.
    """

    template_fields: Sequence[str] = (
        *(*_COMMANDS, "module", "function", "op_args", "op_kwargs", "code_root", "upload_code"),
        *FlowTaskOperator.template_fields,
    )
    template_fields_renderers = dict.fromkeys(_COMMANDS, "bash") | {"op_args": "json", "op_kwargs": "json"}

    def __init__(  # noqa: PLR0913  # likewise
        self,
        *,
        command: str | Sequence[str] | None = None,
        shell: str | None = None,
        script: str | None = None,
        module: str | None = None,
        function: str | None = None,
        op_args: Sequence[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        serialization: Literal["json", "pickle"] = "json",
        code_root: str | Path | None = None,
        upload_code: bool | str | None = None,
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
        self.serialization = serialization
        self.code_root = code_root
        self.upload_code = upload_code
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        who = f"{type(self).__name__} {self.task_id!r}"
        given = [name for name in (*_COMMANDS, "module") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{who} needs exactly one of command, shell, script and module; "
                f"given: {', '.join(given) or 'none'}."
            )
        if (self.module is None) != (self.function is None):
            raise ValueError(f"{who} needs module and function together.")
        if self.module is None and (self.op_args is not None or self.op_kwargs is not None):
            raise ValueError(
                f"{who}: op_args and op_kwargs go with module and function; a command takes a list of "
                "arguments, or env."
            )
        refuse_serialization(self, self.serialization)

    # -- what the legs ask for

    def submit(self, context: Context, flow: Flow, node: Node) -> Task:
        """Submit the command or the call, under the node's key."""
        fields = self.task_fields(context, node)
        root = beside_dag_file(context, self.code_root) if self.code_root is not None else None
        if self.module is not None and self.function is not None:
            module = self.module
            if root is None and module.endswith(".py"):
                module = str(beside_dag_file(context, module))
            return flow.invoke_async(
                module,
                self.function,
                plain(self.op_args or []),
                plain(self.op_kwargs or {}),
                code_root=root,
                idempotency_key=node.key,
                serialization=self.serialization,
                result=self.result_form,
                **fields,
            )
        fields["upload_code"] = root is not None if self.upload_code is None else self.upload_code
        fields["code_root"] = root or beside_dag_file(context, ".")
        fields |= {name: value for name in _COMMANDS if (value := getattr(self, name)) is not None}
        if isinstance(self.command, Sequence) and not isinstance(self.command, str):
            fields["command"] = [text(one) for one in self.command]
        return flow.run(flow.configure(None, fields), idempotency_key=node.key)

    def reopen(self, flow: Flow, task_id: str) -> Task:
        """Return the handle of the command's or call's task."""
        return flow.get_task(task_id, serialization=self.serialization, result=self.result_form)

    def outcome(self, task: Task) -> Any:
        """Return what the function returned, or the last line that the command printed."""
        value = task.result(timeout=0)
        if self.module is None:
            return task.logs(tail=1).rstrip().replace("\0", "\ufffd") or None
        return value
