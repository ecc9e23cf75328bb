"""A function call as a task: what travels to the machine, and the handle through which its value comes back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

from flow_core import config, payload, providers
from flow_core.engine import Engine
from flow_core.errors import FlowError, ResourceNotFoundError, ResultError, ValidationError
from flow_core.models import SpecFile
from flow_core.task import Task

Serialization = Literal["json", "pickle"]


def task_name(function_name: str) -> str:
    """Return a valid task name that a person connects with the function."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", function_name).strip("-_")[:60] or "call"


def named_call(
    module_path: str | Path,
    function_name: str,
    args: list[Any],
    kwargs: dict[str, Any],
    code_root: str | Path | None,
) -> tuple[SpecFile, ...]:
    """Return the files of a call by module and function name.

    Without `code_root` the module's file is among them. Raises SerializationError for what JSON cannot carry,
    ValidationError for a module that is not there.
    """
    if not function_name.isidentifier():
        raise ValidationError(f"function_name={function_name!r} is not the name of a function")
    files, module = _module(module_path, code_root)
    envelope = payload.encode_call(module, function_name, args, kwargs)
    return (*files, SpecFile(name="call.json", data=envelope))


def _module(module_path: str | Path, code_root: str | Path | None) -> tuple[tuple[SpecFile, ...], str]:
    """Return (files to send, the module as the machine will know it)."""
    text = str(module_path)
    if not text.endswith(".py"):
        if not all(part.isidentifier() for part in text.split(".")):
            raise ValidationError(
                f"module_path={text!r} is neither a Python file nor a dotted module name",
                suggestions=[
                    "Give a path such as 'train.py', or a name such as 'package.train' with code_root=."
                ],
            )
        if code_root is not None:
            _check_dotted(text, Path(code_root))
        return (), text
    if code_root is None:
        path = Path(module_path)
        if not path.is_file():
            raise ValidationError(
                f"module_path={text!r} does not exist in {Path.cwd()}",
                suggestions=["Give the path of the file, absolute or from the current folder."],
            )
        return (SpecFile(name=f"work/{path.name}", path=path.resolve()),), path.name
    return (), _within(Path(module_path), Path(code_root)).as_posix()


def _within(path: Path, root: Path) -> PurePath:
    """Return the module's path from the root: it may be given from the root, from here, or absolute."""
    for candidate in (root / path, path):
        resolved = candidate.resolve()
        if candidate.is_file() and resolved.is_relative_to(root.resolve()):
            return resolved.relative_to(root.resolve())
    raise ValidationError(
        f"module_path={str(path)!r} is no file inside code_root={str(root)!r}",
        suggestions=["Give the path as seen from code_root."],
    )


def _check_dotted(module: str, root: Path) -> None:
    """A dotted name may be installed on the machine, so only a near miss inside the root is an error here."""
    top = root / module.split(".", maxsplit=1)[0]
    path = root.joinpath(*module.split("."))
    if (top.is_dir() or top.with_suffix(".py").is_file()) and not (
        path.is_dir() or path.with_suffix(".py").is_file()
    ):
        raise ValidationError(
            f"module_path={module!r} is not found in code_root={str(root)!r}: there is no {path.with_suffix('.py')}"
        )


def live_call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    serialization: Serialization,
    replace: Mapping[Any, Any],
) -> tuple[SpecFile, ...]:
    """Return the files of a call of a live function. Raises SerializationError that names what cannot travel."""
    from flow_core import capture

    return tuple(
        SpecFile(name=name, data=data)
        for name, data in capture.capture(
            function, args, kwargs, result_codec=serialization, replace=replace
        ).items()
    )


class InvokeTask(Task):
    """The handle of a function call. Its id is all that another process needs to collect the value."""

    def __init__(self, *args: Any, serialization: Serialization = "json", **fields: Any) -> None:
        super().__init__(*args, **fields)
        self._serialization = serialization

    @classmethod
    def from_id(cls, task_id: str, *, serialization: Serialization = "json", **settings: Any) -> InvokeTask:
        """Return the handle of a call that any process with the same settings submitted.

        `serialization="pickle"` says that you trust the call's result and want it unpickled. Raises TaskNotFoundError.
        """
        engine = Engine(providers.load(config.load(**settings)))
        return cls(engine, task_id, seen=engine.get(task_id), serialization=serialization)

    def get_result(self, timeout: float | None = None) -> Any:
        """Wait for the call and return its value.

        Raises RemoteExecutionError, also an instance of the function's own exception class, when the function raised;
        TaskCancelledError, TaskTimeLimitError, TaskOutOfMemoryError or WorkerDiedError when it did not get to its end;
        ResultError when its value could not travel; TimeoutError after `timeout` seconds, and then the call goes on.
        """
        return self.result(timeout)

    def result(self, timeout: float | None = None) -> Any:
        """The same as `get_result`."""
        self.wait(timeout)
        if not self.status.succeeded:
            raise self.error()
        try:
            data = self._engine.collect(self.task_id, "result")
        except ResourceNotFoundError as missing:
            raise self._without_result() from missing
        return payload.decode_result(data, allow_pickle=self._serialization == "pickle", task_id=self.task_id)

    def error(self) -> FlowError:
        """Return the exception that says how this ended call failed: the function's own where it raised one."""
        seen = self.snapshot
        if seen.reason == "exit":
            try:
                data = self._engine.collect(self.task_id, "result")
            except ResourceNotFoundError:
                pass
            else:
                tail = self._engine.ending(self.task_id)
                told = payload.decode_error(
                    data, task_id=self.task_id, exit_code=seen.exit_code, log_tail=tail
                )
                if told is not None:
                    return told
        return super().error()

    def _without_result(self) -> ResultError:
        released = self.snapshot.reason == "released"
        fate = "has been released" if released else "is missing, although the call succeeded"
        return ResultError(
            f"the result of {self.task_id} {fate}",
            task_id=self.task_id,
            exit_code=self.snapshot.exit_code,
        )
