"""Prefect: sweep, pick the best, refit. The functions are in `../digits.py`, which knows nothing of Prefect.

    python example_dags/prefect/digits_flow.py

Prefect's engine runs here and keeps the states, the retries and the results; every body runs on a GPU machine, which
needs a Python of the same version with scikit-learn and matplotlib (local provider: FLOW_LOCAL_PYTHON=/path/to/python).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from prefect import flow, task

from flow_prefect import FlowTaskRunner, flow_options

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import digits

sweep_settings = task(digits.sweep_settings)
evaluate = task(digits.evaluate, retries=1, timeout_seconds=600)
pick_best = task(digits.pick_best)
refit = task(digits.refit, retries=1, timeout_seconds=600)

Values = dict[str, Any]


@flow(name="digits", task_runner=FlowTaskRunner(gpu="a100"))
def digits_flow(picture: str = str(Path(tempfile.gettempdir()) / "digits-prefect.png")) -> Values:
    """Try nine settings as far as there are GPUs at once; return the results and the report of the best."""
    with flow_options(gpu="cpu"):
        settings = sweep_settings.submit()
    results = evaluate.map(settings)  # type: ignore[arg-type]  # a future of a list maps over the list
    with flow_options(gpu="cpu"):
        best = pick_best.submit(results)  # type: ignore[arg-type]  # and a list of futures is their values
    report = refit.submit(best, picture)  # type: ignore[arg-type]
    return {"results": results.result(), "report": report.result()}


if __name__ == "__main__":
    print(digits_flow()["report"])
