"""What a remote function asks for: how its values travel, what its workers need, how long and how often it may run."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, InstanceOf
from typing_extensions import Self

from flow_core.definitions import CallOptions, Retries
from flow_core.errors import ValidationError
from flow_core.models import Environment, Image, InstanceType
from flow_core.runner.crew import MAX_WORKERS
from flow_core.values import Count, Number, Refusal, Text, Value, shown


class Serialization(str, Enum):
    """How arguments and results travel; the function itself is not affected.

    JSON takes plain values and refuses what it would silently change, both ways; tuples arrive as lists. PICKLE takes
    nearly everything, and arrays without copies; to unpickle a result is to trust the machine that made it.
    """

    JSON = "json"
    PICKLE = "pickle"


def _retries(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        value = Retries(lost=value, exceptions=value)
    if not isinstance(value, Retries):
        raise Refusal("must be a number of further attempts, or Retries(lost=…, exceptions=…)")
    if value.lost < 0 or value.exceptions < 0:
        raise Refusal("must not be negative")
    return value


class FunctionOptions(Value):
    """The options of `Session.function`. What is not given is as the session has it.

    `serialization` governs arguments and results. A function with an `image` (or `container_image`), `gpu` (or
    `instance_type`, or `resources={"gpu": {"type": "A100", "count": 1}}`), `env` (or `environment_variables`; added to
    the session's), `workers` or `startup_timeout` of its own gets workers of its own, started when it is first called.
    `timeout` is the seconds that each attempt of a call may take, counted from the start of the user's code.
    `retries` is how often a call is made again, none unless asked: a number counts lost workers and the function's own
    exceptions alike. `name` is what errors call the function.
    """

    secret_fields: ClassVar[frozenset[str]] = frozenset({"env"})
    other_names: ClassVar[Mapping[str, str]] = {
        "container_image": "image",
        "environment_variables": "env",
        "gpu": "instance_type",
        "startup_timeout": "startup_timeout_s",
        "timeout": "timeout_s",
    }

    name: Text | None = Field(None, examples=["train"])
    serialization: Serialization = Field(Serialization.JSON, examples=["json", "pickle"])
    instance_type: InstanceType | None = Field(None, examples=["a100", "2xh100"])
    image: Image | None = Field(None, examples=["pytorch/pytorch:2.1.0-cuda12.1-cudnn8"])
    env: Environment = Field({}, examples=[{"BATCH_SIZE": "256"}])
    workers: Count = Field(2, ge=1, le=MAX_WORKERS, examples=[4])
    timeout_s: Number | None = Field(None, gt=0, examples=[60])
    startup_timeout_s: Number | None = Field(None, gt=0, examples=[300])
    retries: Annotated[InstanceOf[Retries], BeforeValidator(_retries)] = Field(Retries(), examples=[3])

    @classmethod
    def _canonical(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(fields)
        resources = given.pop("resources", None)
        if resources is not None:
            given.setdefault("gpu", _gpu_of(resources))
        return super()._canonical(given)

    def changed(self, other: FunctionOptions) -> Self:
        """Return these options with what `other` has of its own; variables are added to those that are here."""
        given = {name: getattr(other, name) for name in other.model_fields_set}
        if "env" in given:
            given["env"] = {**self.env, **given["env"]}
        own = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**own, **given})

    @property
    def of_call(self) -> CallOptions:
        """What each call asks of its workers."""
        return CallOptions(timeout_s=self.timeout_s, retries=self.retries)


def _gpu_of(resources: Any) -> str | None:
    """Return the instance type that `{"gpu": {"type": "A100", "count": 2}}` asks for."""
    if not isinstance(resources, Mapping) or set(resources) - {"gpu"}:
        raise ValidationError(
            f"resources={shown(resources)} is not understood: it may ask for a GPU and nothing else",
            suggestions=['Write resources={"gpu": {"type": "A100", "count": 1}}, or gpu="a100".'],
        )
    gpu = resources.get("gpu")
    if not isinstance(gpu, Mapping):
        return gpu
    return f"{gpu.get('count', 1)}x{str(gpu.get('type', '')).lower()}"
