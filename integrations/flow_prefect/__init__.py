"""Flow in Prefect: a task runner whose tasks' bodies run on GPU machines.

    @task(retries=2, timeout_seconds=3600)
    def train(epochs: int) -> dict[str, float]: ...

    @flow(task_runner=FlowTaskRunner(gpu="a100"))
    def sweep() -> list[dict[str, float]]:
        return train.map([1, 2, 4]).result()

Prefect's engine (states, retries, caching, results, hooks) stays in the flow's process. Only the body travels: the GPU
machine needs a Python of the same version and no Prefect.
"""

from flow_prefect.futures import FlowFuture
from flow_prefect.options import flow_options
from flow_prefect.task_runner import FlowTaskRunner

__all__ = ["FlowFuture", "FlowTaskRunner", "flow_options"]
