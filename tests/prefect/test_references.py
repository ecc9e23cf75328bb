"""A reference to a value is a result as it is, and the same one has the same cache key."""

from __future__ import annotations

import json

import pytest
from prefect.serializers import JSONSerializer, PickleSerializer, Serializer
from prefect.utilities.hashing import hash_objects

from flow_core import ObjectRef

REF = ObjectRef(
    uri="flow+task://local/train-0123456789abcdef-1/result.data", size_bytes=3, sha256="ab" * 32, codec="json"
)


@pytest.mark.parametrize(
    "serializer", [JSONSerializer(), PickleSerializer()], ids=lambda one: type(one).__name__
)
def test_a_reference_is_the_same_after_it_was_stored_as_a_result(serializer: Serializer[ObjectRef]) -> None:
    assert ObjectRef.of(serializer.loads(serializer.dumps(REF))) == REF


def test_a_reference_that_came_back_has_the_same_cache_key() -> None:
    assert hash_objects(REF) == hash_objects(ObjectRef.of(json.loads(json.dumps(REF))))
