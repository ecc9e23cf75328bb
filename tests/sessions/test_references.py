"""Values by reference in calls of a session: the worker gets the value, and knows nothing of references."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core import Flow, chunks, objects
from flow_core.dispatch import Pool
from flow_core.errors import (
    ObjectError,
    ObjectNotFoundError,
    TaskExecutionError,
    ValidationError,
)
from flow_core.futures import Future
from flow_core.object_ref import ObjectRef, StoredFile, TaskFile
from tests.sessions.conftest import Opener, sent


def total(data: Any, extra: Any = None) -> int:
    more: list[int] = extra["deep"][0] if extra else []
    return sum([*data["numbers"], *more])


def same(*values: Any, **named: Any) -> Any:
    return [list(values), named]


def length(value: Any) -> int:
    return len(value)


def kind(value: Any) -> str:
    import sys

    return f"{type(value).__name__}, {'flow_core' in sys.modules}"


def numbers(n: int) -> dict[str, Any]:
    return {"numbers": list(range(n))}


def zeros(n: int) -> Any:
    import numpy as np

    return np.zeros(n)


def boom() -> None:
    raise ValueError("no")


def pair() -> Any:
    yield 1
    yield 2


class Box:
    def __init__(self, inside: Any) -> None:
        self.inside = inside


def unpacked(box: Any) -> Any:
    return box.inside


@pytest.fixture
def flow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flow:
    monkeypatch.setenv("FLOW_HOME", str(home))
    monkeypatch.setenv("FLOW_OBJECTS_HOME", str(tmp_path / "objects"))
    return Flow(local={"home": home, "kill_grace_s": 1})


@pytest.fixture
def pool(opened: Opener) -> Pool:
    return opened()


def path_of(ref: ObjectRef) -> Path:
    assert isinstance(ref.place, StoredFile)
    return Path(ref.place.root.removeprefix("file://"), ref.place.name)


def stored(value: Any) -> Any:
    """A ref as it comes out of a host's database."""
    return json.loads(json.dumps(value))


# ------------------------------------------------------------ as an argument


@pytest.mark.parametrize("codec", ["json", "pickle"])
def test_a_reference_at_any_depth_is_the_value_in_the_function(flow: Flow, pool: Pool, codec: str) -> None:
    data, more = flow.objects.put(numbers(1000)), flow.objects.put([1, 2, 3])
    definition = sent(total, codec)
    for one, another in [(data, more), (stored(data), stored(more))]:
        future = pool.submit(definition, (one,), {"extra": {"deep": [another]}})
        assert future.result(30) == sum(range(1000)) + 6


def test_the_worker_needs_nothing_of_ours_for_it(flow: Flow, pool: Pool) -> None:
    for codec in ("json", "pickle"):
        assert pool.submit(sent(kind, codec), (flow.objects.put([1]),)).result(30) == "list, False"


def test_one_reference_given_twice_is_one_value(flow: Flow, pool: Pool) -> None:
    ref = flow.objects.put([1])

    def is_same(a: Any, b: Any) -> bool:
        return a is b["b"]

    for codec in ("json", "pickle"):
        assert pool.submit(sent(is_same, codec), (ref, {"b": stored(ref)})).result(30) is True


def test_arrays_bytes_and_attributes_of_objects_go_by_reference_in_pickles(flow: Flow, pool: Pool) -> None:
    array = np.arange(100_000.0)
    ref, raw = flow.objects.put(array, codec="pickle"), flow.objects.put(b"\xff" * 10)
    (back, bytes_back), _ = pool.submit(sent(same), ([ref], (stored(raw),))).result(30)
    assert np.array_equal(back[0], array) and bytes_back == (b"\xff" * 10,)
    back[0][0] = 1  # it is the caller's own
    assert pool.submit(sent(length), (raw,)).result(30) == 10
    assert np.array_equal(pool.submit(sent(unpacked), (Box(ref),)).result(30), array)


def test_references_and_futures_stand_side_by_side(flow: Flow, pool: Pool) -> None:
    ref = flow.objects.put([7, 8])
    for codec in ("json", "pickle"):
        made = pool.submit(sent(numbers, codec), (3,))
        got = pool.submit(sent(same, codec), (made, {"deep": [ref, made]}), {"ref": stored(ref)}).result(30)
        value = {"numbers": [0, 1, 2]}
        assert got == [[value, {"deep": [[7, 8], value]}], {"ref": [7, 8]}]


