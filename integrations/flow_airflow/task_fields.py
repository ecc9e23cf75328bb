"""What every operator of one Flow task can be told about it: the fields of TaskConfig. Only translates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flow_airflow.arguments import plain, texts
from flow_airflow.legs import FlowOperator
from flow_airflow.tracing import TRACEPARENT, HandedOn, handed_on

if TYPE_CHECKING:
    from airflow.sdk import Context

    from flow_airflow.nodes import Node
    from flow_core.models import MountSpec, VolumeSpec

#: TaskConfig's fields that are passed on as they are, whatever the task is; None stands for "not given".
FIELDS = (
    *("gpu", "instance_type", "min_gpu_memory_gb", "memory_mb", "env", "image", "working_dir", "volumes"),
    "data_mounts",
    *("max_price_per_hour", "max_run_time_hours", "region", "num_instances", "ssh_keys", "ports"),
)


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
