"""Storage and machines as values: what a task attaches, what exists, what can be had."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from flow_core.values import Count, Number, Refusal, Text, Value, matching, sendable

DEFAULT_VOLUME_GB = 100
"""The size of a volume that is created because a task names it and says no size."""


def _mount_point(text: str) -> str:
    path = PurePosixPath(sendable(text))
    if not path.is_absolute() or path == PurePosixPath("/") or ".." in path.parts:
        raise Refusal("must be an absolute path below '/', without '..'")
    if any(sign in text for sign in ":,\n\r"):
        raise Refusal("must not contain a colon, a comma or a line break")
    return "/" + "/".join(path.parts[1:])


MountPoint = Annotated[str, AfterValidator(_mount_point)]
"""An absolute path inside the task's machine or container, without a slash at its end."""

VolumeName = Annotated[
    str,
    AfterValidator(
        matching(
            r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}",
            "must be 1 to 64 letters, digits, dashes and underscores, and begin with a letter or digit",
        )
    ),
]
VolumeId = Annotated[
    str,
    AfterValidator(
        matching(
            r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}",
            "must be the id of a volume: letters, digits, dots, dashes and underscores",
        )
    ),
]


class VolumeSpec(Value):
    """Storage that a task attaches and that outlives it.

    With `name` the volume is created on first use (`size_gb`, 100 unless given) and used again afterwards,
    whatever its size; with `volume_id` it must exist, and neither `size_gb` nor `iops` can be given. It is
    mounted at `mount_path`, by default `/volumes/<name>`.
    """

    name: VolumeName | None = Field(None, examples=["training-data"])
    volume_id: VolumeId | None = Field(None, examples=["vol-abc123"])
    size_gb: Count | None = Field(None, gt=0, examples=[DEFAULT_VOLUME_GB])
    mount_path: MountPoint = Field("", examples=["/data"])
    interface: Literal["block", "file"] = Field("block", examples=["block", "file"])
    iops: Count | None = Field(None, gt=0, examples=[3000])

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        filled = dict(given)
        if filled.get("volume_id") is None and filled.get("name") is not None:
            filled.setdefault("size_gb", DEFAULT_VOLUME_GB)
        filled.setdefault(
            "mount_path", f"/volumes/{filled.get('name') or filled.get('volume_id') or 'volume'}"
        )
        return filled

    @model_validator(mode="after")
    def _new_or_existing(self) -> VolumeSpec:
        if (self.name is None) == (self.volume_id is None):
            raise Refusal(
                "needs exactly one of name and volume_id",
                "Give name='…' for a volume that is created on first use, volume_id='…' for one that exists.",
            )
        given = [field for field in ("size_gb", "iops") if getattr(self, field) is not None]
        if self.volume_id is not None and given:
            raise Refusal(
                f"got volume_id={self.volume_id!r} together with {' and '.join(given)}, which an existing volume "
                "has already",
                f"Leave out {' and '.join(given)}, or give name= in place of volume_id=.",
            )
        return self

    @property
    def default_mount_path(self) -> str:
        """Where it is mounted when nobody says anything else."""
        return f"/volumes/{self.name or self.volume_id}"


class MountSpec(Value):
    """Data from elsewhere (`s3://bucket/data`, a path on the machine) shown to the task at `target`."""

    source: Text = Field(examples=["s3://bucket/data"])
    target: MountPoint = Field(examples=["/data"])


class Record(Value):
    """A value that can also be read like a mapping: `record["region"]`, `dict(record)`."""

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in type(self).model_fields

    def keys(self) -> Iterator[str]:
        """The names of the fields."""
        return iter(type(self).model_fields)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, `default` where there is no such field."""
        return getattr(self, name) if name in self else default


class Volume(Record):
    """Storage that exists. `region` is where it can be attached, `created_at` is None where nobody knows."""

    volume_id: str
    name: str
    size_gb: int
    region: str
    interface: Literal["block", "file"] = "block"
    created_at: datetime | None = None
    attached_to: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The same as `volume_id`."""
        return self.volume_id


class Instance(Record):
    """Machines of one kind that can be asked for in one place.

    `gpu_memory_gb` is that of one GPU, `price_per_hour` is in US dollars for one machine; `available` says
    how many can be had now. All three are None where the provider does not tell.
    """

    instance_type: str
    gpu_type: str | None = None
    gpu_count: Count = Field(0, ge=0)
    gpu_memory_gb: Count | None = None
    price_per_hour: Number | None = None
    region: str = ""
    available: Count | None = None
    instance_id: str | None = None
