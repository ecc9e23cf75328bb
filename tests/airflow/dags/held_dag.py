"""Work that ends when the test says so, in every way to wait for it: what the matrix of the lifecycle does things to.

`conf["trail"]` is where the work notes its starts. Beside that file, `.go` lets the work end and `.hold` keeps the
worker between the end of `execute` and the storing of its XCom.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG

from flow_airflow import FlowGPUOperator


def at_the_gate(context: Any, result: Any = None) -> None:
    """Wait while the file `.hold` is there, and note that it is waited for."""
    trail = context["dag_run"].conf["trail"]
    hold = Path(f"{trail}.hold")
    while hold.exists():
        Path(f"{trail}.at-gate").touch()
        time.sleep(0.1)


class TimesOut(FlowGPUOperator):
    """Its deferral times out while its trigger runs, as with a DAG author who passes `timeout=` to `defer`."""

    def defer(self, **options: Any) -> Any:
        return super().defer(**options | {"timeout": timedelta(seconds=30)})


work: dict[str, Any] = {
    "task_id": "work",
    "module": "work.py",
    "function": "held",
    "op_args": ["{{ dag_run.conf['trail'] }}"],
    "gpu": "{{ dag_run.conf.get('gpu') }}",
    "retry_delay": timedelta(seconds=1),
    "post_execute": at_the_gate,
}
deferred: dict[str, Any] = {"deferrable": True, "defer_after_s": 0, "hold_event_s": 30}
limited: dict[str, Any] = {"execution_timeout": timedelta(seconds=30)}
many: dict[str, Any] = {"max_active_runs": 64, "max_active_tasks": 64, "render_template_as_native_obj": True}

with DAG("held_sync", **many):
    FlowGPUOperator(**work, retries=1)

with DAG("held_deferred", **many):
    FlowGPUOperator(**work, **deferred, retries=1)

with DAG("held_sync_patient", **many):
    FlowGPUOperator(**work, retries=5)

with DAG("held_deferred_patient", **many):
    FlowGPUOperator(**work, **deferred, retries=5)

with DAG("held_sync_last_try", **many):
    FlowGPUOperator(**work, retries=0)

with DAG("held_deferred_last_try", **many):
    FlowGPUOperator(**work, **deferred, retries=0)

with DAG("held_sync_limited", **many):
    FlowGPUOperator(**work, **limited, retries=0)

with DAG("held_deferred_limited", **many):
    FlowGPUOperator(**work, **deferred, **limited, retries=0)

with DAG("held_sync_late_retry", **many):
    FlowGPUOperator(**work | {"retry_delay": timedelta(minutes=5)}, retries=1)

with DAG("held_sync_run_limited", **many, dagrun_timeout=timedelta(seconds=60)):
    FlowGPUOperator(**work, retries=1)

with DAG("held_deferred_run_limited", **many, dagrun_timeout=timedelta(seconds=60)):
    FlowGPUOperator(**work, **deferred | {"hold_event_s": 90}, retries=1)

with DAG("held_deferred_times_out", **many):
    TimesOut(**work, **deferred | {"hold_event_s": 90}, retries=0)

late: dict[str, Any] = {"deferrable": True, "defer_after_s": 6, "poll_interval_s": 0.5, "retries": 1}

with DAG("late_held_back", **many):
    FlowGPUOperator(**work, **late, hold_event_s=30)

with DAG("late_at_once", **many):
    FlowGPUOperator(**work, **late, hold_event_s=0)

with DAG("quick_rounds", max_active_runs=6, max_active_tasks=12):
    FlowGPUOperator.partial(
        task_id="quick", retries=0, deferrable=True, defer_after_s=0, poll_interval_s=1
    ).expand(command=[f"sleep 1; echo {number}" for number in range(4)])
