"""Flow in Dagster: a resource whose calls run on GPU machines, from ops and assets.

defs = dg.Definitions(assets=[…], resources={"flow": FlowResource(gpu="a100")})

@dg.asset
def accuracy(context: dg.AssetExecutionContext, flow: FlowResource) -> float:
    return flow.invoke(context, "train.py", "train", kwargs={"epochs": 3})["accuracy"]
"""

from flow_dagster.handle import FlowHandle, FlowResult
from flow_dagster.resource import FlowResource

__all__ = ["FlowHandle", "FlowResource", "FlowResult"]
