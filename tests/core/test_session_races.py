"""What the soak has found, each reduced to the one moment that matters."""

from __future__ import annotations

import threading
from typing import Any

from flow_core.futures import Stream


class Asking:
    """Runs a generator; each time a value is taken, the next one arrives in another thread."""

    task_id = "none"

    def __init__(self) -> None:
        self.stuck = False

    def credit(self, stream: Stream) -> None:
        arriving = threading.Thread(target=stream.arrive, args=("the second",), daemon=True)
        arriving.start()
        arriving.join(5)
        self.stuck = arriving.is_alive()

    def decode(self, stream: Stream, parcel: Any) -> Any:
        return parcel


def test_a_generators_value_can_arrive_while_another_is_being_taken() -> None:
    asking = Asking()
    stream = Stream(asking)
    stream.arrive("the first")  # type: ignore[arg-type]  # as `decode` above reads it
    assert next(iter(stream)) == "the first"
    assert not asking.stuck
