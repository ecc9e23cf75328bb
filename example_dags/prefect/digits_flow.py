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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from example_dags import digits  # wherever this file is started from

sweep_settings = task(digits.sweep_settings)
evaluate = task(retries=1, timeout_seconds=600)(digits.evaluate)
pick_best = task(digits.pick_best)
refit = task(retries=1, timeout_seconds=600)(digits.refit)

Values = dict[str, Any]


@flow(name="digits", task_runner=FlowTaskRunner(gpu="a100"))
def digits_flow(picture: str = str(Path(tempfile.gettempdir()) / "digits-prefect.png")) -> Values:
    """Try nine settings as far as there are GPUs at once; return the results and the report of the best."""
    with flow_options(gpu="cpu"):
        settings = sweep_settings.submit()
    results: Any = evaluate.map(settings)
    with flow_options(gpu="cpu"):
        best: Any = pick_best.submit(results)
    report = refit.submit(best, picture)
    return {"results": results.result(), "report": report.result()}


if __name__ == "__main__":
    print(digits_flow()["report"])
