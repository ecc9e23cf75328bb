from typing import Any

from pack.helper import FACTOR  # type: ignore[import-not-found]  # where this runs, it is there


def scale(value: float) -> Any:
    return FACTOR * value
