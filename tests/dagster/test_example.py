"""The Dagster example: the assets of `example_dags/dagster/digits_defs.py`, on a Python that has scikit-learn only."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from example_dags import digits
from example_dags.hosts.run_dagster import load
from flow_core import Flow

ROOT = Path(digits.__file__).resolve().parent.parent
GPU_PYTHON = ROOT / ".venvs" / "demo" / "bin" / "python"

PLAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import digits
results = [digits.evaluate(setting) for setting in digits.sweep_settings()]
report = digits.refit(digits.pick_best(results), sys.argv[2])
print(json.dumps({"accuracies": [one["accuracy"] for one in results], "report": report}))
"""


def plainly(picture: Path) -> dict[str, Any]:
    """What the functions return without Dagster and without us."""
    command = [str(GPU_PYTHON), "-c", PLAIN, str(ROOT / "example_dags"), str(picture)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def test_the_assets_have_the_numbers_of_the_plain_functions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    assert GPU_PYTHON.exists(), "`make test-dagster` makes it"
    monkeypatch.setenv("FLOW_LOCAL_PYTHON", str(GPU_PYTHON))
    job = load("digits_defs").defs.resolve_job_def("digits")
    config = dg.RunConfig(ops={"report": {"config": {"picture": str(tmp_path / "matrix.png")}}})
    result = job.execute_in_process(run_config=config, instance=instance)

    expected = plainly(tmp_path / "plain.png")
    assert [one["accuracy"] for one in result.output_for_node("sweep")] == expected["accuracies"]
    report = result.output_for_node("report")
    assert {**report, "picture": ""} == {**expected["report"], "picture": ""}
    assert (tmp_path / "matrix.png").read_bytes() == (tmp_path / "plain.png").read_bytes()

    [event] = result.asset_materializations_for_node("report")
    shown = {name: value.value for name, value in event.metadata.items()}
    assert (shown["test_accuracy"], shown["flow/gpu"]) == (report["test_accuracy"], "a100")
    assert str(shown["confusion matrix"]).startswith("![confusion matrix](data:image/png;base64,")
    assert len(Flow().list_tasks()) == 12
