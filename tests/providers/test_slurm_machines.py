"""What an instance_type means on a cluster."""

from __future__ import annotations

from typing import Any

import pytest

from flow_core.config import SlurmSettings
from flow_core.errors import SpecRejected
from flow_core.models import TaskConfig, TaskSpec
from flow_core.providers.slurm_machines import choose, instances


def node(name: str, partition: str, gpus: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "partition": partition,
        "default": partition == "main",
        "state": "idle",
        "cpus": 16,
        "cpus_idle": 16,
        "memory_mb": 64000,
        "gpus": gpus,
        "gpus_used": {},
        "features": [],
        **more,
    }


CLUSTER = [
    node("c1", "main", {}),
    node("g1", "gpu", {"nvidia_a100_80gb_pcie": 8}, gpus_used={"nvidia_a100_80gb_pcie": 3}),
    node("g2", "gpu", {"nvidia_a100_80gb_pcie": 8}, state="mixed"),
    node("g3", "gpu", {"nvidia_a100_80gb_pcie": 8}, state="down"),
    node("v1", "old", {"V100": 4}),
]


def options(text: str, nodes: list[dict[str, Any]] | None = None, **settings: Any) -> dict[str, str | None]:
    spec = TaskSpec.from_config(TaskConfig(command="true", instance_type=text))
    return choose(spec, SlurmSettings(**settings), lambda: CLUSTER if nodes is None else nodes)


def never() -> list[dict[str, Any]]:
    pytest.fail("the cluster was asked although the table has the answer")


def test_a_type_is_found_under_the_clusters_own_name_and_in_its_partition() -> None:
    assert options("2xa100") == {"gres": "gpu:nvidia_a100_80gb_pcie:2", "partition": "gpu"}
    assert options("v100") == {"gres": "gpu:V100:1", "partition": "old"}


def test_the_other_spelling_for_gpus_can_be_asked_for() -> None:
    assert options("2xa100", gpu_directive="gpus-per-node")["gpus-per-node"] == "nvidia_a100_80gb_pcie:2"


def test_a_partition_that_was_chosen_stays() -> None:
    assert options("2xa100", partition="mine") == {"gres": "gpu:nvidia_a100_80gb_pcie:2"}


def test_the_default_partition_is_left_to_the_cluster() -> None:
    nodes = [node("g1", "main", {"a100": 8}), node("g2", "gpu", {"a100": 8})]
    assert options("a100", nodes) == {"gres": "gpu:a100:1"}


def test_a_task_without_gpus_asks_for_nothing() -> None:
    assert options("cpu") == {}


def test_the_plainest_of_several_names_is_taken_and_memory_tells_them_apart() -> None:
    nodes = [
        node("g1", "main", {"a100_80gb": 8}),
        node("g2", "main", {"a100": 8}),
        node("g3", "main", {"a100_40gb": 8}),
    ]
    assert options("a100", nodes) == {"gres": "gpu:a100:1"}
    assert options("a100-40gb", nodes[::2]) == {"gres": "gpu:a100_40gb:1"}


@pytest.mark.parametrize(
    ("asked", "has"), [("l4", "l40"), ("l40", "l40s"), ("a10", "a100"), ("h100", "a100")]
)
def test_a_name_that_only_begins_alike_is_another_gpu(asked: str, has: str) -> None:
    with pytest.raises(SpecRejected, match=has):
        options(asked, [node("g1", "main", {has: 8})])


def test_the_table_wins_and_the_cluster_is_not_asked() -> None:
    table = {
        "a100": {"partition": "big", "gres": "gpu:tesla:{count}"},
        "8xh100": {"partition": "dgx"},
        "cpu": {"mem": "1G"},
    }
    settings = SlurmSettings(instance_types=table)
    for text, wanted in {
        "4xa100": {"partition": "big", "gres": "gpu:tesla:4"},
        "h100": {"partition": "dgx", "gres": "gpu:8"},
        "cpu": {"mem": "1G"},
    }.items():
        spec = TaskSpec.from_config(TaskConfig(command="true", instance_type=text))
        assert choose(spec, settings, never) == wanted


def test_gpus_without_a_type_are_found_by_their_nodes_feature() -> None:
    nodes = [node("g1", "main", {"": 8}, features=["a100", "nvme"])]
    assert options("2xa100", nodes) == {"gres": "gpu:2", "constraint": "a100"}
    assert options("2xa100", nodes, constraint="nvme") == {"gres": "gpu:2", "constraint": "nvme&a100"}


def test_what_the_cluster_does_not_have_is_refused_with_the_line_to_write() -> None:
    with pytest.raises(SpecRejected, match="V100") as caught:
        options("8xh100")
    assert "slurm.instance_types" in str(caught.value) and "8xh100" in str(caught.value)
    with pytest.raises(SpecRejected, match="GPUs without a type"):
        options("a100", [node("g1", "main", {"": 8})])


@pytest.mark.parametrize(("memory", "wanted"), [(16, "gpu:V100:1"), (17, "gpu:nvidia_a100_80gb_pcie:1")])
def test_the_smallest_gpu_with_enough_memory_is_taken(memory: int, wanted: str) -> None:
    spec = TaskSpec.from_config(TaskConfig(command="true", min_gpu_memory_gb=memory))
    assert choose(spec, SlurmSettings(), lambda: CLUSTER)["gres"] == wanted
    with pytest.raises(SpecRejected, match="min_gpu_memory_gb=100"):
        choose(spec.model_copy(update={"min_gpu_memory_gb": 100}), SlurmSettings(), lambda: CLUSTER)


def test_partitions_are_listed_with_what_is_free_now() -> None:
    listed = {(one.region, one.instance_type): one for one in instances(SlurmSettings(), CLUSTER)}
    assert (
        listed["gpu", "2xa100"].available == 2 + 4
    )  # five free on one node, eight on the other, a third is down
    assert listed["gpu", "8xa100"].available == 1
    assert listed["gpu", "8xa100"].gpu_memory_gb == 80
    assert listed["main", "cpu"].available == 1
    assert listed["old", "4xv100"].available == 1


def test_types_of_the_table_are_listed_too() -> None:
    settings = SlurmSettings(instance_types={"8xb200": {"partition": "new", "gres": "gpu:b:8"}})
    (one,) = [one for one in instances(settings, CLUSTER) if one.instance_type == "8xb200"]
    assert (one.region, one.gpu_count, one.available) == ("new", 8, None)
