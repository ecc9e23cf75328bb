"""What a task is asked to be: `TaskConfig`, as the user wrote it, and `TaskSpec`, resolved for a provider.

Every rule about a single task stands here and nowhere else; whether a provider can fulfil it is the
provider's to say. Also the one place to import the values of the neighbouring modules from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from typing_extensions import Self

from flow_core import gpus
from flow_core.status import LogChunk, LogPosition, Reason, Snapshot, TaskStatus
from flow_core.storage import Instance, MountPoint, MountSpec, Volume, VolumeSpec
from flow_core.values import Count, Items, Number, Refusal, Text, Value, matching, sendable, shown

__all__ = [
    "Instance",
    "LogChunk",
    "LogPosition",
    "MountPoint",
    "MountSpec",
    "Reason",
    "Snapshot",
    "SpecFile",
    "TaskConfig",
    "TaskSpec",
    "TaskStatus",
    "Volume",
    "VolumeSpec",
]

MAX_RUN_TIME_HOURS = 168
"""Seven days."""

MAX_INSTANCES = 1024
"""The most machines of one task: more is a slip of the finger."""

_IDLE = ("sleep", "infinity")
_COMMANDS = ("command", "shell", "script")
_MACHINES = ("instance_type", "min_gpu_memory_gb")


def _command(value: Any) -> Any:
    if isinstance(value, str):
        if not value.strip():
            raise Refusal("must not be empty")
        return sendable(value)
    if not isinstance(value, (list, tuple)):
        raise Refusal("must be text for a shell or a list of arguments")
    for index, argument in enumerate(value):
        if not isinstance(argument, str):
            raise Refusal(
                f"must be a list of text, and [{index}] is {shown(argument)}",
                f"Write {str(argument)!r} there.",
            )
        sendable(argument)
    if not value or not value[0]:
        raise Refusal("must begin with the name of a program")
    return tuple(value)


def _instance_type(value: str) -> str:
    gpus.parse(value)
    return value.strip()


def _environment(env: dict[str, str]) -> dict[str, str]:
    for value in env.values():
        sendable(value)
    return env


def _ports(ports: Sequence[int]) -> Sequence[int]:
    twice = sorted({port for port in ports if list(ports).count(port) > 1})
    if twice:
        raise Refusal(f"must name each port once, and {twice[0]} is there twice")
    return ports


def _working_dir(text: str) -> str:
    if ".." in Path(sendable(text)).parts:
        raise Refusal("must not contain '..'", "Write an absolute path, or one below the uploaded code.")
    return text


Command = Annotated[str | tuple[str, ...], BeforeValidator(_command)]
TaskName = Annotated[
    str,
    AfterValidator(
        matching(r"[A-Za-z0-9_-]{1,128}", "must be 1 to 128 letters, digits, dashes and underscores")
    ),
]
VariableName = Annotated[
    str,
    AfterValidator(
        matching(
            r"[A-Za-z_][A-Za-z0-9_]*", "must be letters, digits and underscores, and not begin with a digit"
        )
    ),
]
Region = Annotated[
    str,
    AfterValidator(matching(r"[A-Za-z0-9][A-Za-z0-9_.-]*", "must be a region's name, as in 'us-central1-b'")),
]
Image = Annotated[
    str,
    AfterValidator(matching(r"[^\s\0-][^\s\0]*", "must be the name of a container image, without spaces")),
]
Port = Annotated[Count, Field(ge=1, le=65535)]
InstanceType = Annotated[str, AfterValidator(_instance_type)]
Environment = Annotated[dict[VariableName, str], AfterValidator(_environment)]


class TaskConfig(Value):
    """What to run and on what, as the user says it. Checked when it is made; None means "not given".

    Machine, exactly one: `instance_type` (or `gpu`; "a100", "8xh100", "cpu" …) or `min_gpu_memory_gb`.
    `memory_mb` (or `memory`) is the main memory to ask of a scheduler for each machine; where nobody schedules
    memory, as on the local machine, there is what there is.
    Command, at most one: `command` (a string runs in bash, a list is the exact argument list), `shell` (a
    string that runs in bash) or `script` (a file's content, run by its `#!` line, or by Python where it has
    none). Without any of them the machine idles until it is cancelled, for work over `task.shell()`.

    `image` (or `container_image`) and `working_dir` are the provider's own unless given; a relative
    `working_dir` lies below the uploaded code. `env` values never show in `repr` or errors. `upload_code`
    uploads `code_root`, by default the current folder. With an `idempotency_key` the same key means the same
    task. `num_instances` is the number of machines, each with its own `instance_type`.
    """

    secret_fields: ClassVar[frozenset[str]] = frozenset({"env"})
    other_names: ClassVar[dict[str, str]] = {
        "gpu": "instance_type",
        "container_image": "image",
        "memory": "memory_mb",
    }

    name: TaskName = Field("task", examples=["training-job"])
    instance_type: InstanceType | None = Field(None, examples=["a100", "8xh100"])
    min_gpu_memory_gb: Count | None = Field(None, gt=0, examples=[40])
    memory_mb: Count | None = Field(None, gt=0, examples=[32768])
    command: Command | None = Field(None, examples=["python train.py", ["python", "train.py"]])
    shell: Text | None = Field(None, examples=["cd /app && python train.py"])
    script: Text | None = Field(None, examples=["#!/bin/bash\nnvidia-smi\n"])
    env: Environment = Field({}, examples=[{"BATCH_SIZE": "256"}])
    image: Image | None = Field(None, examples=["pytorch/pytorch:2.1.0-cuda12.1-cudnn8"])
    working_dir: Annotated[Text, AfterValidator(_working_dir)] | None = Field(None, examples=["/workspace"])
    volumes: Items[VolumeSpec] = Field((), examples=[[{"name": "data", "size_gb": 100}]])
    data_mounts: Items[MountSpec] = Field((), examples=[[{"source": "s3://bucket/data", "target": "/data"}]])
    max_price_per_hour: Number | None = Field(None, gt=0, examples=[10.0])
    max_run_time_hours: Number | None = Field(None, gt=0, le=MAX_RUN_TIME_HOURS, examples=[24.0])
    region: Region | None = Field(None, examples=["us-central1-b"])
    num_instances: Count = Field(1, ge=1, le=MAX_INSTANCES, examples=[4])
    ssh_keys: Items[Text] = Field((), examples=[["my-key"]])
    ports: Annotated[Items[Port], AfterValidator(_ports)] = Field((), examples=[[8888]])
    upload_code: bool = Field(True, examples=[False])
    code_root: Annotated[Path, AfterValidator(Path.expanduser)] | None = Field(None, examples=["src"])
    idempotency_key: Text | None = Field(None, examples=["nightly-2025-01-31"])
    labels: dict[Text, str] = Field({}, examples=[{"team": "vision"}])

    @model_validator(mode="after")
    def _one_machine(self) -> Self:
        given = [name for name in _MACHINES if getattr(self, name) is not None]
        if len(given) == 1:
            return self
        problem = (
            "got both instance_type and min_gpu_memory_gb" if given else "does not say which machine to use"
        )
        raise Refusal(
            problem,
            "Give exactly one of instance_type='a100' (or '8xh100', 'cpu' …) and min_gpu_memory_gb=40.",
        )

    @model_validator(mode="after")
    def _one_command(self) -> Self:
        given = [name for name in _COMMANDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise Refusal(f"got {' and '.join(given)}", f"Give exactly one of {', '.join(_COMMANDS)}.")
        return self

    @model_validator(mode="after")
    def _one_place_each(self) -> Self:
        targets = [volume.mount_path for volume in self.volumes] + [
            mount.target for mount in self.data_mounts
        ]
        storage = [volume.name or volume.volume_id for volume in self.volumes]
        for kind, names in (("path", targets), ("volume", storage)):
            twice = [name for index, name in enumerate(names) if name in names[:index]]
            if twice:
                raise Refusal(
                    f"mounts the {kind} {twice[0]!r} twice", "Give each volume once, with its own mount_path."
                )
        return self

    @property
    def gpu(self) -> str | None:
        """The same as `instance_type`."""
        return self.instance_type

    @property
    def container_image(self) -> str | None:
        """The same as `image`."""
        return self.image

    def replace(self, **changes: Any) -> TaskConfig:
        """A copy with other values, checked anew. A new command or machine takes the old one's place.

        A value of None changes nothing.

        Raises:
            ValidationError: as for a new TaskConfig.
        """
        changed = self._canonical(changes)
        dropped: set[str] = set()
        for group in (_COMMANDS, _MACHINES):
            if any(name in changed for name in group):
                dropped.update(group)
        kept = {name: getattr(self, name) for name in self.model_fields_set - dropped}
        return TaskConfig(**kept | changed)

    @classmethod
    def from_spec(cls, spec: TaskSpec) -> TaskConfig:
        """What somebody may have written to get `spec`; the uploaded code is not part of it."""
        fields = {name: getattr(spec, name) for name in cls.model_fields if name in TaskSpec.model_fields}
        if not spec.instance_type:
            fields["instance_type"] = None
        if spec.entry == "script":
            fields["script"] = spec.script
        else:
            fields["script"] = None
            if spec.entry == "shell":
                fields["command"] = spec.argv[0]
            elif spec.entry == "argv" and spec.argv != _IDLE:
                fields["command"] = spec.argv
        if spec.max_run_time_s is not None:
            fields["max_run_time_hours"] = spec.max_run_time_s / 3600
        return cls(**fields, upload_code=False)


class SpecFile(Value):
    """A file that is in the task's folder before the task starts: from `path`, or with the bytes `data`."""

    secret_fields: ClassVar[frozenset[str]] = frozenset({"data"})

    name: Text
    path: Path | None = None
    data: bytes | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.data is None):
            raise Refusal(f"{self.name!r} needs exactly one of path and data")
        return self


