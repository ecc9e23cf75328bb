"""Jobs that other processes load: the multiprocess executor, `dagster job execute`, `dagster dev`.

Each op reads where it works from JOB_FOLDER, so that the same file serves every test.
"""

import os
import time
from pathlib import Path

import dagster as dg

from flow_dagster import FlowResource
from flow_dagster.step import Step

#: What the UI, and Dagster's automatic retries of runs, put on a re-execution from failure.
FROM_FAILURE = {"dagster/is_resume_retry": "true"}
WORK = Path(__file__).parent / "remote" / "work.py"


def folder() -> Path:
    return Path(os.environ["JOB_FOLDER"])


def gate() -> str:
    return str(folder() / "gate")


@dg.op(retry_policy=dg.RetryPolicy(max_retries=1))
def counted(context: dg.OpExecutionContext, flow: FlowResource) -> int:
    (folder() / "step.pid").write_text(str(os.getpid()))
    made = flow.invoke(context, WORK, "count_until", [str(folder()), gate()])
    assert isinstance(made, int)
    return made


@dg.op
def left_alone(context: dg.OpExecutionContext, flow: FlowResource) -> None:
    """Starts a task and does something else instead of waiting for it."""
    flow.invoke_async(context, WORK, "count_until", [str(folder()), gate()])
    (folder() / "submitted").touch()
    time.sleep(120)


@dg.op(out=dg.DynamicOut(int))
def numbers() -> list[dg.DynamicOutput[int]]:
    return [dg.DynamicOutput(number, mapping_key=f"n{number}") for number in (1, 2)]


@dg.op
def added(context: dg.OpExecutionContext, flow: FlowResource, number: int) -> int:
    total = flow.invoke(context, WORK, "add", [number], {"b": 10})
    assert isinstance(total, int)
    return total


@dg.op
def summed(totals: list[int]) -> int:
    return sum(totals)


@dg.op(retry_policy=dg.RetryPolicy(max_retries=1))
def named(context: dg.OpExecutionContext) -> None:
    """Notes the keys of three calls; fails until the gate is open."""
    step = Step(context)
    again = Step(context)  # the calls of a step are counted across all that see it
    with (folder() / "keys").open("a") as file:
        file.write(" ".join((step.key("f"), again.key("f"), step.key("g"), step.key("f", "mine"))) + "\n")
    if not Path(gate()).exists():
        raise RuntimeError("not yet")


@dg.job(executor_def=dg.in_process_executor)
def named_job() -> None:
    named()


@dg.job
def counted_job() -> None:
    counted()


@dg.job(executor_def=dg.in_process_executor)
def in_process_job() -> None:
    counted()


@dg.job(executor_def=dg.in_process_executor)
def once_job() -> None:
    counted.with_retry_policy(dg.RetryPolicy(max_retries=0))()


@dg.job
def left_alone_job() -> None:
    left_alone()


@dg.job
def fan_out_job() -> None:
    summed(numbers().map(added).collect())


@dg.asset
def accuracy(context: dg.AssetExecutionContext, flow: FlowResource) -> int:
    total = flow.invoke(context, WORK, "add", [1], {"b": 2})
    assert isinstance(total, int)
    return total


defs = dg.Definitions(
    assets=[accuracy],
    jobs=[named_job, counted_job, in_process_job, once_job, left_alone_job, fan_out_job],
    resources={"flow": FlowResource(provider="local", gpu="a100")},
)


def load_named_job() -> dg.JobDefinition:
    return defs.resolve_job_def("named_job")


def load_counted_job() -> dg.JobDefinition:
    return defs.resolve_job_def("counted_job")


def load_fan_out_job() -> dg.JobDefinition:
    return defs.resolve_job_def("fan_out_job")
