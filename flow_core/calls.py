"""A function call as a task: what travels to the machine, and the handle through which its value comes back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

from flow_core import config, payload, providers
from flow_core.engine import Engine
from flow_core.errors import (
    FlowError,
    ObjectError,
    ObjectNotFoundError,
    ResourceNotFoundError,
    ResultError,
    ValidationError,
)
from flow_core.models import SpecFile
from flow_core.object_ref import Codec, ObjectRef, task_uri
from flow_core.objects import Inputs, Objects
from flow_core.runner.pickles import PICKLE_LIMIT_BYTES
from flow_core.runner.strict_json import JSON_LIMIT_BYTES
from flow_core.task import Task

Serialization = Literal["json", "pickle"]
ResultForm = Literal["value", "ref"] | int
"""How a call's value comes back: itself, a reference to where it lies, or a reference if it takes more than so many
bytes. Without a word the settings decide."""


def reference_over(result: ResultForm | None, settings: config.Settings) -> int | None:
    """Return the size from which on a value comes back as a reference, None for never. Raises ValidationError."""
    if result is None:
        return settings.objects.reference_over_bytes
    if isinstance(result, int) and not isinstance(result, bool):
        return result
    if result not in ("value", "ref"):
        raise ValidationError(f"result={result!r} is neither 'value' nor 'ref', nor a number of bytes")
    return 0 if result == "ref" else None


def task_name(function_name: str) -> str:
    """Return a valid task name that a person connects with the function."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", function_name).strip("-_")[:60] or "call"


def named_call(
    module_path: str | Path,
    function_name: str,
    args: list[Any],
    kwargs: dict[str, Any],
    code_root: str | Path | None,
    *,
    codec: Serialization = "json",
) -> tuple[SpecFile, ...]:
    """Return the files of a call by module and function name.

    Without `code_root` the module's file is among them. `codec` is that of its value. Raises SerializationError for
    what JSON cannot carry, ValidationError for a module that is not there.
    """
    if not function_name.isidentifier():
        raise ValidationError(f"function_name={function_name!r} is not the name of a function")
    files, module = _module(module_path, code_root)
    envelope = payload.encode_call(module, function_name, args, kwargs, codec=codec)
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
    replace: Mapping[Any, Any] | Iterable[tuple[Any, Any]],
) -> tuple[SpecFile, ...]:
    """Return the files of a call of a live function. Raises SerializationError that names what cannot travel."""
    from flow_core import capture

    return tuple(
        SpecFile(name=name, data=data)
        for name, data in capture.capture(
            function, args, kwargs, result_codec=serialization, replace=replace
        ).items()
    )


def completed(files: tuple[SpecFile, ...], inputs: Inputs, *, by_reference: bool) -> tuple[SpecFile, ...]:
    """Return the files of a call that also gets `inputs`, and whose value may be taken by reference."""
    more: dict[str, Any] = {"inputs": list(inputs.listed)} if inputs.listed else {}
    if by_reference:
        more["by_reference"] = True
    known = {file.name: file for file in files}
    envelope = known["call.json"].data or b""
    known["call.json"] = SpecFile(name="call.json", data=payload.with_fields(envelope, more))
    return tuple({file.name: file for file in (*inputs.files, *known.values())}.values())


class InvokeTask(Task):
    """The handle of a function call. Its id is all that another process needs to collect the value."""

    def __init__(
        self,
        *args: Any,
        objects: Objects,
        serialization: Serialization = "json",
        result: ResultForm | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(*args, **fields)
        self._objects = objects
        self._serialization = serialization
        self._reference_over = reference_over(result, objects.settings)

    @classmethod
    def from_id(
        cls,
        task_id: str,
        *,
        serialization: Serialization = "json",
        result: ResultForm | None = None,
        **settings: Any,
    ) -> InvokeTask:
        """Return the handle of a call that any process with the same settings submitted.

        `serialization="pickle"` says that you trust the call's result and want it unpickled; `result` is that of
        `Flow.invoke`. Raises TaskNotFoundError.
        """
        loaded = config.load(**settings)
        engine = Engine(providers.load(loaded))
        return cls(
            engine,
            task_id,
            seen=engine.get(task_id),
            objects=Objects(loaded, engine),
            serialization=serialization,
            result=result,
        )

    def get_result(self, timeout: float | None = None) -> Any:
        """Wait for the call and return its value.

        Raises RemoteExecutionError, also an instance of the function's own exception class, when the function raised;
        TaskCancelledError, TaskTimeLimitError, TaskOutOfMemoryError or WorkerDiedError when it did not get to its end;
        ResultError when its value could not travel; TimeoutError after `timeout` seconds, and then the call goes on.
        """
        return self.result(timeout)

    def result(self, timeout: float | None = None) -> Any:
        """The same as `get_result`."""
        data = self._collected(timeout)
        about = payload.describe_result(data, task_id=self.task_id)
        if self._reference_over is not None and about.size > self._reference_over:
            return self._ref(about)
        if about.file is None or (about.not_json and self._serialization != "pickle"):
            return payload.decode_result(
                data, allow_pickle=self._serialization == "pickle", task_id=self.task_id
            )
        limit = JSON_LIMIT_BYTES if about.codec == "json" else PICKLE_LIMIT_BYTES
        if about.size > limit:
            raise ResultError(
                f"the result of {self.task_id} takes {about.size:,} bytes as {about.codec}; at most {limit:,} travel "
                "by value",
                suggestions=[
                    "It is kept with its task. Take it by reference: task.ref(), or result='ref' in the call."
                ],
                error_code=payload.RESULT_TOO_LARGE,
                task_id=self.task_id,
            )
        try:
            return self._objects.get(self._ref(about), allow_pickle=self._serialization == "pickle")
        except (ObjectError, ObjectNotFoundError) as error:
            raise ResultError(error.message, suggestions=error.suggestions, task_id=self.task_id) from error

    def ref(self, timeout: float | None = None) -> ObjectRef:
        """Wait for the call and return a reference to its value, which stays where it is. Raises what `result` raises.

        Pass it to a later call, which gets the value, in this process or, by way of the host's database, in any other.
        It is good until the task is released or its retention time is over.
        """
        return self._ref(payload.describe_result(self._collected(timeout), task_id=self.task_id))

    def _ref(self, about: payload.About) -> ObjectRef:
        uri = task_uri(self._engine.provider.name, self.task_id, about.file or "result")
        codec: Codec = "json" if about.codec == "json" else "pickle"
        return ObjectRef(uri=uri, size_bytes=about.size, sha256=about.sha256, codec=codec)

    def _collected(self, timeout: float | None) -> bytes:
        """Wait for the end and return the content of the `result` file."""
        self.wait(timeout)
        if not self.status.succeeded:
            raise self.error()
        try:
            return self._engine.collect(self.task_id, "result")
        except ResourceNotFoundError as missing:
            raise self._without_result() from missing

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
