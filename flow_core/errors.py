"""Every error a caller can meet, as one tree. Standard library only, so that importing it costs nothing.

    FlowError                       .message .suggestions .error_code .retryable
    ├── AuthenticationError         no key, or one that is refused
    ├── ConfigError                 a settings file, variable or argument that cannot be used
    ├── ResourceNotFoundError       something named does not exist
    │   ├── TaskNotFoundError
    │   ├── ObjectNotFoundError     a value by reference is gone: released, expired or removed
    │   └── VolumeNotFoundError
    ├── ValidationError             a value that cannot be right (also a ValueError)
    │   └── SpecRejected            right in itself, but this provider can never run it
    ├── SerializationError          a value or function that cannot travel (also a TypeError); aliases
    │                               FunctionSerializationError, AsyncFunctionError
    ├── ObjectError                 a value by reference cannot be used: damaged, or not to be read here
    ├── SessionClosedError          the session that a call was for has ended (also a RuntimeError)
    ├── APIError                    .status_code
    │   └── ValidationAPIError      the service refused the request's contents (422)
    ├── NetworkError                retryable
    ├── TimeoutError                also a builtins.TimeoutError; alias FlowTimeoutError
    ├── ProviderError               the back end failed
    │   └── ProviderUnavailable     retryable: nothing is known to have changed, ask again with the same key
    ├── ResourceNotAvailableError   retryable: no instance is free now
    ├── QuotaExceededError          alias InsufficientQuotaError
    ├── VolumeError
    └── TaskExecutionError          .task_id .exit_code .signal .reason .log_tail
        ├── TaskCancelledError
        │   └── CallCancelledError  one call of a session was cancelled; the session goes on
        ├── TaskTimeLimitError
        │   └── CallTimeoutError    one call ran past its own `timeout`
        ├── TaskOutOfMemoryError
        ├── WorkerDiedError         retryable: the machine or the runner vanished
        ├── PythonVersionMismatchError  the machine's Python cannot run what this one captured
        ├── ResultError             the task ended, but its result cannot be read
        └── RemoteExecutionError    the user's function raised (also a RuntimeError, and the user's own class);
                                    alias SandboxExecutionError

`str(error)` is the message and one line per suggestion; a task's error adds the remote traceback and the
end of the log. Every error survives pickling with all its fields.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from flow_core.remote_errors import find_exception_class, mixed_class, restore_native_fields

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Unpack


class ErrorFields(TypedDict, total=False):
    """The keyword arguments of every `FlowError`."""

    suggestions: Sequence[str]
    error_code: str | None
    retryable: bool | None


class TaskErrorFields(ErrorFields, total=False):
    """The keyword arguments of every `TaskExecutionError`."""

    task_id: str
    exit_code: int | None
    signal: int | None
    reason: str
    log_tail: str


class FlowError(Exception):
    """The root of all errors raised on purpose.

    `message` says what happened and with which value, `suggestions` what to do next (one sentence each),
    `error_code` is a stable word for programs, and `retryable` says whether asking again unchanged can help.
    """

    default_code: ClassVar[str] = "flow-error"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        suggestions: Sequence[str] = (),
        error_code: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        # Not super(): below us may stand a user's class whose __init__ expects other arguments.
        Exception.__init__(self, message)
        self.message: str = message
        self.suggestions: list[str] = [suggestions] if isinstance(suggestions, str) else list(suggestions)
        self.error_code: str = self.default_code if error_code is None else error_code
        self.retryable: bool = self.default_retryable if retryable is None else retryable

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  - {suggestion}" for suggestion in self.suggestions)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"


class AuthenticationError(FlowError):
    """There is no API key, or the service refuses it."""

    default_code = "authentication"


class ConfigError(FlowError):
    """A setting cannot be used; the message names the file, variable or argument it came from."""

    default_code = "config"


class ResourceNotFoundError(FlowError):
    """Something that was asked for by name or id does not exist."""

    default_code = "not-found"


class TaskNotFoundError(ResourceNotFoundError):
    """No task has this id here."""

    default_code = "task-not-found"


class ObjectNotFoundError(ResourceNotFoundError):
    """The value that a reference stands for is not there any more: released with its task, expired or removed."""

    default_code = "object-not-found"


class VolumeNotFoundError(ResourceNotFoundError):
    """No volume has this name or id here."""

    default_code = "volume-not-found"


class ValidationError(FlowError, ValueError):
    """A value cannot be right, whatever machine runs it. Nothing was started."""

    default_code = "validation"


class SpecRejected(ValidationError):
    """This provider can never run this task: no retry helps. Nothing was started."""

    default_code = "spec-rejected"


class SerializationError(FlowError, TypeError):
    """An argument or a result cannot travel; the message names its path, as in `args[0]['x']`."""

    default_code = "serialization"


class ObjectError(FlowError):
    """A value by reference cannot be used: damaged, in a storage that is not trusted here, a pickle not asked for."""

    default_code = "object"


class SessionClosedError(FlowError, RuntimeError):
    """The session has been closed, or has ended by itself, so that it takes no more calls."""

    default_code = "session-closed"


class APIError(FlowError):
    """A remote service answered with an error; `status_code` is its HTTP status where there was one."""

    default_code = "api"

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        **fields: Unpack[ErrorFields],
    ) -> None:
        super().__init__(message, **fields)
        self.status_code: int | None = status_code


class ValidationAPIError(APIError):
    """The service understood the request and refuses its contents (HTTP 422)."""

    default_code = "api-validation"


class NetworkError(FlowError):
    """The service could not be reached, or the connection broke before its answer came."""

    default_code = "network"
    default_retryable = True


class TimeoutError(FlowError, builtins.TimeoutError):  # noqa: A001 - the documented name
    """The caller's own waiting time is over. The task itself goes on: wait again, or cancel it.

    A `TimeoutError` raised *by the user's function* is a `RemoteExecutionError` and never an instance of
    this class, so that `except FlowTimeoutError` only catches the end of one's own patience.
    """

    default_code = "timeout"
    default_retryable = True


class ProviderError(FlowError):
    """The back end failed in a way that it does not explain further."""

    default_code = "provider"


class ProviderUnavailable(ProviderError):
    """The back end cannot answer now; nothing is known to have changed. Ask again with the same key."""

    default_code = "provider-unavailable"
    default_retryable = True


class ResourceNotAvailableError(FlowError):
    """What was asked for exists, but none is free now."""

    default_code = "not-available"
    default_retryable = True


class QuotaExceededError(FlowError):
    """The project may not have more of this; a retry helps only after something else was given back."""

    default_code = "quota-exceeded"


class VolumeError(FlowError):
    """A volume cannot be created, attached or deleted."""

    default_code = "volume"


class TaskExecutionError(FlowError):
    """A task ended without success.

    `exit_code` or `signal` say how the command ended where that is known, `reason` is the snapshot's word
    for it (`exit`, `time-limit`, `runner-died` …), and `log_tail` is the end of what the task printed.
    """

    default_code = "task-execution"

    def __init__(
        self,
        message: str,
        *,
        task_id: str = "",
        exit_code: int | None = None,
        signal: int | None = None,
        reason: str = "",
        log_tail: str = "",
        **fields: Unpack[ErrorFields],
    ) -> None:
        super().__init__(message, **fields)
        self.task_id: str = task_id
        self.exit_code: int | None = exit_code
        self.signal: int | None = signal
        self.reason: str = reason
        self.log_tail: str = log_tail

    def __str__(self) -> str:
        return "\n\n".join([super().__str__(), *self._sections()])

    def _sections(self) -> list[str]:
        return _log_section(self.log_tail)


class TaskCancelledError(TaskExecutionError):
    """Someone cancelled the task."""

    default_code = "task-cancelled"


class CallCancelledError(TaskCancelledError):
    """Someone cancelled this call, before or while it ran; other calls of its session are not affected."""

    default_code = "call-cancelled"


class TaskTimeLimitError(TaskExecutionError):
    """The task ran past `max_run_time_hours` and was stopped on its machine."""

    default_code = "task-time-limit"


class CallTimeoutError(TaskTimeLimitError):
    """This call ran past its `timeout`, counted from the start of the user's code, and was stopped.

    Not a `TimeoutError`, which is the end of the caller's own patience while the work goes on.
    """

    default_code = "call-timeout"


class TaskOutOfMemoryError(TaskExecutionError):
    """The machine killed the task because it used too much memory."""

    default_code = "task-out-of-memory"


class WorkerDiedError(TaskExecutionError):
    """The machine or the runner vanished under the task (`reason`: runner-died, reboot or lost).

    The user's code is not to blame, so running the task again can help.
    """

    default_code = "worker-died"
    default_retryable = True


class PythonVersionMismatchError(TaskExecutionError):
    """The function was captured by another Python than the machine runs; nothing of it was run."""

    default_code = "python-version"


class ResultError(TaskExecutionError):
    """The task ended, but its result cannot be read: missing, damaged, too large, or it cannot travel.

    With the `error_code` "result-pickled" or "result-too-large" the value is there, to be collected in another way.
    """

    default_code = "result"


class RemoteExecutionError(TaskExecutionError, RuntimeError):
    """The user's function raised on the remote machine.

    Where the user's exception class is a built-in one or already imported here, the error is an instance of
    it as well: `except ValueError` catches a remote `ValueError`, with its `args` where JSON can carry them.
    The user's `__init__` is not run, so the attributes that it would set are absent; `exception_type`,
    `exception_module`, `exception_message` and `remote_traceback` always tell what happened. `__cause__` and
    `__context__` hold the remote chain.
    """

    default_code = "remote-execution"

    def __init__(
        self,
        message: str,
        *,
        exception_type: str = "",
        exception_module: str = "",
        exception_message: str = "",
        remote_traceback: str = "",
        **fields: Unpack[TaskErrorFields],
    ) -> None:
        super().__init__(message, **fields)
        self.exception_type: str = exception_type
        self.exception_module: str = exception_module
        self.exception_message: str = exception_message
        self.remote_traceback: str = remote_traceback
        self._record: Mapping[str, Any] = {}
        self._brief = False

    def __init_subclass__(cls) -> None:
        """Keep a user class's own `__init_subclass__` from running: being mixed in is not being inherited."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_remote, (self.args, dict(self.__dict__) | {"_record": dict(self._record)})

    def _follow(self, record: Mapping[str, Any]) -> None:
        """Take over what the constructor does not know from `record`, and keep it for pickling."""
        self._record = record
        if record.get("notes"):
            self.__notes__ = [str(note) for note in record["notes"]]
        self.__cause__, self.__context__ = (self._chained(record.get(link)) for link in ("cause", "context"))
        if type(self) is not RemoteExecutionError:
            restore_native_fields(self, record.get("args"))

    @staticmethod
    def _chained(record: object) -> RemoteExecutionError | None:
        if not isinstance(record, Mapping):
            return None
        error = remote_error(record)
        error._brief = True  # noqa: SLF001 - the traceback of the error that was raised shows the whole chain
        return error

    def _sections(self) -> list[str]:
        if self._brief:
            return []
        trace = self.remote_traceback.strip("\n")
        if not trace:
            return super()._sections()
        # A traceback is usually printed to the log as well: show it once.
        return [f"Remote traceback:\n{trace}", *_log_section(self.log_tail.replace(trace, ""))]


