"""One client of the soak: sessions one after another, calls of every kind at once, every outcome checked.

``python soak_client.py LEDGERS SEED SECONDS``. Each call first appends its id to the file `begun`; the outcome that the
client saw goes to `outcomes`, and whatever must not happen to `violations`: lines of JSON, each written at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import gc
import json
import math
import operator
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flow_core import (
    CallCancelledError,
    CallTimeoutError,
    FlowError,
    FlowTimeoutError,
    Future,
    RemoteExecutionError,
    Retries,
    Runner,
    Serialization,
    Session,
    SessionClosedError,
    TaskOutOfMemoryError,
    WorkerDiedError,
    as_completed,
    gather,
    wait,
)

PATIENCE_S = 60.0  # a call that has not ended by then is lost
STUCK_S = 150.0
AHEAD = 16  # so many values of a generator come without being asked for
LEASE_S = 10.0
#: What a call may end with when somebody has killed its worker or its session. Which of the first two it is hangs on
#: whether the kernel killed anything for want of memory meanwhile, somewhere on this machine.
KILLED = (WorkerDiedError, TaskOutOfMemoryError, SessionClosedError)


# --- what runs remotely ---------------------------------------------------------------------------------------


def begin(ledger: str, call: str) -> None:
    """Write down that a call runs: one line, in one write."""
    file = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{call}\n".encode())
    os.close(file)


def square(ledger: str, call: str, value: int, *, seconds: float = 0.0) -> int:
    begin(ledger, call)
    time.sleep(seconds)
    return value * value


def root(ledger: str, call: str, value: int) -> int:
    begin(ledger, call)
    return math.isqrt(value) + 8  # 9, or a ValueError


def nothing(ledger: str, call: str) -> None:
    begin(ledger, call)
    print("printed", call)


def refuse(ledger: str, call: str, value: int) -> None:
    begin(ledger, call)
    raise KeyError(value)


def count_up(ledger: str, call: str, many: int) -> Iterator[int]:
    begin(ledger, call)
    yield from range(many)


async def later(ledger: str, call: str, value: int) -> int:
    begin(ledger, call)
    await asyncio.sleep(0.01)
    return -value


def doubled(ledger: str, call: str, array: Any) -> Any:
    begin(ledger, call)
    return array * 2


def total(ledger: str, call: str, arrays: dict[str, list[Any]]) -> int:
    begin(ledger, call)
    return sum(int(array.sum()) for array in arrays["arrays"])


def end_oneself(ledger: str, call: str, value: int) -> None:
    begin(ledger, call)
    os._exit(value)


class Counter:
    """State, of which some cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value = 0

    def add(self, ledger: str, call: str) -> int:
        begin(ledger, call)
        with self.lock:
            self.value += 1
            return self.value


# --- the client -----------------------------------------------------------------------------------------------


