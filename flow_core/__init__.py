"""flow_core: run work on machines with GPUs, watch it, bring the result back.

The public names below are imported when they are first used, so that `import flow_core` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as in typing, whose import would cost more than all of this file
if TYPE_CHECKING:
    from typing import Any

    from flow_core.apps import FlowApp
    from flow_core.calls import InvokeTask
    from flow_core.default_flow import (
        create_volume,
        delete_volume,
        find_instances,
        get_task,
        invoke,
        invoke_async,
        list_tasks,
        list_volumes,
        mount_volume,
        run,
    )
    from flow_core.definitions import Retries
    from flow_core.errors import (
        APIError,
        AsyncFunctionError,
        AuthenticationError,
        CallCancelledError,
        CallTimeoutError,
        ConfigError,
        FlowError,
        FlowTimeoutError,
        FunctionSerializationError,
        InsufficientQuotaError,
        NetworkError,
        ObjectError,
        ObjectNotFoundError,
        ProviderError,
        ProviderUnavailable,
        PythonVersionMismatchError,
        QuotaExceededError,
        RemoteExecutionError,
        ResourceNotAvailableError,
        ResourceNotFoundError,
        ResultError,
        SandboxExecutionError,
        SerializationError,
        SessionClosedError,
        SpecRejected,
        TaskCancelledError,
        TaskExecutionError,
        TaskNotFoundError,
        TaskOutOfMemoryError,
        TaskTimeLimitError,
        TimeoutError,
        ValidationAPIError,
        ValidationError,
        VolumeError,
        VolumeNotFoundError,
        WorkerDiedError,
    )
    from flow_core.flow import Flow
    from flow_core.function_options import Serialization
    from flow_core.functions import RemoteFunction
    from flow_core.futures import Future
    from flow_core.models import (
        Instance,
        LogChunk,
        LogPosition,
        MountSpec,
        Snapshot,
        TaskConfig,
        TaskStatus,
        Volume,
        VolumeSpec,
    )
    from flow_core.object_ref import ObjectRef
    from flow_core.objects import put
    from flow_core.services import ObjectFuture, Runner, RunnerService, SessionContext
    from flow_core.sessions import SandboxDefaults, Session, SessionDefaults
    from flow_core.several import as_completed, gather, get, results, wait
    from flow_core.streamed import Stream
    from flow_core.task import Task


_HOMES = {
    "flow_core.errors": (
        "APIError AsyncFunctionError AuthenticationError CallCancelledError CallTimeoutError ConfigError "
        "FlowError FlowTimeoutError FunctionSerializationError InsufficientQuotaError NetworkError "
        "ObjectError ObjectNotFoundError ProviderError ProviderUnavailable PythonVersionMismatchError "
        "QuotaExceededError RemoteExecutionError ResourceNotAvailableError ResourceNotFoundError ResultError "
        "SandboxExecutionError SerializationError SessionClosedError SpecRejected TaskCancelledError "
        "TaskExecutionError TaskNotFoundError TaskOutOfMemoryError TaskTimeLimitError TimeoutError "
        "ValidationAPIError ValidationError VolumeError VolumeNotFoundError WorkerDiedError"
    ),
    "flow_core.flow": "Flow",
    "flow_core.default_flow": (
        "create_volume delete_volume find_instances get_task invoke invoke_async list_tasks "
        "list_volumes mount_volume run"
    ),
    "flow_core.apps": "FlowApp",
    "flow_core.calls": ("InvokeTask"),
    "flow_core.models": "Instance MountSpec TaskConfig Volume VolumeSpec",
    "flow_core.status": "LogChunk LogPosition Snapshot TaskStatus",  # cheap: a host's every process wants them
    "flow_core.task": ("Task"),
    "flow_core.definitions": "Retries",
    "flow_core.function_options": "Serialization",
    "flow_core.functions": "RemoteFunction",
    "flow_core.futures": "Future",
    "flow_core.several": "as_completed gather get results wait",
    "flow_core.streamed": "Stream",
    "flow_core.object_ref": "ObjectRef",
    "flow_core.objects": "put",
    "flow_core.services": "ObjectFuture Runner RunnerService SessionContext",
    "flow_core.sessions": "SandboxDefaults Session SessionDefaults",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "APIError",
    "AsyncFunctionError",
    "AuthenticationError",
    "CallCancelledError",
    "CallTimeoutError",
    "ConfigError",
    "Flow",
    "FlowApp",
    "FlowError",
    "FlowTimeoutError",
    "FunctionSerializationError",
    "Future",
    "Instance",
    "InsufficientQuotaError",
    "InvokeTask",
    "LogChunk",
    "LogPosition",
    "MountSpec",
    "NetworkError",
    "ObjectError",
    "ObjectFuture",
    "ObjectNotFoundError",
    "ObjectRef",
    "ProviderError",
    "ProviderUnavailable",
    "PythonVersionMismatchError",
    "QuotaExceededError",
    "RemoteExecutionError",
    "RemoteFunction",
    "ResourceNotAvailableError",
    "ResourceNotFoundError",
    "ResultError",
    "Retries",
    "Runner",
    "RunnerService",
    "SandboxDefaults",
    "SandboxExecutionError",
    "Serialization",
    "SerializationError",
    "Session",
    "SessionClosedError",
    "SessionContext",
    "SessionDefaults",
    "Snapshot",
    "SpecRejected",
    "Stream",
    "Task",
    "TaskCancelledError",
    "TaskConfig",
    "TaskExecutionError",
    "TaskNotFoundError",
    "TaskOutOfMemoryError",
    "TaskStatus",
    "TaskTimeLimitError",
    "TimeoutError",
    "ValidationAPIError",
    "ValidationError",
    "Volume",
    "VolumeError",
    "VolumeNotFoundError",
    "VolumeSpec",
    "WorkerDiedError",
    "as_completed",
    "create_volume",
    "delete_volume",
    "find_instances",
    "gather",
    "get",
    "get_task",
    "invoke",
    "invoke_async",
    "list_tasks",
    "list_volumes",
    "mount_volume",
    "put",
    "results",
    "run",
    "wait",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'flow_core' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
