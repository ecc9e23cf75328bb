"""FlowHook: a connection of type `flow`, as the Flow that it stands for. What its fields mean is `connections`'."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from flow_core.errors import ConfigError, FlowError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flow_core import Flow
    from flow_core.models import Instance


class FlowHook(BaseHook):
    """Gives access to what a connection of type `flow` stands for: `FlowHook("gpus").get_conn().run(…)`.

    A connection holds the settings of a Flow; see `flow_airflow.connections.settings_of`.
    """

    conn_name_attr = "flow_conn_id"
    default_conn_name = "flow_default"
    conn_type = "flow"
    hook_name = "Flow"

    def __init__(self, flow_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flow_conn_id = flow_conn_id

    def get_conn(self, provider: str | None = None) -> Flow:
        """Return a Flow with the connection's settings; `provider` replaces the one that it names.

        Raises ConfigError that names the connection when it cannot be used.
        """
        return opener(provider, self.flow_conn_id)()

    def test_connection(self) -> tuple[bool, str]:
        """Ask the provider what can be had; return whether it answered, and in one line what it said."""
        try:
            flow = self.get_conn()
            return True, f"{flow.provider.name}: {_summary(flow.find_instances(limit=100))}"
        except FlowError as error:
            return False, " ".join(str(error).split())


def opener(provider: str | None, flow_conn_id: str | None) -> Callable[[], Flow]:
    """Return what makes the Flow of an operator; the connection is looked up now, and never again.

    So threads, signal handlers and later calls need not ask Airflow for it. Without a connection, the worker's settings
    file and environment hold. Raises ConfigError, and what Airflow raises for a connection that there is not.
    """
    if flow_conn_id is None:
        return partial(_open, provider=provider)
    connection = FlowHook.get_connection(flow_conn_id)
    if connection.conn_type != FlowHook.conn_type:
        raise ConfigError(
            f"the connection {flow_conn_id!r} is of type {connection.conn_type!r}",
            suggestions=[f"Make it one of type {FlowHook.conn_type!r}, or name another in flow_conn_id."],
        )
    from flow_airflow.connections import settings_of  # it loads what a DAG file need not wait for

    settings: dict[str, Any] = settings_of(connection, provider)
    return partial(_open_connection, flow_conn_id, settings)


def _open(**settings: Any) -> Flow:
    from flow_core import Flow

    return Flow(**settings)


def _open_connection(flow_conn_id: str, settings: dict[str, Any]) -> Flow:
    try:
        return _open(**settings)
    except ConfigError as error:
        raise ConfigError(
            f"the connection {flow_conn_id!r} cannot be used: {error.message}", suggestions=error.suggestions
        ) from None


def _summary(found: list[Instance]) -> str:
    """Say in one line what machines there are."""
    if not found:
        return "it answers, and has no machines now"
    kinds = []
    for one in found[:8]:
        free = "" if one.available is None else f", {one.available} free"
        where = f" in {one.region}" if one.region else ""
        price = f", ${one.price_per_hour:.2f} an hour" if one.price_per_hour else ""
        kinds.append(f"{one.instance_type}{where}{free}{price}")
    more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    return "it answers, and has " + "; ".join(kinds) + more