def test_a_large_argument_beside_a_reference_travels_as_ever(flow: Flow, pool: Pool) -> None:
    ref = flow.objects.put([7])
    array, text = np.arange(200_000.0), "x" * 300_000
    (back, value), _ = pool.submit(sent(same), (array, ref)).result(30)
    assert np.array_equal(back, array) and value == [7]
    assert pool.submit(sent(same, "json"), (text, [ref])).result(30) == [[text, [[7]]], {}]


def test_text_that_looks_like_a_reference_stays_text(pool: Pool) -> None:
    for codec in ("json", "pickle"):
        given = ['{"flow/ref": 1}', "flow/ref"]
        assert pool.submit(sent(same, codec), (given,)).result(30) == [[given], {}]


def test_a_value_that_holds_a_reference_is_data(flow: Flow, pool: Pool) -> None:
    inner = flow.objects.put([1])
    outer = flow.objects.put({"inner": stored(inner)})
    for codec in ("json", "pickle"):
        assert pool.submit(sent(same, codec), (outer,)).result(30) == [[{"inner": stored(inner)}], {}]


@pytest.mark.parametrize("codec", ["json", "pickle"])
def test_a_map_takes_references_and_an_items_fault_is_its_own(flow: Flow, pool: Pool, codec: str) -> None:
    refs = [stored(flow.objects.put([0] * n)) for n in range(12)]
    gone = flow.objects.put([0] * 99)
    objects.delete(gone)
    definition = sent(length, codec)
    list(chunks.run(lambda: (pool, definition), [[1]] * 2000))  # so that chunks are large
    values = list(chunks.run(lambda: (pool, definition), [*refs, gone, [1, 2]], return_exceptions=True))
    assert values[:12] == list(range(12)) and values[13] == 2
    assert isinstance(values[12], ObjectNotFoundError)
    lists = chunks.run(
        lambda: (pool, definition), [(ref,) for ref in refs], shape=lambda items: (items, True)
    )
    assert list(lists) == list(range(12))


# ------------------------------------------------------------ what is wrong with one


def test_an_object_that_is_gone_is_the_calls_error_in_the_words_of_every_call(flow: Flow, pool: Pool) -> None:
    ref = flow.objects.put([1])
    objects.delete(ref)
    future = pool.submit(sent(length), (ref,))
    with pytest.raises(ObjectNotFoundError, match="there is no object file://"):
        future.result(30)
    assert future.done() and future.status == "failed"
    old = ObjectRef.of({**flow.objects.put([2], max_age_s=5), "expires_at": 1.0})
    path_of(old).unlink()
    with pytest.raises(ObjectNotFoundError, match="expired on 1970-01-01"):
        pool.submit(sent(length, "json"), (old,)).result(30)
    assert pool.submit(sent(length), ([1, 2],)).result(30) == 2  # the next call is not harmed


def test_a_damaged_object_is_never_used(flow: Flow, pool: Pool) -> None:
    ref = flow.objects.put([1, 2, 3])
    path_of(ref).write_bytes(b"[1,2,4]")
    for codec in ("json", "pickle"):
        with pytest.raises(TaskExecutionError, match="does not hold what was written: its hash is another"):
            pool.submit(sent(length, codec), (ref,)).result(30)
    path_of(ref).write_bytes(b"[]")
    with pytest.raises(ObjectError, match="has 2 bytes in place of 7"):
        pool.submit(sent(length), (ref,)).result(30)


def test_a_pickle_needs_the_callers_word_and_a_strange_storage_the_settings(
    flow: Flow, pool: Pool, tmp_path: Path
) -> None:
    pickled = flow.objects.put([1], codec="pickle")
    with pytest.raises(ObjectError, match="which is a pickle"):
        pool.submit(sent(length, "json"), (pickled,)).result(30)
    strange = flow.objects.put([1], storage=str(tmp_path / "elsewhere"))
    with pytest.raises(ObjectError, match="no storage of these settings"):
        pool.submit(sent(length, "json"), (strange,)).result(30)
    with pytest.raises(ValidationError, match="size_bytes cannot be right"):
        pool.submit(sent(length, "json"), ({**pickled, "size_bytes": -1},))


