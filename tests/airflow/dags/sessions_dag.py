"""Warm sessions: started by a setup, used by many calls, closed by a teardown that also runs after a failure."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, task

from flow_airflow import FlowCloseSessionOperator, FlowGPUOperator, FlowStartSessionOperator


def warm_model() -> float:
    """Return when the model was loaded: once per worker."""
    import builtins

    if not hasattr(builtins, "_model_loaded_at"):
        builtins._model_loaded_at = time.time()  # type: ignore[attr-defined]
    return float(builtins._model_loaded_at)  # type: ignore[attr-defined]


with DAG("sessions", default_args={"retries": 0}):
    start = FlowStartSessionOperator(task_id="start", gpu="a100", workers=2)
    close = FlowCloseSessionOperator(task_id="close", session=start.output).as_teardown(  # type: ignore[arg-type]
        setups=start
    )
    session: Any = start.output

    @task.flow_gpu(session=session)
    def embed(number: int) -> dict[str, Any]:
        print(f"embedding {number}")
        time.sleep(0.5)
        return {
            "pid": os.getpid(),
            "loaded": warm_model(),
            "gpu": os.environ["CUDA_VISIBLE_DEVICES"],
            "square": number**2,
        }

    @task.flow_gpu(session=session, result_as="reference")
    def large() -> list[int]:
        return list(range(1000))

    @task.flow_gpu
    def length(values: list[int]) -> int:
        return len(values)

    @task.flow_gpu(session=session)
    def breaks(rows: Any) -> None:
        raise ValueError("no such token")

    (
        FlowGPUOperator.partial(
            task_id="loaded", module="work.py", function="loaded", session=session
        ).expand(op_args=[[], [], []])
        >> close
    )
    (
        FlowGPUOperator(
            task_id="total", module="work.py", function="total", op_args=[[1, 2.5]], session=session
        )
        >> close
    )
    embedded = embed.expand(number=[1, 2, 3, 4])
    referred: Any = large()
    length(referred) >> close
    referred >> close
    breaks(embedded) >> close

# A try that Airflow fails although its trigger has fired is adopted by the next one.
with DAG("session_to_wait_for", default_args={"retries": 1, "retry_delay": timedelta(seconds=1)}):
    FlowStartSessionOperator(task_id="start", gpu="a100", idle_limit_s=300, deferrable=True, defer_after_s=0)

with DAG("in_session", default_args={"retries": 0}):

    @task.flow_gpu(session="{{ dag_run.conf['session'] }}")
    def naps(seconds: Any) -> int:
        time.sleep(float(seconds))
        return os.getpid()

    naps("{{ dag_run.conf['seconds'] }}")
