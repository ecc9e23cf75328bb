"""A reference to a value is an XCom as it is: Airflow's own serialization gives back what was pushed."""

from __future__ import annotations

import json

import pytest

from flow_airflow.compat import deserialize, serialize
from flow_core import ObjectRef

REF = ObjectRef(
    uri="flow+task://local/train-0123456789abcdef-1/result.data", size_bytes=3, sha256="ab" * 32, codec="json"
)


@pytest.mark.every_airflow
def test_a_reference_is_the_same_after_a_round_through_an_xcom() -> None:
    pulled = deserialize(json.loads(json.dumps(serialize({"ref": REF, "all": [REF]}))))
    assert pulled == {"ref": REF, "all": [REF]}
    assert ObjectRef.of(pulled["ref"]).uri == REF.uri
