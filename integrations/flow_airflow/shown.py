"""How much of a task's output is in the log that people see. The log itself says so; no second record can differ.

Each line that a trigger writes names, in the field `chan`, the task, the machine and the byte after it. Airflow's pages
show that field only where the source of a line is asked for. A triggerer that takes over reads it back.

An earlier triggerer's file is part of what people see only where all logs lie in one folder (one machine, or a shared
volume): Airflow serves the file of the present triggerer alone. Whether that is so shows by the worker's own log beside
it. Where it is not, the output since the deferral is not in any log that is shown, so it is shown again.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from airflow.configuration import conf
from airflow.utils.helpers import log_filename_template_renderer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BLOCK_BYTES = 65536


def origin(task_id: str, node: int, offset: int) -> str:
    """Return what a line says of where it comes from."""
    return f"{task_id}[{node}]:{offset}"


def worker_log(ti: Any) -> str | None:
    """Return where the worker's log of this try is, on a machine that has it; None where that cannot be told."""
    folder = os.path.expanduser(conf.get("logging", "base_log_folder"))
    try:
        return os.path.join(folder, log_filename_template_renderer()(ti=ti))
    except Exception:  # noqa: BLE001  # a site's own template may ask for what a trigger does not know
        return None


def offsets_shown(log: str | None, task_id: str, since: Sequence[int]) -> list[int]:
    """Return up to which byte each machine's output is in the log that people see, at least `since`.

    `log` is the worker's; a triggerer's file has the same name, with ".trigger." and more after it.
    """
    offsets = list(since)
    if log is None or not os.path.exists(log):
        return offsets
    folder, name = os.path.split(log)
    for other in os.listdir(folder):
        if other.startswith(f"{name}.trigger."):
            for node, offset in _last_offsets(os.path.join(folder, other), task_id, len(offsets)).items():
                offsets[node] = max(offsets[node], offset)
    return offsets


def _last_offsets(path: str, task_id: str, nodes: int) -> dict[int, int]:
    mark, found = f"{task_id}[", dict[int, int]()
    for line in _lines_from_the_end(path):
        if mark.encode() not in line:
            continue
        try:
            said = json.loads(line).get("chan")
            node, offset = map(int, said.removeprefix(mark).split("]:"))
        except (ValueError, AttributeError):  # half a line; or the output speaks of its own task
            continue
        if node < nodes:
            found.setdefault(node, offset)
        if len(found) == nodes:
            break
    return found


def _lines_from_the_end(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        left, rest = file.seek(0, os.SEEK_END), b""
        while left:
            size = min(left, _BLOCK_BYTES)
            left -= size
            file.seek(left)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            yield from reversed(lines)
        yield rest
