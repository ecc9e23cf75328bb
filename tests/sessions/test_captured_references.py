"""References that a function or an object of a service takes along: the value is what the worker finds there."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flow_core import Flow, ObjectRef, Retries, Runner, Session, get
from flow_core.errors import ObjectError, ObjectNotFoundError


class Vocabulary:
    def __init__(self, words: Any, more: Any = ()) -> None:
        self.words = words
        self.more = more

    def size(self) -> int:
        return len(self.words) + len(self.more)

    def kind(self) -> str:
        return type(self.words).__name__


@pytest.fixture
def flow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flow:
    monkeypatch.setenv("FLOW_OBJECTS_HOME", str(tmp_path / "objects"))
    return Flow(local={"home": home, "kill_grace_s": 1})


@pytest.fixture
def session(flow: Flow) -> Any:
    with Session(flow=flow, workers=2) as session:
        yield session


@pytest.fixture
def words(flow: Flow) -> ObjectRef:
    return flow.objects.put(["a", "b", "c"])


def test_a_reference_in_a_closure_is_the_value(session: Session, words: ObjectRef) -> None:
    deep = {"under": [words]}

    @session.function
    def count(more: int, known: Any = words) -> list[int]:
        return [len(words) + more, len(deep["under"][0]), len(known)]

    assert count.remote(1).result(20) == [4, 3, 3]
    assert get(count.map([1, 2])) == [[4, 3, 3], [5, 3, 3]]
    assert list(count.imap(range(100))) == [[3 + x, 3, 3] for x in range(100)]
    assert count.options(retries=Retries(lost=1)).remote(2).result(20) == [5, 3, 3]


def test_it_is_told_to_each_worker_once_and_stays_the_same_function(
    session: Session, words: ObjectRef
) -> None:
    count = session.function(lambda: len(words))
    assert count.remote().result(20) == 3
    first = count._sent
    assert count.remote().result(20) == 3 and count._sent is first


def test_another_reference_is_another_value(session: Session, flow: Flow, words: ObjectRef) -> None:
    count = session.function(lambda: len(words))
    assert count.remote().result(20) == 3
    words = flow.objects.put(["d"])
    assert count.remote().result(20) == 1


def test_it_is_sent_along_where_the_worker_cannot_open_it(
    flow: Flow, session: Session, words: ObjectRef
) -> None:
    large: Any = flow.objects.put(np.arange(500_000), codec="pickle")
    both = session.function(serialization="pickle")(lambda: [len(words), int(large.sum())])
    pool = session.pool(session.defaults)
    pool.spec = replace(pool.spec, image="one/whose/containers/see/nothing/else")
    assert both.remote().result(20) == [3, sum(range(500_000))]


def test_what_is_wrong_with_it_is_said_in_the_caller(session: Session, flow: Flow, words: ObjectRef) -> None:
    pickled = flow.objects.put({1}, codec="pickle")
    with pytest.raises(ObjectError, match="is a pickle"):
        session.function(lambda: pickled).remote()
    flow.objects.delete(words)
    count = session.function(lambda: len(words))
    for _ in range(2):
        with pytest.raises(ObjectNotFoundError, match="there is no object"):
            count.remote()
    assert session.function(lambda: 1).remote().result(20) == 1


@pytest.mark.parametrize("options", [{}, {"autoscale": True}, {"warmup": 2}])
@pytest.mark.parametrize("form", ["a reference", "its JSON form"])
def test_an_argument_of_a_class_may_be_a_reference(
    flow: Flow, words: ObjectRef, options: dict[str, Any], form: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = words if form == "a reference" else dict(words)
    with Runner("vocabularies", flow=flow) as runner:
        service = runner.service(Vocabulary, args=(given,), kwargs={"more": given}, **options)
        assert [service.size().get(20), service.kind().get(20)] == [6, "list"]


def test_an_object_may_hold_references(
    flow: Flow, words: ObjectRef, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with Runner("vocabularies", flow=flow) as runner:
        every: list[dict[str, Any]] = [{}, {"autoscale": True}]
        for options in every:
            service = runner.service(Vocabulary(words, [1]), **options)
            assert [service.size().get(20), service.kind().get(20)] == [4, "list"]
        function = runner.service(functools.partial(lambda known, x: len(known) + x, words))
        assert function(2).get(20) == 5