class TaskSpec(Value):
    """A task as a provider gets it: every choice made, every default filled in.

    `entry` says how it starts: `argv` is the argument list, `shell` has its one string in `argv[0]`,
    `script` is a file's content, and `call` runs the function call whose `files` are in the task's folder.
    `instance_type` is canonical ("8xh100"), or empty where `min_gpu_memory_gb` chooses; `gpu_count` is the
    number of GPUs of each of the `num_instances` machines. None means "no limit", "no preference" or, for
    `image` and `working_dir`, "whatever the provider's machines have".
    """

    secret_fields: ClassVar[frozenset[str]] = frozenset({"env"})

    name: str
    entry: Literal["argv", "shell", "script", "call"]
    argv: tuple[str, ...] = ()
    script: str = ""
    env: dict[str, str] = Field({})
    instance_type: str = "cpu"
    gpu_count: Count = Field(0, ge=0)
    min_gpu_memory_gb: Count | None = None
    memory_mb: Count | None = None
    num_instances: Count = Field(1, ge=1)
    image: str | None = None
    working_dir: str | None = None
    volumes: tuple[VolumeSpec, ...] = ()
    data_mounts: tuple[MountSpec, ...] = ()
    ports: tuple[int, ...] = ()
    ssh_keys: tuple[str, ...] = ()
    region: str | None = None
    max_price_per_hour: Number | None = None
    max_run_time_s: Number | None = None
    labels: dict[str, str] = Field({})
    files: tuple[SpecFile, ...] = ()

    @classmethod
    def from_config(cls, config: TaskConfig, files: Sequence[SpecFile] = ()) -> TaskSpec:
        """Resolve what the user wrote. Pure: nothing is read, found or uploaded."""
        same = {name: getattr(config, name) for name in cls.model_fields if name in TaskConfig.model_fields}
        hours = config.max_run_time_hours
        if config.instance_type is None:
            machine = {"instance_type": "", "gpu_count": 1}
        else:
            request = gpus.parse(config.instance_type)
            machine = {"instance_type": str(request), "gpu_count": request.count}
        return cls(
            **same | machine | _entry(config) | {"files": tuple(files)},
            max_run_time_s=None if hours is None else hours * 3600,
        )


def _entry(config: TaskConfig) -> dict[str, Any]:
    """How the task starts, as fields of a TaskSpec."""
    if config.script is not None:
        return {"entry": "script", "script": config.script}
    text = config.shell if config.shell is not None else config.command
    if isinstance(text, str):
        return {"entry": "shell", "argv": (text,)}
    return {"entry": "argv", "argv": text or _IDLE}
