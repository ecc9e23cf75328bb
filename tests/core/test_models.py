"""TaskConfig and its neighbours: every rule, and what a user reads when one is broken."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_core.errors import FlowError, ValidationError
from flow_core.models import MountSpec, SpecFile, TaskConfig, TaskSpec, VolumeSpec

CONFIG: Any = TaskConfig  # unchecked: most of what follows is wrong on purpose


def config(**fields: Any) -> TaskConfig:
    made: TaskConfig = CONFIG(**{"gpu": "a100", **fields})
    return made


def refused(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(**fields)
    assert not isinstance(caught.value, pydantic.ValidationError)
    assert caught.value.suggestions, "a message without a way out"
    return str(caught.value)


# -- TaskConfig: what is accepted


def test_the_documented_example_is_accepted_as_it_stands() -> None:
    full = TaskConfig(
        name="training-job",
        instance_type="8xh100",
        command=("python", "train.py", "--epochs", "10"),
        image="pytorch/pytorch:2.1.0-cuda12.1-cudnn8",
        env={"WANDB_API_KEY": "...", "BATCH_SIZE": "256"},
        working_dir="/workspace",
        volumes=[
            VolumeSpec(size_gb=100, mount_path="/data", name="datasets"),
            VolumeSpec(volume_id="vol-abc123", mount_path="/checkpoints"),
        ],
        data_mounts=[MountSpec(source="s3://bucket/data", target="/s3")],
        max_price_per_hour=10.0,
        max_run_time_hours=24.0,
        region="us-central1-b",
        num_instances=1,
        ssh_keys=["my-key"],
        upload_code=True,
        ports=[8888],
    )
    assert full.command == ("python", "train.py", "--epochs", "10")
    assert full.volumes[0].mount_path == "/data"
    assert full.ports == (8888,)


def test_only_a_machine_is_required() -> None:
    small = config()
    assert (small.name, small.num_instances, small.upload_code) == ("task", 1, True)
    assert (small.command, small.shell, small.script) == (None, None, None)
    assert (small.image, small.working_dir, small.region, small.max_run_time_hours) == (
        None,
        None,
        None,
        None,
    )
    assert (small.env, small.volumes, small.ports, small.ssh_keys) == ({}, (), (), ())


def test_both_documented_names_of_a_field_work() -> None:
    one = CONFIG(gpu="a100", container_image="python:3.11")
    two = CONFIG(instance_type="a100", image="python:3.11")
    assert one == two
    assert (one.gpu, one.container_image) == (one.instance_type, one.image) == ("a100", "python:3.11")
    assert CONFIG(gpu="a100", instance_type="a100") == CONFIG(gpu="a100")
    assert CONFIG.model_validate({"gpu": "a100"}) == CONFIG.model_validate_json('{"gpu": "a100"}') == config()


def test_none_means_not_given() -> None:
    assert config(name=None, env=None, volumes=None, num_instances=None, upload_code=None) == config()


@pytest.mark.parametrize("number", [2, "2", 2.0])
def test_numbers_may_come_as_text_from_templates(number: Any) -> None:
    assert config(num_instances=number).num_instances == 2


def test_volumes_and_mounts_may_be_plain_mappings() -> None:
    made = config(
        volumes=[{"name": "data", "size_gb": 5}], data_mounts=[{"source": "s3://b/x", "target": "/x"}]
    )
    assert made.volumes == (VolumeSpec(name="data", size_gb=5),)
    assert made.data_mounts == (MountSpec(source="s3://b/x", target="/x"),)


@pytest.mark.parametrize("hours", [0.001, 1, 168])
def test_any_run_time_up_to_seven_days_is_accepted(hours: float) -> None:
    assert config(max_run_time_hours=hours).max_run_time_hours == hours


def test_code_root_is_a_path_and_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert config(code_root="~/src").code_root == Path("/home/me/src")


# -- TaskConfig: what is refused


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"gpu": None}, "does not say which machine to use"),
        ({"min_gpu_memory_gb": 40}, "both instance_type and min_gpu_memory_gb"),
        ({"instance_type": "h100"}, "two names of one field"),
        ({"gpu": "nvidia-a100"}, "Write 'a100'"),
        ({"gpu": 8}, "instance_type must be text"),
        ({"gpu": None, "min_gpu_memory_gb": 0}, "greater than 0 (got 0)"),
        ({"command": "a", "shell": "b"}, "got command and shell"),
        ({"command": "a", "script": "b"}, "got command and script"),
        ({"shell": "a", "script": "b"}, "got shell and script"),
        ({"command": ""}, "command must not be empty"),
        ({"command": "  "}, "command must not be empty"),
        ({"command": []}, "must begin with the name of a program"),
        ({"command": ["", "x"]}, "must begin with the name of a program"),
        ({"command": ["sleep", 3]}, "Write '3' there"),
        ({"command": 3}, "text for a shell or a list of arguments"),
        ({"command": {"a": 1}}, "text for a shell or a list of arguments"),
        ({"command": "a\0b"}, "NUL"),
        ({"command": ["a", "b\0"]}, "NUL"),
        ({"command": "a\ud800"}, "UTF-8"),
        ({"command": ["a\ud800"]}, "UTF-8"),
        ({"shell": "a\ud800"}, "UTF-8"),
        ({"env": {"A": "\udcff"}}, "UTF-8"),
        ({"shell": ""}, "shell must not be empty"),
        ({"script": "\n"}, "script must not be empty"),
        ({"name": "my job"}, "letters, digits, dashes and underscores (got 'my job')"),
        ({"name": "job\n"}, "letters, digits, dashes and underscores"),
        ({"name": "größe"}, "letters, digits, dashes and underscores"),
        ({"name": ""}, "name must be 1 to 128"),
        ({"name": "x" * 129}, "name must be 1 to 128"),
        ({"env": {"A": 256}}, "env['A'] must be text"),
        ({"env": {"A=B": "x"}}, "'A=B'"),
        ({"env": {"": "x"}}, "env has the name ''"),
        ({"env": {"1A": "x"}}, "not begin with a digit"),
        ({"env": {"A": "x\0"}}, "NUL"),
        ({"env": ["A=b"]}, "env must be a mapping"),
        ({"image": "python 3"}, "image"),
        ({"image": "-v"}, "image"),
        ({"working_dir": "../x"}, "'..'"),
        ({"working_dir": ""}, "working_dir must not be empty"),
        ({"max_price_per_hour": 0}, "greater than 0"),
        ({"max_price_per_hour": -1.5}, "greater than 0 (got -1.5)"),
        ({"max_price_per_hour": float("nan")}, "finite"),
        ({"max_price_per_hour": float("inf")}, "finite"),
        ({"max_price_per_hour": True}, "must be a number (got True)"),
        ({"max_price_per_hour": "$10"}, "must be a number (got '$10')"),
        ({"max_run_time_hours": 168.01}, "at most 168"),
        ({"max_run_time_hours": 0}, "greater than 0"),
        ({"max_run_time_hours": "nan"}, "finite"),
        ({"region": "us central"}, "region"),
        ({"num_instances": 0}, "at least 1 (got 0)"),
        ({"num_instances": 1025}, "at most 1024 (got 1025)"),
        ({"num_instances": 1.5}, "whole number"),
        ({"num_instances": False}, "must be a number (got False)"),
        ({"ssh_keys": "my-key"}, "ssh_keys=['my-key']"),
        ({"ssh_keys": [""]}, "ssh_keys[0] must not be empty"),
        ({"ports": 8888}, "ports=[8888]"),
        ({"ports": [0]}, "ports[0] must be at least 1"),
        ({"ports": [80, 65536]}, "ports[1] must be at most 65535"),
        ({"ports": [80, 81, 80]}, "80 is there twice"),
        ({"ports": [True]}, "must be a number"),
        ({"volumes": {"name": "x"}}, "volumes must be a list"),
        ({"volumes": ["data"]}, "volumes[0] must be a VolumeSpec or a mapping"),
        ({"volumes": [{1: 2}]}, "text as the names of its fields"),
        ({"volumes": [{"name": "x", "size": 3}]}, "Did you mean size_gb"),
        ({"volumes": [{"name": "x"}, {"name": "x", "mount_path": "/y"}]}, "volume 'x' twice"),
        (
            {"volumes": [{"name": "x", "mount_path": "/d"}, {"name": "y", "mount_path": "/d/"}]},
            "path '/d' twice",
        ),
        (
            {"volumes": [{"name": "x"}], "data_mounts": [{"source": "s3://b", "target": "/volumes/x"}]},
            "path '/volumes/x' twice",
        ),
        ({"data_mounts": [{"source": "s3://b"}]}, "needs target"),
        ({"upload_code": "perhaps"}, "true or false"),
        ({"idempotency_key": ""}, "idempotency_key must not be empty"),
        ({"code_root": 3}, "code_root must be a path (got 3)"),
        ({"labels": {"a": 1}}, "labels['a'] must be text"),
        ({"instnce_type": "a100"}, "Did you mean instance_type"),
        ({"max_run_time": 3}, "max_run_time_hours"),
        ({"gpus": "a100"}, "gpu"),
        ({"colour": "red"}, "Its fields are"),
    ],
)
def test_a_broken_rule_names_the_field_the_value_and_the_way_out(fields: dict[str, Any], says: str) -> None:
    text = refused(**fields)
    assert says in text
    assert len(text) < 1500


def test_all_that_is_wrong_is_said_at_once() -> None:
    text = refused(name="a b", num_instances=0, ports=[0])
    assert "TaskConfig.name" in text
    assert "TaskConfig.num_instances" in text
    assert "TaskConfig.ports[0]" in text


@pytest.mark.parametrize("document", [[], 3, None])
def test_something_else_than_a_mapping_is_refused(document: Any) -> None:
    with pytest.raises(ValidationError, match="mapping"):
        TaskConfig.model_validate(document)


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(ValidationError, match="JSON"):
        TaskConfig.model_validate_json("{")


# -- secrets


def test_values_of_variables_never_show() -> None:
    made = config(env={"WANDB_API_KEY": "s3cret"})
    spec = TaskSpec.from_config(made, files=[SpecFile(name="payload", data=b"s3cret")])
    for text in (repr(made), str(made), f"{made}", repr(spec), str(spec), repr([made])):
        assert "s3cret" not in text
    assert "WANDB_API_KEY" in repr(made)


@pytest.mark.parametrize(
    "env", [{"A": ("s3cret",)}, {"A": ["s3cret"]}, "s3cret", {"A": "s3cret\0"}, {"1": "s3cret"}]
)
def test_values_of_variables_do_not_show_in_errors_either(env: Any) -> None:
    assert "s3cret" not in refused(env=env)


# -- values


def test_a_config_is_frozen() -> None:
    made = config()
    with pytest.raises(FlowError, match="frozen"):
        made.name = "other"  # type: ignore[misc]


def test_a_config_travels_and_compares_as_a_value() -> None:
    made = config(command=["a", "b"], env={"A": "b"}, volumes=[{"name": "x"}], code_root="src")
    assert pickle.loads(pickle.dumps(made)) == made
    assert copy.deepcopy(made) == made
    assert TaskConfig.model_validate_json(made.model_dump_json()) == made
    assert TaskConfig.model_validate(made.model_dump(mode="json")) == made


def test_replace_checks_the_changed_copy() -> None:
    made = config(command="old", name="job", env={"A": "b"})
    changed = made.replace(name="other", num_instances=2)
    assert (changed.name, changed.num_instances, changed.command, changed.env) == (
        "other",
        2,
        "old",
        {"A": "b"},
    )
    assert made.name == "job"
    with pytest.raises(ValidationError, match="num_instances"):
        made.replace(num_instances=0)
    with pytest.raises(ValidationError, match="Did you mean name"):
        made.replace(nme="x")


def test_replace_lets_a_new_command_or_machine_take_the_old_ones_place() -> None:
    made = config(command="old")
    assert made.replace(shell="new").command is None
    assert made.replace(script="new").script == "new"
    assert made.replace(min_gpu_memory_gb=40).instance_type is None
    assert made.replace(gpu="h100").instance_type == "h100"
    assert made.replace(gpu=None, region=None) == made


# -- VolumeSpec and MountSpec


def test_a_volume_is_mounted_under_its_name_unless_told_otherwise() -> None:
    assert VolumeSpec(name="data", size_gb=50).mount_path == "/volumes/data"
    assert VolumeSpec(name="data").size_gb == 100
    assert VolumeSpec(name="data", mount_path="/dataset/").mount_path == "/dataset"
    assert VolumeSpec(volume_id="vol-1").mount_path == "/volumes/vol-1"
    assert VolumeSpec(volume_id="vol-1", mount_path="/x").size_gb is None
    assert VolumeSpec(name="fast", interface="file", iops=3000, size_gb=5).iops == 3000


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "exactly one of name and volume_id"),
        ({"size_gb": 3, "mount_path": "/x"}, "exactly one of name and volume_id"),
        ({"name": "a", "volume_id": "vol-1"}, "exactly one of name and volume_id"),
        ({"volume_id": "vol-1", "size_gb": 3}, "together with size_gb"),
        ({"volume_id": "vol-1", "iops": 3}, "together with iops"),
        ({"volume_id": "vol-1", "size_gb": 5, "iops": 3}, "together with size_gb and iops"),
        ({"volume_id": "../x"}, "id of a volume"),
        ({"name": "../x"}, "begin with a letter or digit"),
        ({"name": "a/b"}, "letters, digits"),
        ({"name": "x" * 65}, "1 to 64"),
        ({"name": "a", "size_gb": 0}, "greater than 0 (got 0)"),
        ({"name": "a", "size_gb": -5}, "greater than 0 (got -5)"),
        ({"name": "a", "size_gb": True}, "must be a number"),
        ({"name": "a", "size_gb": 1.5}, "whole number"),
        ({"name": "a", "iops": 0}, "iops must be greater than 0"),
        ({"name": "a", "interface": "nfs"}, "must be 'block' or 'file' (got 'nfs')"),
        ({"name": "a", "mount_path": "data"}, "absolute path"),
        ({"name": "a", "mount_path": "/"}, "below '/'"),
        ({"name": "a", "mount_path": "/a/../../etc"}, "'..'"),
        ({"name": "a", "mount_path": "/a:/b"}, "colon"),
        ({"name": "a", "mount_path": "/a\0"}, "NUL"),
        ({"name": "a", "path": "/a"}, "mount_path"),
    ],
)
def test_a_broken_volume_rule_names_the_field_the_value_and_the_way_out(
    fields: dict[str, Any], says: str
) -> None:
    volume: Any = VolumeSpec
    with pytest.raises(ValidationError) as caught:
        volume(**fields)
    assert says in str(caught.value)
    assert caught.value.suggestions


@pytest.mark.parametrize("fields", [{"source": "", "target": "/x"}, {"source": "s3://b", "target": "x"}])
def test_a_mount_needs_a_source_and_an_absolute_target(fields: dict[str, Any]) -> None:
    mount: Any = MountSpec
    with pytest.raises(ValidationError, match=r"MountSpec\.(source|target)"):
        mount(**fields)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_makes_a_safe_volume_or_a_clear_refusal(name: str, path: str) -> None:
    try:
        volume = VolumeSpec(name=name, mount_path=path)
    except ValidationError:
        return
    assert "/" not in (volume.name or "/")
    assert volume.mount_path.startswith("/")
    assert ".." not in volume.mount_path.split("/")
