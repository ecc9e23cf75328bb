"""A reference to a value is an output as it is: the next asset gets it, and metadata shows it."""

from __future__ import annotations

import dagster as dg

from flow_core import ObjectRef

REF = ObjectRef(
    uri="flow+task://local/train-0123456789abcdef-1/result.data", size_bytes=3, sha256="ab" * 32, codec="json"
)


@dg.asset
def model() -> dg.MaterializeResult[ObjectRef]:
    return dg.MaterializeResult(value=REF, metadata={"model": dict(REF)})


@dg.asset
def report(model: ObjectRef) -> str:
    return ObjectRef.of(model).uri


def test_a_reference_goes_from_asset_to_asset() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        done = dg.materialize([model, report], instance=instance)
        assert done.output_for_node("report") == REF.uri
        (shown,) = done.asset_materializations_for_node("model")
        assert shown.metadata["model"].value == dict(REF)