class Client:
    """What all kinds of calls need: a source of chance, ids, and places to write down what was seen."""

    def __init__(self, ledgers: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.begun = str(ledgers / "begun")
        self._files = {
            name: os.open(ledgers / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for name in ("outcomes", "violations", "sessions")
        }
        self._made = 0
        self.name = f"{os.getpid()}-{seed}"
        self.closed = False  # its session, by itself, before all calls had ended

    def call(self, kind: str = "once") -> tuple[str, str]:
        """The ledger, and the id of a new call, which tells those that may run again from all others."""
        self._made += 1
        return self.begun, f"{kind}-{self.name}-{self._made}"

    def write(self, name: str, **line: Any) -> None:
        """Append a line to one of the files."""
        os.write(self._files[name], (json.dumps(line) + "\n").encode())

    def violation(self, what: str, **more: Any) -> None:
        """Something happened that must not."""
        self.write("violations", what=what, client=self.name, **more)

    def settle(
        self,
        call: str,
        value: Callable[[], Any],
        right: Callable[[Any], bool] = lambda _: False,
        *,
        expected: tuple[type[BaseException], ...] = (),
    ) -> str:
        """Wait for a call and judge how it ended; return "right", "expected" or "killed"."""
        try:
            got = value()
        except FlowTimeoutError as error:
            outcome = "lost"
            self.violation("lost", call=call, error=str(error))
        except expected:
            outcome = "expected"
        except CallCancelledError as error:
            outcome = "closed"
            if not self.closed:
                self.violation("cancelled by nobody", call=call, error=str(error))
        except KILLED:
            outcome = "killed"
        except BaseException as error:
            outcome = "wrong error"
            self.violation("wrong error", call=call, error=repr(error), text=traceback.format_exc()[-4000:])
        else:
            outcome = "right" if right(got) else "wrong value"
            if outcome != "right":
                self.violation("wrong value", call=call, value=repr(got)[:500])
        self.write("outcomes", call=call, outcome=outcome)
        return outcome


class Calls:
    """Every kind of call, on one session. Each kind starts calls and returns what checks them later."""

    def __init__(self, client: Client, session: Session) -> None:
        self.client, self.session = client, session
        pickle = Serialization.PICKLE
        self.square = session.function(square)
        self.root = session.function(root)
        self.retried = session.function(retries=Retries(lost=3, delay_s=0.05))(square)
        self.hurried = session.function(timeout=0.3)(square)
        self.nothing = session.function(nothing)
        self.refuse = session.function(refuse)
        self.count_up = session.function(count_up)
        self.later = session.function(later)
        self.doubled = session.function(serialization=pickle)(doubled)
        self.total = session.function(serialization=pickle)(total)
        self.end_oneself = session.function(end_oneself)
        self.kinds: list[Callable[[], Callable[[], None]]] = [
            self.plain,
            self.slow,
            self.prints,
            self.raises,
            self.streams,
            self.asynchronous,
            self.array,
            self.chain,
            self.cancelled,
            self.out_of_time,
            self.again,
            self.called_back,
            self.mapped,
            self.in_chunks,
            self.gathered,
            self.by_id,
            self.joined,
            self.awaited,
            self.from_threads,
            self.dies,
        ]

    def some(self) -> Callable[[], None]:
        """Start calls of a kind chosen by chance."""
        return self.client.random.choice(self.kinds)()

    # -- kinds

    def plain(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        value = self.client.random.randrange(10**6)
        future = self.square.remote(ledger, call, value)
        return self.check(call, future, lambda got: got == value * value)

    def slow(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        future = self.square.remote(ledger, call, 7, seconds=self.client.random.uniform(0.05, 0.4))
        return self.check(call, future, lambda got: got == 49)

    def prints(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        future = self.nothing.remote(ledger, call)

        def check() -> None:
            self.check(call, future, lambda got: got is None)()
            with contextlib.suppress(FlowError):
                if future.status == "done" and f"printed {call}\n" not in future.logs():
                    self.client.violation("print lost", call=call, log=future.logs())

        return check

    def raises(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        future = self.refuse.remote(ledger, call, 5)

        def value() -> bool:
            try:
                future.result(PATIENCE_S)
            except KeyError as error:
                return isinstance(error, RemoteExecutionError)
            return False

        return lambda: void(self.client.settle(call, value, bool))

    def streams(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        many = self.client.random.choice([0, 1, 10, 300])
        taken = self.client.random.choice([many, many // 2])
        future = self.count_up.remote(ledger, call, many)

        def value() -> list[int]:
            if taken == many:
                return list(future)
            got = [item for item, _ in zip(future, range(taken), strict=False)]
            future.cancel()
            return got

        def check() -> None:
            self.client.settle(call, value, lambda got: got == list(range(taken)))

        if many > AHEAD:  # it is held back until somebody takes the values, and so holds its worker
            check()
            return lambda: None
        return check

    def asynchronous(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        return self.check(call, self.later.remote(ledger, call, 3), lambda got: got == -3)

    def array(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        array = np.arange(self.client.random.choice([10, 30_000, 500_000]))
        future = self.doubled.remote(ledger, call, array)
        wanted = array * 2
        array[:] = -1  # the arguments were taken when the call was made
        return self.check(call, future, lambda got: bool((got == wanted).all()))

    def chain(self) -> Callable[[], None]:
        ledger, first = self.client.call()
        _, second = self.client.call()
        size = self.client.random.choice([100, 400_000])
        made = self.doubled.remote(ledger, first, np.ones(size))
        future = self.total.remote(ledger, second, {"arrays": [made, np.ones(5), made]})

        def check() -> None:
            self.check(second, future, lambda got: got == 4 * size + 5)()
            self.check(first, made, lambda got: len(got) == size and bool((got == 2).all()))()

        return check

    def cancelled(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        future = self.square.remote(ledger, call, 3, seconds=20.0)
        if self.client.random.random() < 0.5:
            time.sleep(self.client.random.uniform(0, 0.3))
        future.cancel()
        return self.check(call, future, expected=(CallCancelledError,))

    def out_of_time(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        future = self.hurried.remote(ledger, call, 3, seconds=20.0)
        return self.check(call, future, lambda _: False, expected=(CallTimeoutError,))

    def again(self) -> Callable[[], None]:
        ledger, call = self.client.call("again")
        future = self.retried.remote(ledger, call, 6, seconds=0.2)
        return self.check(call, future, lambda got: got == 36)

    def called_back(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        future = self.square.remote(ledger, call, 2)
        told: list[object] = []
        future.add_done_callback(told.append)

        def check() -> None:
            self.check(call, future, lambda got: got == 4)()
            until(lambda: bool(told))
            if told != [future]:
                self.client.violation("callbacks", call=call, told=len(told))

        return check

    def mapped(self) -> Callable[[], None]:
        """All of a map's calls are one for us: what fails fails it."""
        ledger, call = self.client.call()
        ids = [f"{call}.{item}" for item in range(self.client.random.choice([3, 200]))]
        futures = self.square.map([(ledger, one, 11) for one in ids])
        how = self.client.random.choice(["order", "completion", "wait"])

        def check() -> None:
            if how == "completion":
                with contextlib.suppress(FlowTimeoutError):  # what has not ended is found out below
                    list(as_completed(futures, timeout=PATIENCE_S))
            elif how == "wait":
                done, pending = wait(futures, timeout=PATIENCE_S)
                if pending or done != futures:
                    self.client.violation("wait", call=call, done=len(done), pending=len(pending))
            for one, future in zip(ids, futures, strict=True):
                self.check(one, future, lambda got: got == 121)()

        return check

    def in_chunks(self) -> Callable[[], None]:
        """Items that travel several at a time: one's fault is no other's."""
        ids = [self.client.call() for _ in range(self.client.random.choice([1, 60, 2000]))]
        items = ((ledger, call, -1 if self.client.random.random() < 0.1 else 3) for ledger, call in ids)
        got = self.root.imap(
            items, return_exceptions=True, max_concurrent=self.client.random.choice([None, 7])
        )

        def value(outcome: Any) -> Any:
            if isinstance(outcome, ValueError):
                return 9  # the root of -1
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        try:
            for (_, call), outcome in zip(ids, got, strict=True):
                self.client.settle(call, functools.partial(value, outcome), functools.partial(operator.eq, 9))
        except SessionClosedError:  # there was no session to start the next chunk in
            pass
        return lambda: None

    def gathered(self) -> Callable[[], None]:
        ids = [self.client.call() for _ in range(10)]
        futures = [self.square.remote(ledger, call, 5) for ledger, call in ids]

        def check() -> None:
            with contextlib.suppress(*KILLED, CallCancelledError):
                if gather(*futures, timeout=PATIENCE_S) != [25] * 10:
                    self.client.violation("gather", call=ids[0][1])
            for (_, call), future in zip(ids, futures, strict=True):
                self.check(call, future, lambda got: got == 25)()

        return check

    def by_id(self) -> Callable[[], None]:
        """Through the eyes of another process, which knows nothing but the call's id."""
        ledger, call = self.client.call()
        future = self.square.remote(ledger, call, 8)
        name = future.id
        return lambda: void(
            self.client.settle(call, lambda: Future.from_id(name).result(PATIENCE_S), lambda got: got == 64)
        )

    def joined(self) -> Callable[[], None]:
        """A second client of the same session, which comes and goes."""
        ids = [self.client.call() for _ in range(20)]
        with Session.from_id(self.session.task_id, workers=2) as joined:
            again = joined.function(square)
            futures = [again.remote(ledger, call, 5) for ledger, call in ids]
            for (_, call), future in zip(ids, futures, strict=True):
                self.check(call, future, lambda got: got == 25)()
        return lambda: None

    def awaited(self) -> Callable[[], None]:
        ids = [self.client.call() for _ in range(5)]
        futures = [self.square.remote(ledger, call, 9) for ledger, call in ids]

        async def all_of_them() -> list[Any]:
            async def one(future: Any) -> Any:
                return await future

            waiting = asyncio.gather(*(one(future) for future in futures), return_exceptions=True)
            return await asyncio.wait_for(waiting, PATIENCE_S)

        def check() -> None:
            with contextlib.suppress(TimeoutError):  # what has not ended is found out below
                asyncio.run(all_of_them())
            for (_, call), future in zip(ids, futures, strict=True):
                self.check(call, future, lambda got: got == 81)()

        return check

    def from_threads(self) -> Callable[[], None]:
        ids = [self.client.call() for _ in range(40)]

        def one(pair: tuple[str, str]) -> None:
            try:
                future = self.square.remote(*pair, 4)
            except SessionClosedError:
                return
            self.check(pair[1], future, lambda got: got == 16)()

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(one, ids))
        return lambda: None

    def dies(self) -> Callable[[], None]:
        ledger, call = self.client.call()
        if self.client.random.random() < 0.7:  # not too often: it takes what runs beside it along
            return lambda: None
        future = self.end_oneself.remote(ledger, call, 3)
        return self.check(call, future, expected=(WorkerDiedError,))

    def check(
        self, call: str, future: Any, right: Callable[[Any], bool] = lambda _: False, **more: Any
    ) -> Callable[[], None]:
        """What waits for a future and judges it."""
        return lambda: void(
            self.client.settle(call, functools.partial(future.result, PATIENCE_S), right, **more)
        )


def void(_: object) -> None:
    """Nothing."""


def until(ready: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Look until something is so."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- sessions -------------------------------------------------------------------------------------------------


def functions(client: Client, deadline: float) -> None:
    """A session and calls of all kinds, some of them outstanding at any time, until it dies or time is up."""
    with Session(workers=2, lease=LEASE_S) as session:
        client.write("sessions", task=session.task_id, client=os.getpid())
        calls = Calls(client, session)
        checks: list[Callable[[], None]] = []
        client.closed = False
        with contextlib.suppress(SessionClosedError):
            while time.monotonic() < deadline:
                alive()
                checks.append(calls.some())
                if len(checks) > 15:
                    checks.pop(client.random.randrange(len(checks)))()
        client.random.shuffle(checks)
        if client.random.random() < 0.3:
            client.closed = True
            session.close()  # what has not ended ends with an error
        for check in checks:
            alive()
            check()


def service(client: Client, deadline: float) -> None:
    """An object that counts: as long as it lives no call is missing, doubled, or out of order."""
    with Runner(f"soak-{client.name}", lease=LEASE_S) as runner:
        counter = runner.service(Counter)
        wanted = 0
        while time.monotonic() < deadline:
            alive()
            ids = [client.call() for _ in range(client.random.choice([1, 10, 100]))]
            try:
                futures = [counter.add(*pair) for pair in ids]
            except KILLED:
                return
            for (_, call), future in zip(ids, futures, strict=True):
                wanted += 1
                settled = client.settle(
                    call, functools.partial(future.result, PATIENCE_S), functools.partial(operator.eq, wanted)
                )
                if settled != "right":
                    wanted = -(10**9)  # from here on only errors are right: its state is gone
            if wanted < 0:
                return


def alive() -> None:
    """Put off the moment at which this process counts as stuck."""
    faulthandler.dump_traceback_later(STUCK_S, exit=True)


#: One of these a process keeps for whoever waits next for a local task (`flow_core.runner.bell`), from whenever it
#: waited first: it does not count, a second one does.
_KEPT = "anon_inode:inotify"


def held() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(descriptors()) - (_KEPT in descriptors()),
        "threads": threading.active_count(),
        "shared memory": sum("memfd:" in line or "/dev/shm/" in line for line in mapped),
    }


def descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


def nothing_grows(client: Client, first: dict[str, int] | None, number: int) -> dict[str, int]:
    """Compare what is held between two sessions with what was held after the first one."""
    if first is None:
        until(lambda: held()["threads"] == 1)
        return held()
    if not until(lambda: all(now <= first[name] for name, now in held().items())):
        client.violation("grown", sessions=number, first=first, now=held(), open=descriptors())
    return first


def main(ledgers: Path, seed: int, seconds: float) -> None:
    client = Client(ledgers, seed)
    end = time.monotonic() + seconds
    first, number = None, 0
    while time.monotonic() < end:
        alive()
        number += 1
        kind = client.random.choice([functions, functions, service])
        try:
            kind(client, min(end, time.monotonic() + client.random.uniform(1, 8)))
        except KILLED as error:  # opening met a kill
            client.write("outcomes", call="", outcome=f"session: {type(error).__name__}")
        first = nothing_grows(client, first, number)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
