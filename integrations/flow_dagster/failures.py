"""Our errors as Dagster's: what a failed step says, and whether its retry policy may try again. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from flow_core.errors import (
    AuthenticationError,
    ConfigError,
    FlowError,
    RemoteExecutionError,
    ResourceNotFoundError,
    ResultError,
    SerializationError,
    TaskCancelledError,
    ValidationAPIError,
    ValidationError,
)

#: Asking again unchanged gives the same answer. A task that somebody cancelled is not for a policy to start again.
_FOR_GOOD = (
    AuthenticationError,
    ConfigError,
    ResourceNotFoundError,
    ResultError,
    SerializationError,
    TaskCancelledError,
    ValidationAPIError,
    ValidationError,
)

#: The function could not even be called: the same code with the same arguments will not be called next time.
_NEVER_CALLED = frozenset({"ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError"})


def can_succeed(error: FlowError) -> bool:
    """Whether running the step once more, unchanged, could end in another way."""
    if isinstance(error, RemoteExecutionError):
        return error.exception_type not in _NEVER_CALLED
    return not isinstance(error, _FOR_GOOD)


def as_failure(error: FlowError, metadata: Mapping[str, Any]) -> dg.Failure:
    """Build what the step raises: the whole error text, remote traceback included, and what is known of the task."""
    said = {"flow/error": f"{type(error).__name__}: {error.message}", "flow/error_code": error.error_code}
    return dg.Failure(description=str(error), metadata={**metadata, **said}, allow_retries=can_succeed(error))


def as_map_failure(errors: Mapping[int, FlowError], count: int, metadata: Mapping[str, Any]) -> dg.Failure:
    """Build what a `map` raises when items failed: every item's first line, and the first error in full."""
    shown = [
        f"  [{item}] {type(error).__name__}: {error.message.splitlines()[0]}"
        for item, error in sorted(errors.items())
    ]
    if len(shown) > 20:
        shown = [*shown[:20], f"  … and {len(shown) - 20} more"]
    first = min(errors)
    text = "\n".join(
        [
            f"{len(errors)} of {count} items failed:",
            *shown,
            "",
            f"The first, item {first}, in full:",
            str(errors[first]),
        ]
    )
    again = any(can_succeed(error) for error in errors.values())
    return dg.Failure(description=text, metadata=metadata, allow_retries=again)
