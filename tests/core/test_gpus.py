"""Names of GPUs: every documented spelling, and what a user reads after any other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flow_core.errors import ValidationError
from flow_core.gpus import GPURequest, known_gpus, parse


@pytest.mark.parametrize(
    ("name", "canonical", "count", "gpu"),
    [
        ("a100", "a100", 1, "a100"),
        ("1xa100", "a100", 1, "a100"),
        ("2xa100", "2xa100", 2, "a100"),
        ("4xa100", "4xa100", 4, "a100"),
        ("8xa100", "8xa100", 8, "a100"),
        ("h100", "8xh100", 8, "h100"),
        ("8xh100", "8xh100", 8, "h100"),
        ("1xh100", "1xh100", 1, "h100"),
        ("a100x8", "8xa100", 8, "a100"),
        ("A100", "a100", 1, "a100"),
        ("8XH100", "8xh100", 8, "h100"),
        ("  a100 ", "a100", 1, "a100"),
        ("64xl40s", "64xl40s", 64, "l40s"),
        ("rtx4090", "rtx4090", 1, "rtx4090"),
        ("rtx4090x2", "2xrtx4090", 2, "rtx4090"),
        ("a100-80gb.sxm.1x", "a100-80gb.sxm.1x", 1, "a100"),
        ("a100-80gb.sxm.4x", "a100-80gb.sxm.4x", 4, "a100"),
        ("A100-80GB.SXM.4X", "a100-80gb.sxm.4x", 4, "a100"),
        ("h100-80gb.pcie.1x", "h100-80gb.pcie.1x", 1, "h100"),
        ("a100-40gb", "a100-40gb.1x", 1, "a100"),
        ("cpu", "cpu", 0, None),
        ("CPU", "cpu", 0, None),
    ],
)
def test_every_documented_spelling_is_read(name: str, canonical: str, count: int, gpu: str | None) -> None:
    request = parse(name)
    assert (request.count, request.gpu) == (count, gpu)
    assert str(request) == canonical
    assert parse(canonical) == request


def test_the_full_name_asks_for_memory_and_form_too() -> None:
    request = parse("h100-80gb.pcie.1x")
    assert (request.memory_gb, request.form_factor) == (80, "pcie")


@pytest.mark.parametrize("name", ["it_fK7Cx6TVhOK5ZfXT", "it_MsIRhxj3ccyVWGfP"])
def test_a_providers_own_id_passes_through_with_its_case(name: str) -> None:
    request = parse(name)
    assert str(request) == request.instance_id == name
    assert request.gpu is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("h100", "8 x H100 80GB (from 'h100')"),
        ("8xh100", "8 x H100 80GB"),
        ("a100", "1 x A100 80GB"),
        ("A100", "1 x A100 80GB"),
        ("a100x2", "2 x A100 80GB (from 'a100x2')"),
        ("a100-40gb.sxm.4x", "4 x A100 40GB SXM"),
        ("cpu", "no GPU"),
        ("it_abc", "instance type it_abc"),
    ],
)
def test_messages_show_the_resolved_count_and_what_it_came_from(name: str, shown: str) -> None:
    assert parse(name).describe() == shown


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("nvidia-a100", "Write 'a100'."),
        ("gpu.nvidia.a100", "Write 'a100'."),
        ("nvidia/8xh100", "Write '8xh100'."),
        ("NVIDIA A100-SXM4-80GB", "Write 'a100'."),
        ("8 x h100", "Write '8xh100'."),
        ("a100:4", "Write '4xa100'."),
        ("h10", "'h100'"),
        ("a1000", "'a100'"),
        ("0xa100", "'cpu'"),
        ("65xa100", "num_instances"),
        ("99999999999999999999xa100", "num_instances"),
        ("2xa100x4", "'2xa100' or '4xa100'"),
        ("a100-60gb", "'a100-40gb' or 'a100-80gb'"),
        ("a100-80gb.foo.1x", "sxm"),
        ("", "'cpu'"),
        ("none", "'cpu'"),
        ("invalid", "'8xh100'"),
        ("-1xa100", "'1xa100'"),
        ("1.5xa100", "'a100'"),
        ("a\uff11\uff10\uff10", "'8xh100'"),
        ("it_", "'8xh100'"),
        ("it_a b", "'8xh100'"),
    ],
)
def test_any_other_name_is_refused_and_the_right_one_shown(name: str, way_out: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(name)
    assert repr(name) in caught.value.message
    assert way_out in "\n".join(caught.value.suggestions)


@pytest.mark.parametrize("value", [None, 8, 1.5, True, ["a100"], b"a100"])
def test_what_is_not_text_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="An instance type is text"):
        parse(value)


def test_a_page_of_text_does_not_fill_the_message() -> None:
    with pytest.raises(ValidationError) as caught:
        parse("z" * 100_000)
    assert len(str(caught.value)) < 1000


def test_requests_are_values() -> None:
    assert parse("A100x8") == parse("8xa100")
    assert hash(parse("A100x8")) == hash(parse("8xa100"))
    assert parse("h100") != parse("1xh100")


def test_the_usual_memory_is_known_for_every_model() -> None:
    for name in known_gpus():
        assert (parse(name).usual_memory_gb or 0) > 0
    assert parse("a100-40gb").usual_memory_gb == 40
    assert parse("cpu").usual_memory_gb is None
    assert parse("it_x").usual_memory_gb is None


REQUESTS = st.one_of(
    st.just(GPURequest(count=0)),
    st.from_regex(r"it_[A-Za-z0-9]{1,16}", fullmatch=True).map(
        lambda name: GPURequest(count=1, instance_id=name)
    ),
    st.builds(
        GPURequest,
        count=st.integers(1, 64),
        gpu=st.sampled_from(known_gpus()),
        form_factor=st.sampled_from([None, "sxm", "sxm4", "pcie", "nvl"]),
    ),
    st.builds(
        GPURequest,
        count=st.integers(1, 64),
        gpu=st.just("a100"),
        memory_gb=st.sampled_from([40, 80]),
        form_factor=st.sampled_from([None, "sxm", "pcie"]),
    ),
)


@given(REQUESTS)
def test_the_canonical_spelling_reads_back_as_the_same_request(request: GPURequest) -> None:
    again = parse(str(request))
    assert again == request
    assert str(again) == str(request)
    if request.instance_id is None:
        assert parse(f" {str(request).upper()}\n") == request


@given(st.sampled_from(known_gpus()), st.integers(1, 64))
def test_the_count_may_stand_on_either_side(gpu: str, count: int) -> None:
    assert parse(f"{count}x{gpu}") == parse(f"{gpu}x{count}")
    assert parse(f"{count}x{gpu}").count == count


@given(st.text(max_size=30))
@example("8xh100" * 20)
@example("x8")
def test_any_text_is_either_read_or_refused_with_a_way_out(text: str) -> None:
    try:
        request = parse(text)
    except ValidationError as error:
        way_out = error.suggestions
    else:
        way_out = ["none needed"]
        assert parse(str(request)) == request
    assert way_out
