"""Which failures Airflow may retry. Pure."""

from __future__ import annotations

from flow_airflow.compat import AirflowFailException
from flow_core.errors import (
    AuthenticationError,
    ConfigError,
    ObjectError,
    ObjectNotFoundError,
    ResultError,
    SerializationError,
    SessionClosedError,
    ValidationAPIError,
    ValidationError,
)

#: Asking again unchanged cannot help, so a retry would only delay the message.
_HOPELESS = (
    *(AuthenticationError, ConfigError, ObjectError, ObjectNotFoundError),
    *(ResultError, SerializationError, SessionClosedError, ValidationAPIError, ValidationError),
)


def to_airflow(error: Exception) -> AirflowFailException | None:
    """Return what to raise in Airflow when no retry can help; None when Airflow is to decide.

    The user's own exceptions and everything about machines stay what they are, so that Airflow's retries and
    a `retry_policy` that names exception classes apply to them.
    """
    if isinstance(error, _HOPELESS) and not error.retryable:
        return AirflowFailException(str(error))
    return None
