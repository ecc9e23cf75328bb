"""Flows that tests execute in a process of their own, and kill.  Usage: python -m tests.prefect.flows NAME PARAMETERS

With "run" among the parameters an existing flow run is executed (again), as Prefect's workers do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import Flow, flow, task
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from flow_prefect import FlowTaskRunner


@task
def work(mark: str, seconds: float, number: int = 0) -> int:
    """Leave a mark, take some time, leave another."""
    with Path(mark).open("a") as file:
        file.write(f"{number} {os.getpid()}\n")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not Path(mark + ".go").exists():
        time.sleep(0.02)
    with Path(mark + ".done").open("a") as file:
        file.write(f"{number}\n")
    return number * 10


@flow(task_runner=FlowTaskRunner())
def three(mark: str, seconds: float) -> list[int]:
    return work.map([mark] * 3, [seconds] * 3, [1, 2, 3]).result()


@flow(task_runner=FlowTaskRunner())
async def three_async(mark: str, seconds: float) -> list[int]:
    return work.map([mark] * 3, [seconds] * 3, [1, 2, 3]).result()


@flow(task_runner=FlowTaskRunner())
def quick_then_slow(mark: str, seconds: float, number: int = 2) -> list[int]:
    """One body ends, then one takes long: a process that is killed meanwhile has seen the end of the first."""
    first = work.submit(mark, 0, 1).result()
    return [first, work.submit(mark, seconds, number).result()]


@flow(task_runner=FlowTaskRunner())
def leaves_early(mark: str, seconds: float) -> None:
    """End while a body is still running."""
    work.submit(mark, seconds)
    while not Path(mark).exists():
        time.sleep(0.02)


@flow(task_runner=FlowTaskRunner())
def fails_early(mark: str, seconds: float) -> None:
    """Raise while two bodies are running."""
    work.map([mark] * 2, [seconds] * 2, [1, 2])
    while not (Path(mark).exists() and len(Path(mark).read_text().splitlines()) == 2):
        time.sleep(0.02)
    raise ValueError("the flow itself failed")


FLOWS: dict[str, Flow[Any, Any]] = {
    one.fn.__name__: one for one in (three, three_async, quick_then_slow, leaves_early, fails_early)
}


def main(name: str, parameters: dict[str, Any]) -> None:
    chosen = FLOWS[name]
    with get_client(sync_client=True) as client:
        again = parameters.pop("run", None)
        flow_run = (
            client.read_flow_run(again) if again else client.create_flow_run(chosen, parameters=parameters)
        )
    print(f"flow run {flow_run.id}", flush=True)
    execute: Callable[..., Any] = run_flow
    result = execute(chosen, flow_run=flow_run, parameters=parameters)
    if chosen.isasync:
        import asyncio

        result = asyncio.run(result)
    print(f"result {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
