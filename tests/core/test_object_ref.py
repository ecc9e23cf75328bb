"""ObjectRef: what a reference is, what it survives, and which ones are refused."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from flow_core.errors import ValidationError
from flow_core.object_ref import ObjectRef, StoredFile, TaskFile, pickled_refs, revived

SHA = "ab" * 32
STORED: dict[str, Any] = {
    "uri": f"s3://bucket/objects/for-60s/ab/{SHA}.json",
    "size_bytes": 11,
    "sha256": SHA,
    "codec": "json",
    "expires_at": 1_800_000_000.5,
}
OF_TASK: dict[str, Any] = {
    **STORED,
    "uri": "flow+task://local/train-0123456789abcdef-1/result.data",
    "expires_at": None,
}


@pytest.mark.parametrize("fields", [STORED, OF_TASK])
def test_a_reference_survives_json_and_pickle_and_is_equal_to_its_json_form(fields: dict[str, Any]) -> None:
    ref = ObjectRef(**fields)
    stored = json.loads(json.dumps(ref))
    assert type(stored) is dict and stored == ref
    for again in (ObjectRef.of(stored), pickle.loads(pickle.dumps(ref)), copy.copy(ref), copy.deepcopy(ref)):
        assert type(again) is ObjectRef
        assert again == ref and hash(again) == hash(ref)
    assert {name: getattr(ref, name) for name in fields} == fields
    assert len(json.dumps(ref)) < 400


def test_the_address_tells_where_the_value_lies() -> None:
    assert ObjectRef(**STORED).place == StoredFile("s3://bucket/objects", f"for-60s/ab/{SHA}.json")
    place = ObjectRef(**OF_TASK).place
    assert place == TaskFile("local", "train-0123456789abcdef-1", "result.data")


def test_a_reference_never_changes() -> None:
    ref: Any = ObjectRef(**STORED)
    for change in (
        lambda: ref.update(uri="x"),
        lambda: ref.__setitem__("uri", "x"),
        lambda: ref.pop("uri"),
        ref.clear,
    ):
        with pytest.raises(TypeError, match="never changes"):
            change()
    with pytest.raises(AttributeError):
        ref.uri = "x"
    assert ref == ObjectRef(**STORED)


@pytest.mark.parametrize(
    "uri",
    [
        f"for-ever/ab/{SHA}.json",
        f"/etc/for-ever/ab/{SHA}.json",
        f"file:///objects/../../etc/for-ever/ab/{SHA}.json",
        f"file:///objects/for-ever/ab/../ab/{SHA}.json",
        f"file:///objects/for-ever/cd/{SHA}.json",
        f"file:///objects/for-ever/ab/{'cd' * 32}.json",
        f"file:///objects/for-ever/ab/{SHA}.pickle",
        f"file:///objects/forever/ab/{SHA}.json",
        f"file:///objects/for-ever/ab/{SHA}.json\n",
        f"file:///obj\0ects/for-ever/ab/{SHA}.json",
        "file:///etc/passwd",
        "https://example.com/",
        "flow+task://local/train-0123456789abcdef-1/job.json",
        "flow+task://local/train-0123456789abcdef-1/../result",
        "flow+task://local/train-0123456789abcdef-1/work/result",
        "flow+task://local/../../etc/result",
        "flow+task://local/a/b/result",
        "flow+task://../train-0123456789abcdef-1/result",
        "",
        None,
        7,
    ],
)
def test_an_address_that_no_reference_can_have_is_refused(uri: object) -> None:
    with pytest.raises(ValidationError, match="uri"):
        ObjectRef.of({"flow/ref": 1, **STORED, "uri": uri})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size_bytes": -1}, "size_bytes"),
        ({"size_bytes": "11"}, "size_bytes"),
        ({"size_bytes": True}, "size_bytes"),
        ({"sha256": "AB" * 32}, "sha256"),
        ({"sha256": 7}, "sha256"),
        ({"codec": "dill"}, "codec"),
        ({"expires_at": "tomorrow"}, "expires_at"),
        ({"more": 1}, "more"),
        ({"flow/ref": 2}, "version 2; this release reads version 1"),
    ],
)
def test_a_damaged_reference_says_what_is_wrong(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ObjectRef.of({"flow/ref": 1, **STORED, **change})


def test_a_dict_that_is_none_is_told_apart() -> None:
    with pytest.raises(ValidationError, match="is no reference to an object"):
        ObjectRef.of(STORED)
    missing = {name: value for name, value in STORED.items() if name != "size_bytes"}
    with pytest.raises(ValidationError, match="is damaged: see size_bytes"):
        ObjectRef.of({"flow/ref": 1, **missing})


def test_references_are_found_at_any_depth_and_only_what_holds_them_is_copied() -> None:
    ref = ObjectRef(**STORED)
    plain = {"deep": [1, (2, {"x": None})]}
    value = [dict(ref), plain, {"a": ({"b": [json.loads(json.dumps(ref))]},)}, ref]
    found: list[ObjectRef] = []
    made = revived(value, found)
    assert made == value and found == [ref, ref, ref]
    assert type(made[0]) is ObjectRef and type(made[2]["a"][0]["b"][0]) is ObjectRef
    assert made[1] is plain and made[3] is ref and type(value[0]) is dict
    assert revived(plain, []) is plain


def test_lists_that_share_lists_or_hold_themselves_are_looked_through_once() -> None:
    ref = dict(ObjectRef(**STORED))
    value: list[Any] = [ref]
    for _ in range(60):
        value = [value, value]
    found: list[ObjectRef] = []
    made = revived(value, found)
    assert len(found) == 1 and made[0] is made[1]
    loop: list[Any] = [1]
    loop.append(loop)
    assert revived(loop, []) is loop


def test_a_damaged_reference_among_arguments_is_an_error() -> None:
    with pytest.raises(ValidationError, match="codec"):
        revived([{"flow/ref": 1, **STORED, "codec": "x"}], [])


class Holder:
    def __init__(self, ref: ObjectRef) -> None:
        self.ref = ref


def test_the_references_in_a_pickle_are_known_wherever_they_are() -> None:
    ref = ObjectRef(**STORED)
    pickle.dumps(ref)
    with pickled_refs() as refs:
        pickle.dumps({"holder": Holder(ref), "again": [ref]})
    pickle.dumps(ref)
    assert refs == [ref]  # a pickle holds the same object once
