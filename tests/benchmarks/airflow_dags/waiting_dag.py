"""One DAG for each way to wait and each number of tasks, and one for the probe."""

from __future__ import annotations

import os

from airflow.sdk import DAG

from tests.benchmarks.airflow_parts import waiting

INTERVAL_S = float(os.environ["FLOW_BENCH_INTERVAL_S"])


class WaitsForFlow(waiting.Waits):
    start_trigger_args = waiting.begin_with(waiting.OnFlow, interval_s=INTERVAL_S)


class WaitsForFile(waiting.Waits):
    start_trigger_args = waiting.begin_with(waiting.OnFile, interval_s=INTERVAL_S)


class WaitsForSSH(waiting.Waits):
    start_trigger_args = waiting.begin_with(waiting.OnSSH, interval_s=INTERVAL_S)


class Probes(waiting.Waits):
    start_trigger_args = waiting.begin_with(waiting.LagProbe)


KINDS = {"flow": WaitsForFlow, "file": WaitsForFile, "ssh": WaitsForSSH}

for wanted in os.environ["FLOW_BENCH_WAITING"].split():
    system, count = wanted.split(":")
    with DAG(f"waiting_{system}_{count}", max_active_tasks=2000) as dag:
        KINDS[system].partial(task_id="wait", system=system, retries=0).expand(number=list(range(int(count))))
    globals()[dag.dag_id] = dag

with DAG("probe"):
    Probes(task_id="probe", system="probe")
