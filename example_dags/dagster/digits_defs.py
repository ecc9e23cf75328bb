"""Dagster: sweep, pick the best, refit. The functions are in `../digits.py`, which knows nothing of Dagster.

    dagster dev -f example_dags/dagster/digits_defs.py

Every asset's work is done on a GPU machine; Dagster keeps the assets, their results and what each task took.
"""

import base64
import tempfile
from pathlib import Path
from typing import Any

import dagster as dg

from flow_dagster import FlowResource

DIGITS = Path(__file__).resolve().parent.parent / "digits.py"

Values = dict[str, Any]


class Picture(dg.Config):
    """Where the confusion matrix goes."""

    picture: str = str(Path(tempfile.gettempdir()) / "digits-dagster.png")


@dg.asset
def settings(context: dg.AssetExecutionContext, flow: FlowResource) -> list[Values]:
    """The settings to try."""
    found: list[Values] = flow.invoke(context, DIGITS, "sweep_settings", gpu="cpu")
    return found


@dg.asset
def sweep(context: dg.AssetExecutionContext, flow: FlowResource, settings: list[Values]) -> list[Values]:
    """How good each setting is: one task per setting, as many at once as there are GPUs."""
    return flow.map(context, DIGITS, "evaluate", settings)


@dg.asset
def best(context: dg.AssetExecutionContext, flow: FlowResource, sweep: list[Values]) -> Values:
    """The best of them."""
    found: Values = flow.invoke(context, DIGITS, "pick_best", [sweep], gpu="cpu")
    context.add_output_metadata({"accuracy": found["accuracy"], "setting": found["setting"]})
    return found


@dg.asset
def report(context: dg.AssetExecutionContext, config: Picture, flow: FlowResource, best: Values) -> Values:
    """The best setting, trained on everything and tested on digits it has never seen."""
    found: Values = flow.invoke(context, DIGITS, "refit", [best, config.picture])
    picture = Path(found["picture"])
    shown: dict[str, Any] = {"picture": str(picture)}
    if picture.exists():  # the machine that drew it may be another one
        image = base64.b64encode(picture.read_bytes()).decode()
        shown = {
            "confusion matrix": dg.MetadataValue.md(f"![confusion matrix](data:image/png;base64,{image})")
        }
    context.add_output_metadata({"test_accuracy": found["test_accuracy"], "errors": found["errors"], **shown})
    return found


# The steps only wait for GPU machines: a process for each would cost seconds and gain nothing.
digits = dg.define_asset_job("digits", selection="*", executor_def=dg.in_process_executor)

defs = dg.Definitions(
    assets=[settings, sweep, best, report], jobs=[digits], resources={"flow": FlowResource(gpu="a100")}
)
