"""What is asked of an instance by `find_instances`: read, and compared. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flow_core import gpus
from flow_core.errors import ValidationError, close_names
from flow_core.models import Instance

_REQUIREMENTS = ("instance_type", "gpu_type", "min_gpu_count", "gpu_memory_gb", "max_price", "region")


def parse_requirements(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the requirements that are set, GPUs by number and name. Raises ValidationError for an unknown one."""
    for name in given:
        if name not in _REQUIREMENTS:
            near = [f"Did you mean {one!r}?" for one in close_names(name, _REQUIREMENTS)]
            raise ValidationError(
                f"{name!r} is not a requirement",
                suggestions=[*near, f"Requirements: {', '.join(_REQUIREMENTS)}."],
            )
    wanted = dict(given)
    if wanted.get("instance_type") is not None:
        request = gpus.parse(wanted["instance_type"])
        wanted["min_gpu_count"] = max(request.count, wanted.get("min_gpu_count") or 0)
        wanted["gpu_type"] = request.gpu or wanted.get("gpu_type")
    return {name: value for name, value in wanted.items() if value is not None}


def meets(one: Instance, wanted: Mapping[str, Any]) -> bool:
    """Whether an instance has what was parsed. What is not known of it (memory, price) does not count against it."""
    # A simulated GPU stands for any.
    model = (
        one.instance_id == "simulated" or one.gpu_type == str(wanted.get("gpu_type", one.gpu_type)).lower()
    )
    return (
        model
        and one.gpu_count >= wanted.get("min_gpu_count", 0)
        and (one.gpu_memory_gb is None or one.gpu_memory_gb >= wanted.get("gpu_memory_gb", 0))
        and (one.price_per_hour is None or one.price_per_hour <= wanted.get("max_price", float("inf")))
        and one.region == wanted.get("region", one.region)
    )
