"""Operators for volumes: storage that outlives the tasks that use it. Only translates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk import BaseOperator

from flow_airflow.arguments import refuse_unknown
from flow_airflow.failures import to_airflow
from flow_airflow.hooks import opener
from flow_core.errors import FlowError, VolumeNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from airflow.sdk import Context

    from flow_core import Flow


class _VolumeOperator(BaseOperator):
    """What asks a provider for something about volumes."""

    ui_color = "#d8f0dc"

    def __init__(
        self, *, provider: str | None = None, flow_conn_id: str | None = None, **kwargs: Any
    ) -> None:
        refuse_unknown(type(self), kwargs)
        super().__init__(**kwargs)
        self.provider = provider
        self.flow_conn_id = flow_conn_id

    def ask(self, what: Callable[[Flow], Any]) -> Any:
        """Return the provider's answer. A refusal that no retry can change fails the task at once."""
        try:
            return what(opener(self.provider, self.flow_conn_id)())
        except FlowError as error:
            hopeless = to_airflow(error)
            if hopeless is not None:
                raise hopeless from error
            raise


class FlowCreateVolumeOperator(_VolumeOperator):
    """Create a volume of `size_gb`, or find the one that has this `name` already; the XCom is its id.

    Pass the id on as `volumes=[{"volume_id": create.output, "mount_path": "/data"}]`.
    """

    template_fields: Sequence[str] = ("name", "size_gb", "interface", "provider", "flow_conn_id")

    def __init__(
        self,
        *,
        name: str,
        size_gb: int | str = 100,
        interface: Literal["block", "file"] = "block",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.name = name
        self.size_gb = size_gb
        self.interface = interface

    def execute(self, context: Context) -> str:  # noqa: ARG002  # Airflow's signature
        """Create or find the volume; return its id."""
        volume = self.ask(
            lambda flow: flow.create_volume(int(self.size_gb), name=self.name, interface=self.interface)
        )
        self.log.info("Volume %s (%s, %s GB).", volume.volume_id, volume.name, volume.size_gb)
        return str(volume.volume_id)


class FlowDeleteVolumeOperator(_VolumeOperator):
    """Delete a volume and what is on it, by id or name; one that is not there is passed over.

    While a task uses it this fails, and a retry may succeed.
    """

    template_fields: Sequence[str] = ("volume", "provider", "flow_conn_id")

    def __init__(self, *, volume: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.volume = volume

    def execute(self, context: Context) -> None:  # noqa: ARG002  # Airflow's signature
        """Delete the volume."""
        try:
            self.ask(lambda flow: flow.delete_volume(self.volume))
        except VolumeNotFoundError:
            self.log.info("There is no volume %s.", self.volume)
        else:
            self.log.info("Deleted volume %s.", self.volume)
