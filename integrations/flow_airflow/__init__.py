"""Airflow: commands and functions on GPU machines as tasks, and what goes with them. Imported when first used.

from flow_airflow import FlowGPUOperator, FlowTaskSensor
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flow_airflow.cancelling import FlowCancelOperator as FlowCancelOperator
    from flow_airflow.hooks import FlowHook as FlowHook
    from flow_airflow.operators import FlowGPUOperator as FlowGPUOperator
    from flow_airflow.results import load as load
    from flow_airflow.sensors import FlowTaskSensor as FlowTaskSensor
    from flow_airflow.sessions import FlowCloseSessionOperator as FlowCloseSessionOperator
    from flow_airflow.sessions import FlowStartSessionOperator as FlowStartSessionOperator
    from flow_airflow.triggers import FlowTaskTrigger as FlowTaskTrigger
    from flow_airflow.volumes import FlowCreateVolumeOperator as FlowCreateVolumeOperator
    from flow_airflow.volumes import FlowDeleteVolumeOperator as FlowDeleteVolumeOperator

__all__ = [
    "FlowCancelOperator",
    "FlowCloseSessionOperator",
    "FlowCreateVolumeOperator",
    "FlowDeleteVolumeOperator",
    "FlowGPUOperator",
    "FlowHook",
    "FlowStartSessionOperator",
    "FlowTaskSensor",
    "FlowTaskTrigger",
    "load",
]

_HOMES = {
    "FlowCancelOperator": "cancelling",
    "FlowCloseSessionOperator": "sessions",
    "FlowCreateVolumeOperator": "volumes",
    "FlowDeleteVolumeOperator": "volumes",
    "FlowGPUOperator": "operators",
    "FlowHook": "hooks",
    "FlowStartSessionOperator": "sessions",
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