# ------------------------------------------------------------ where the worker cannot open the file


def test_a_worker_that_cannot_open_the_file_is_sent_the_value(flow: Flow, pool: Pool) -> None:
    pool.spec = replace(pool.spec, image="one/whose/containers/see/nothing/else")
    array, text = np.arange(50_000.0), "x" * 200_000
    refs = [flow.objects.put(array, codec="pickle"), flow.objects.put([1, 2]), flow.objects.put(b"raw")]
    made = pool.submit(sent(length), ([1],))
    got = pool.submit(sent(same), (made, refs, text), {"array": refs[0]}).result(30)
    assert np.array_equal(got[0][1][0], array) and got[0][1][1:] == [[1, 2], b"raw"] and got[0][2] == text
    assert got[0][0] == 1 and np.array_equal(got[1]["array"], array)
    assert pool.submit(sent(same, "json"), (made, stored(refs[1]), text)).result(30) == [
        [1, [1, 2], text],
        {},
    ]
    path_of(refs[1]).write_bytes(b"[2,2]")
    with pytest.raises(ObjectError, match="hash is another"):
        pool.submit(sent(length), (refs[1],)).result(30)


# ------------------------------------------------------------ outcomes as references


@pytest.mark.parametrize("codec", ["json", "pickle"])
def test_an_outcome_by_reference_outlives_its_session(flow: Flow, opened: Opener, codec: str) -> None:
    pool = opened()
    ref = pool.submit(sent(numbers, codec), (1000,)).object_ref(30)
    assert isinstance(ref.place, TaskFile) and ref.place.task_id == pool.task_id
    assert ref.place.file.startswith("calls/") and ref.codec == codec
    pool.close()
    assert flow.objects.get(stored(ref), allow_pickle=codec == "pickle") == numbers(1000)
    another = opened()
    assert another.submit(sent(total, codec), (stored(ref),)).result(30) == sum(range(1000))
    assert flow.call_async(total, [stored(ref)]).get_result(60) == sum(range(1000))


def test_the_outcome_of_a_call_that_has_ended_or_was_read_can_be_a_reference(flow: Flow, pool: Pool) -> None:
    for value in (1, "text", None, np.arange(100_000.0), {"a": [np.zeros(3)]}):
        future = pool.submit(sent(same), (value,))
        future.result(30)
        ref = future.object_ref(30)
        assert future.object_ref(30) == ref
        assert str(flow.objects.get(ref, allow_pickle=True)) == str([[value], {}])


def test_a_large_outcome_is_written_once_and_stays_what_its_reference_says(flow: Flow, pool: Pool) -> None:
    futures = [pool.submit(sent(zeros), (300_000,)) for _ in range(10)]
    refs = [one.object_ref(30) for one in futures]
    pool.submit(sent(length), ([],)).result(30)
    pool.close()  # whatever was still to be written down has been
    for ref in refs:
        assert flow.objects.get(ref, allow_pickle=True).shape == (300_000,)


def test_another_process_makes_the_reference_from_the_id(flow: Flow, pool: Pool, home: Path) -> None:
    future = pool.submit(sent(numbers, "json"), (10,))
    again = Future.from_id(future.id, local={"home": home})
    ref = again.object_ref(30)
    assert ref == future.object_ref(30)
    assert flow.objects.get(ref) == numbers(10)


def test_a_call_that_failed_has_no_reference(pool: Pool) -> None:
    future = pool.submit(sent(boom, "json"))
    with pytest.raises(ValueError, match="no"):
        future.object_ref(30)
    with pytest.raises(ValidationError, match="generator"):
        pool.submit(sent(pair)).object_ref(30)


def test_a_released_session_takes_its_references_along(flow: Flow, opened: Opener) -> None:
    pool = opened()
    ref = pool.submit(sent(numbers, "json"), (10,)).object_ref(30)
    pool.close()
    flow.wait([pool.task_id], timeout=30)
    flow.release([pool.task_id])
    future = opened().submit(sent(total, "json"), (ref,))
    with pytest.raises(ObjectNotFoundError, match="was released by the host"):
        future.result(30)
