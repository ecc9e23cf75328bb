"""Large values that stay where their session runs: made by one call, read there by the next, brought here on request.

Workers that share memory with this process hand a value on without it passing through here. Elsewhere a worker that
knows of another call that waits for its value writes a large one to the task's folder and answers with where it is;
that goes to the other call in the value's place.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flow_core import payload
from flow_core.errors import FlowError
from flow_core.futures import Future
from flow_core.object_ref import Codec, ObjectRef, task_uri
from flow_core.runner.parcels import STAYS, Parcel

if TYPE_CHECKING:
    from flow_core.engine import Engine


class Stayed(Parcel):
    """Where a value is, in place of the value. When nobody here needs it any more, `unneeded` gets its name."""

    def __init__(self, body: bytes, task_id: str, unneeded: deque[str]) -> None:
        super().__init__(STAYS, body)
        self.task_id = task_id
        about = json.loads(body)
        self.file: str = about["file"]
        self.size_bytes: int = about["size"]
        self.sha256: str = about["sha256"]
        self.serialization: Codec = about["codec"]
        weakref.finalize(self, unneeded.append, about["uri"]).atexit = False

    def fetch(self, engine: Engine, codec: str) -> Any:
        """Return the value; a pickle only where `codec` says that one is expected.

        Raises ProviderUnavailable, ResourceNotFoundError, ResultError.
        """
        data = engine.collect(self.task_id, self.file)
        return payload.decode_result(data, allow_pickle=codec == "pickle", task_id=self.task_id)

    def ref(self, provider: str) -> ObjectRef:
        """Return the reference to the value."""
        uri = task_uri(provider, self.task_id, self.file)
        return ObjectRef(uri=uri, size_bytes=self.size_bytes, sha256=self.sha256, codec=self.serialization)


def is_elsewhere(producer: Future, task_id: str) -> bool:
    """Whether a call's value lies with another session than that of `task_id`, whose workers cannot read it."""
    parcel = producer.parcel
    return isinstance(parcel, Stayed) and parcel.task_id != task_id


def bring(producer: Future, then: Callable[[FlowError | None], object]) -> None:
    """Have the value of a call brought here, in a thread, and call `then` with what stood in the way."""

    def run() -> None:
        try:
            producer.result()
        except FlowError as error:
            then(error)
        else:
            then(None)

    threading.Thread(target=run, name="flow-bring", daemon=True).start()
