"""The systems that are compared, each behind the same few verbs. A verb that a system lacks raises NotImplementedError.

A system is imported when it is made, so that each is measured in a process that has not loaded the others' libraries
where that matters (Ray and Dask start threads and servers of their own).
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, ClassVar

from tests.benchmarks import work

Function = Callable[..., Any]


class System:
    """Runs calls in worker processes. Made ready by `__init__`, gone after `close`."""

    name: ClassVar[str]
    share: ClassVar[float] = (
        1.0  # of the number of calls in a row: the slow ones get fewer, and the table says so
    )

    def __init__(self, workers: int) -> None:
        raise NotImplementedError

    def call(self, function: Function, *args: Any) -> Any:
        """Call and wait."""
        return self.gather([self.submit(function, *args)])[0]

    def submit(self, function: Function, *args: Any) -> Any:
        """Start a call; return what `gather` takes."""
        raise NotImplementedError

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for calls; return their values in order."""
        return [handle.result() for handle in handles]

    def map(self, function: Function, items: Iterable[Any]) -> list[Any]:
        """Call with each item."""
        raise NotImplementedError

    def refer(self, handle: Any) -> Any:
        """What a later call takes in place of the value of `handle`, which is finished and stays where it is."""
        raise NotImplementedError

    def actor(self) -> Callable[[int], Any]:
        """Start a `work.Counter` in a worker; return its `add`, which gives what `gather` takes."""
        raise NotImplementedError

    def close(self) -> None:
        """End all processes."""
        raise NotImplementedError


class Manager(System):
    """Proxies of objects in one server process."""

    name = "multiprocessing.Manager"

    def __init__(self, workers: int) -> None:
        class OneManager(BaseManager):
            pass

        OneManager.register("Echo", work.Echo)
        self.manager = OneManager()
        self.manager.start()
        self.proxy = self.manager.Echo()  # type: ignore[attr-defined]  # registered above

    def call(self, function: Function, *args: Any) -> Any:
        if function is not work.echo:
            raise NotImplementedError
        return self.proxy.echo(*args)

    def close(self) -> None:
        self.manager.shutdown()


class Pool(System):
    """multiprocessing.Pool, with the platform's start method."""

    name = "multiprocessing.Pool"

    def __init__(self, workers: int) -> None:
        self.pool = multiprocessing.Pool(workers)

    def call(self, function: Function, *args: Any) -> Any:
        return self.pool.apply(function, args)

    def submit(self, function: Function, *args: Any) -> Any:
        return self.pool.apply_async(function, args)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        return [handle.get() for handle in handles]

    def map(self, function: Function, items: Iterable[Any]) -> list[Any]:
        return self.pool.map(function, items)

    def close(self) -> None:
        self.pool.terminate()
        self.pool.join()


class Executor(System):
    """Anything with the interface of concurrent.futures."""

    executor: Any

    def submit(self, function: Function, *args: Any) -> Any:
        return self.executor.submit(function, *args)

    def close(self) -> None:
        self.executor.shutdown()


class ProcessPool(Executor):
    name = "ProcessPoolExecutor"

    def __init__(self, workers: int) -> None:
        self.executor = concurrent.futures.ProcessPoolExecutor(workers)


class Loky(Executor):
    name = "loky"

    def __init__(self, workers: int) -> None:
        import loky

        self.executor = loky.ProcessPoolExecutor(workers)


class Executorlib(Executor):
    name = "executorlib"
    share = 0.1

    def __init__(self, workers: int) -> None:
        import executorlib

        self.executor = executorlib.SingleNodeExecutor(max_workers=workers, block_allocation=True)


class Ray(System):
    """Needs a network namespace that has only `lo`: elsewhere it listens on the machine's outward address."""

    name = "Ray"
    share = 0.2

    def __init__(self, workers: int) -> None:
        token = Path(tempfile.gettempdir(), "ray-token")  # Ray reads it once per process
        if not token.exists():
            token.write_text(secrets.token_hex(32))
        # Without RAY_AUTH_MODE it depends on a file in the user's home whether tokens are asked for.
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as later versions do; the old way only warns
        }
        import ray

        self.ray = ray
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            object_store_memory=10**9,
            _temp_dir=tempfile.gettempdir(),
            log_to_driver=False,
            logging_level="ERROR",
        )
        self.functions: dict[Function, Any] = {}

    def submit(self, function: Function, *args: Any) -> Any:
        if function not in self.functions:
            self.functions[function] = self.ray.remote(function)
        return self.functions[function].remote(*args)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        values: list[Any] = self.ray.get(list(handles))
        return values

    def refer(self, handle: Any) -> Any:
        self.ray.wait([handle], fetch_local=False)
        return handle

    def actor(self) -> Callable[[int], Any]:
        add: Callable[[int], Any] = self.ray.remote(work.Counter).remote().add.remote
        return add

    def close(self) -> None:
        self.ray.shutdown()


class Dask(System):
    """A distributed.LocalCluster of processes with one thread each."""

    name = "Dask"
    share = 0.05

    def __init__(self, workers: int) -> None:
        import dask
        import distributed

        dask.config.set(
            {"distributed.worker.daemon": True, "distributed.admin.large-graph-warning-threshold": "1GB"}
        )
        self.cluster = distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        )
        self.client = distributed.Client(self.cluster)

    def submit(self, function: Function, *args: Any) -> Any:
        return self.client.submit(function, *args, pure=False)

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        if handles and not hasattr(handles[0], "key"):  # an actor's
            return [handle.result() for handle in handles]
        values: list[Any] = self.client.gather(list(handles))
        return values

    def refer(self, handle: Any) -> Any:
        import distributed

        distributed.wait(handle)
        return handle

    def actor(self) -> Callable[[int], Any]:
        made = self.client.submit(work.Counter, actor=True).result()
        add: Callable[[int], Any] = made.add
        return add

    def close(self) -> None:
        self.client.close()
        self.cluster.close()


LIGHT: tuple[type[System], ...] = (Manager, Pool, ProcessPool, Loky)
