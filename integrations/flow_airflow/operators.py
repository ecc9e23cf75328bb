"""FlowGPUOperator: a command or a pure function on a GPU machine, as an Airflow task. Only translates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_airflow.arguments import beside_dag_file, plain, text
from flow_airflow.calls import FunctionOperator, function_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.sdk import Context

    from flow_airflow.nodes import Node
    from flow_core import Flow, Task

#: The ways to say what a command is, of which a node has one; a function is the other way.
_COMMANDS = ("command", "shell", "script")


class FlowGPUOperator(FunctionOperator):
    """Run a command, or one function of a plain Python file, on a machine with GPUs.

    Give exactly one of

    - `command`: a string for a shell, or a list of exact arguments; also `shell` or `script`, as in
      TaskConfig. The XCom is the last line of output, as BashOperator has it.
    - `module` and `function` with `op_args` and `op_kwargs`, JSON values all. The XCom is what the function
      returns. The file needs no import of ours or of Airflow. Without `code_root` the one file travels, with
      it the folder. `serialization="pickle"` lets the value be anything that Airflow can store as an XCom. With
      `session` the call runs on a warm worker, see FunctionOperator; the one file travels there as well.

    `code_root`, and `module` without it, may be relative to the DAG file. `provider` and every field of
    TaskConfig (`gpu`, `env`, `volumes`, `max_run_time_hours` …) mean what they mean in `flow_core`; code is
    only uploaded with a command when `code_root` or `upload_code=True` is given. What becomes of the task in
    retries, clears, kills and timeouts is FlowOperator's to say, and so is `deferrable`; what becomes of the
    result, ResultOperator's.
    """

    template_fields: Sequence[str] = (
        *(*_COMMANDS, "module", "function", "code_root", "upload_code"),
        *FunctionOperator.template_fields,
    )
    template_fields_renderers = dict.fromkeys(_COMMANDS, "bash") | {"op_args": "json", "op_kwargs": "json"}

    def __init__(  # noqa: PLR0913  # one by one, so that editors and Airflow's mapping know them
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
        self.code_root = code_root
        self.upload_code = upload_code
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        who = self._who
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
        where = [name for name in ("code_root", "upload_code") if getattr(self, name) is not None]
        if self.session is not None and (self.module is None or where):
            raise ValueError(
                f"{who}: a session takes calls of module and function, without {(where or given)[0]}. Its workers get "
                "the one file; what else it imports has to be on their machine."
            )

    # -- what the legs ask for

    def callee(self, context: Context) -> Callable[..., Any]:
        """Return what calls the function of the module where it runs."""
        assert self.module is not None and self.function is not None
        module = self.module
        return function_of(
            beside_dag_file(context, module) if module.endswith(".py") else module, self.function
        )

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

    def outcome(self, task: Task) -> Any:
        """Return what the function returned, or the last line that the command printed."""
        value = task.result(timeout=0)
        if self.module is None:
            return task.logs(tail=1).rstrip().replace("\0", "\ufffd") or None
        return value
