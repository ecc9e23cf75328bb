"""What Airflow's plugin manager loads in each of its processes: the listener."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin

from flow_airflow import listener


class FlowPlugin(AirflowPlugin):
    """Makes Airflow's API server and scheduler tell the listener what they decide."""

    name = "flow"
    listeners = [listener]  # noqa: RUF012  # Airflow declares a list
