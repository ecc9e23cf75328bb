"""Stream: the outcome of a generator that runs elsewhere, value by value."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator
from typing import TYPE_CHECKING, Any

from flow_core.errors import TimeoutError, ValidationError
from flow_core.futures import DONE, Future

if TYPE_CHECKING:
    from flow_core.object_ref import ObjectRef
    from flow_core.runner.parcels import Parcel


class Stream(Future):
    """The outcome of a generator: iterate to get its values as they are produced; `result` is the list of all.

    Values that nobody takes hold the generator back, on its own machine.
    """

    __slots__ = ("_arrived", "_items", "yielded")

    def __init__(self, runs: Any, definition: Any = None, options: Any = None) -> None:
        super().__init__(runs, definition, options)
        # Without a lock of its own: values come under the pool's, which whoever takes one needs as well.
        self._arrived: deque[Parcel] = deque()
        self._items: list[Any] = []
        self.yielded = False

    def arrive(self, parcel: Parcel) -> None:
        """Take in the next value."""
        self.yielded = True
        self._arrived.append(parcel)

    def __iter__(self) -> Iterator[Any]:
        """Yield the values that nobody has taken yet. Who leaves the loop early ends the generator."""
        try:
            while True:
                parcel = self._next()
                if parcel is None:
                    break
                yield self.runs.decode(self, parcel)
        except GeneratorExit:
            self.cancel()
            raise
        if self.error is not None:
            raise self.error

    def _next(self) -> Parcel | None:
        while True:
            try:
                parcel = self._arrived.popleft()
            except IndexError:
                if self.state >= DONE and not self._arrived:
                    return None
                self.runs.drive_item(self)  # type: ignore[attr-defined]  # only those that stream have it
            else:
                self.runs.credit(self)  # type: ignore[attr-defined]
                return parcel

    def has_items(self) -> bool:
        """Whether a value has come that nobody has taken."""
        return bool(self._arrived)

    async def __aiter__(self) -> AsyncIterator[Any]:
        import asyncio

        values = iter(self)
        done = object()
        while (value := await asyncio.to_thread(next, values, done)) is not done:
            yield value

    def object_ref(self, timeout: float | None = None) -> ObjectRef:  # noqa: ARG002 - as every future's
        """Raises ValidationError: the values of a generator are not kept."""
        raise ValidationError(
            f"{self.name!r} is a generator: its values are not kept, so there is no reference to them",
            suggestions=[
                "Store them: put(future.result()).",
                "Return a list in place of yielding its items.",
            ],
        )

    def result(self, timeout: float | None = None) -> Any:
        """Return the list of all values. Raises what the generator raised, and TimeoutError."""
        self._collect(timeout)
        if self.error is not None:
            raise self.error
        return self._items

    def __await__(self) -> Generator[Any, None, Any]:
        import asyncio

        return (yield from asyncio.to_thread(self.result).__await__())

    def _wait(self, timeout: float | None) -> None:
        self._collect(timeout)  # it would not end while nobody takes its values

    def _collect(self, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.state < DONE or self._arrived:
            if self._arrived:
                parcel = self._next()
                if parcel is not None:  # nobody else took it meanwhile
                    self._items.append(self.runs.decode(self, parcel))
            elif deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"waited {timeout:g} s and the generator {self.name!r} has not ended")
            else:
                self.runs.drive_item(self)  # type: ignore[attr-defined]
