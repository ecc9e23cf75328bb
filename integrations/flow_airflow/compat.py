"""Names that moved between Airflow 3.1 and 3.3, and what only the later one has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.triggers.base import BaseTrigger

if TYPE_CHECKING:
    from airflow.sdk.exceptions import (
        AirflowException,
        AirflowFailException,
        AirflowTaskTimeout,
        TaskDeferralError,
        TaskDeferralTimeout,
        TaskDeferred,
    )
    from airflow.sdk.serde import deserialize, serialize
else:
    try:  # Airflow 3.2 and later
        from airflow.sdk.exceptions import (
            AirflowException,
            AirflowFailException,
            AirflowTaskTimeout,
            TaskDeferralError,
            TaskDeferralTimeout,
            TaskDeferred,
        )
        from airflow.sdk.serde import deserialize, serialize
    except ImportError:
        from airflow.exceptions import (
            AirflowException,
            AirflowFailException,
            AirflowTaskTimeout,
            TaskDeferralError,
            TaskDeferralTimeout,
            TaskDeferred,
        )
        from airflow.serialization.serde import deserialize, serialize

#: Whether the triggerer itself calls `BaseTrigger.on_kill` when a user ends a deferred task (Airflow 3.3).
TRIGGERER_CALLS_ON_KILL = hasattr(BaseTrigger, "on_kill")

#: Whether a trigger that starts without a worker gets its templates rendered.
TRIGGERER_RENDERS_TEMPLATES = hasattr(BaseTrigger, "render_template_fields")


def supervisor_answers_threads() -> bool:
    """Whether a task may ask its supervisor from several threads at once."""
    from airflow.sdk.execution_time.comms import CommsDecoder  # DAG files do without

    return "_thread_lock" in CommsDecoder.__annotations__


__all__ = [
    "TRIGGERER_CALLS_ON_KILL",
    "TRIGGERER_RENDERS_TEMPLATES",
    "AirflowException",
    "AirflowFailException",
    "AirflowTaskTimeout",
    "TaskDeferralError",
    "TaskDeferralTimeout",
    "TaskDeferred",
    "deserialize",
    "serialize",
    "supervisor_answers_threads",
]
