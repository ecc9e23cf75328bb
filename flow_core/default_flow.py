"""The calls at module level: those of a Flow that is made from the configuration when it is first needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from flow_core.calls import InvokeTask
from flow_core.flow import Flow
from flow_core.models import Instance, TaskConfig, Volume
from flow_core.task import Task


@functools.cache
def default() -> Flow:
    """Return the Flow that the module-level calls use; made from the configuration at the first call."""
    return Flow()


def run(
    command_or_config: str | Sequence[str] | TaskConfig, *, idempotency_key: str | None = None, **fields: Any
) -> Task:
    """Start a task; see `Flow.run`."""
    return default().run(command_or_config, idempotency_key=idempotency_key, **fields)


def invoke(
    module_path: str | Path,
    function_name: str,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    code_root: str | Path | None = None,
    idempotency_key: str | None = None,
    **task_params: Any,
) -> Any:
    """Call a plain function on a machine with GPUs and return its value; see `Flow.invoke`."""
    return default().invoke(
        module_path,
        function_name,
        args,
        kwargs,
        code_root=code_root,
        idempotency_key=idempotency_key,
        **task_params,
    )


def invoke_async(
    module_path: str | Path,
    function_name: str,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    code_root: str | Path | None = None,
    idempotency_key: str | None = None,
    **task_params: Any,
) -> InvokeTask:
    """Start a call of a plain function and return its handle; see `Flow.invoke_async`."""
    return default().invoke_async(
        module_path,
        function_name,
        args,
        kwargs,
        code_root=code_root,
        idempotency_key=idempotency_key,
        **task_params,
    )


def find_instances(requirements: Mapping[str, Any] | None = None, limit: int = 10) -> list[Instance]:
    """Return what can be asked for; see `Flow.find_instances`."""
    return default().find_instances(requirements, limit)


def list_tasks(limit: int = 100) -> list[Task]:
    """Return recent tasks; see `Flow.list_tasks`."""
    return default().list_tasks(limit)


def get_task(task_id: str) -> Task:
    """Return an existing task; see `Flow.get_task`."""
    return default().get_task(task_id)


def create_volume(
    size_gb: int, name: str | None = None, interface: Literal["block", "file"] = "block"
) -> Volume:
    """Create persistent storage; see `Flow.create_volume`."""
    return default().create_volume(size_gb, name, interface)


def list_volumes(limit: int = 100) -> list[Volume]:
    """Return all volumes; see `Flow.list_volumes`."""
    return default().list_volumes(limit)


def delete_volume(volume_id: str) -> None:
    """Delete a volume; see `Flow.delete_volume`."""
    default().delete_volume(volume_id)


def mount_volume(volume_id: str, task_id: str) -> None:
    """Show a volume to a running task; see `Flow.mount_volume`."""
    default().mount_volume(volume_id, task_id)
