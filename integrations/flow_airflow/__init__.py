"""Airflow: run a command or a pure function on a GPU machine as a task, and wait for one from another DAG.

from flow_airflow import FlowGPUOperator, FlowTaskSensor
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flow_airflow.operators import FlowGPUOperator as FlowGPUOperator
    from flow_airflow.results import load as load
    from flow_airflow.sensors import FlowTaskSensor as FlowTaskSensor
    from flow_airflow.triggers import FlowTaskTrigger as FlowTaskTrigger

__all__ = ["FlowGPUOperator", "FlowTaskSensor", "FlowTaskTrigger", "load"]

_HOMES = {
    "FlowGPUOperator": "operators",
    "FlowTaskSensor": "sensors",
    "FlowTaskTrigger": "triggers",
    "load": "results",
}


def __getattr__(name: str) -> object:
    # Lazily: Airflow's provider manager imports this package whenever a command starts.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