FlowTimeoutError = TimeoutError  # a name that does not shadow the built-in one
InsufficientQuotaError = QuotaExceededError  # its other documented name
# What other projects call these. An async function is run, so that nothing is refused for being one.
FunctionSerializationError = SerializationError
AsyncFunctionError = SerializationError
SandboxExecutionError = RemoteExecutionError
_REMOTE_FIELDS = frozenset(vars(RemoteExecutionError("")))


def remote_error(record: Mapping[str, Any], **fields: Unpack[TaskErrorFields]) -> RemoteExecutionError:
    """Rebuild what the remote function raised from its error record.

    `record` holds `type`, `module`, `qualname`, `message`, `args`, `traceback`, `notes`, and `cause` and
    `context` (records or None); every one may be missing. `fields` are those of `TaskExecutionError`. No code of the
    user runs and nothing is imported: the error is an instance of the user's class only if that class is
    found in a module that is already loaded. Nor is it ever an instance of another `FlowError`, or of an
    exception that steers the interpreter (SystemExit, KeyboardInterrupt, StopIteration …).
    """
    name = str(record.get("type") or "Exception")
    text = str(record.get("message") or "")
    found = find_exception_class(str(record.get("module") or ""), str(record.get("qualname") or name))
    cls = RemoteExecutionError
    if found is not None and not issubclass(found, FlowError):
        cls = mixed_class(RemoteExecutionError, found, _REMOTE_FIELDS)  # type: ignore[arg-type]  # is hashable
    if isinstance(record.get("exit_code"), int):
        fields.setdefault("exit_code", record["exit_code"])
    error = cls(
        f"Remote execution failed: {name}: {text}" if text else f"Remote execution failed: {name}",
        exception_type=name,
        exception_module=str(record.get("module") or ""),
        exception_message=text,
        remote_traceback=str(record.get("traceback") or ""),
        **fields,
    )
    error._follow(record)
    return error


def close_names(name: str, options: Iterable[str]) -> list[str]:
    """The options that look most like `name`, best first, at most three; none when nothing is near."""
    import difflib

    by_lower = {option.lower(): option for option in options}
    return [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)]


def _unpickle_remote(args: tuple[Any, ...], state: dict[str, Any]) -> RemoteExecutionError:
    error = remote_error(state["_record"]) if state["_record"] else RemoteExecutionError(state["message"])
    error.args = args
    error.__dict__.update(state)
    return error


def _log_section(log_tail: str) -> list[str]:
    tail = log_tail.strip("\n")
    return [f"Last lines of the log:\n{tail}"] if tail.strip() else []
