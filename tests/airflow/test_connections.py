"""Connections of type `flow`: what their fields mean, what the Test button says, and that secrets stay secret."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flow_airflow import FlowGPUOperator, FlowTaskTrigger
from flow_airflow.connections import settings_of
from flow_airflow.hooks import FlowHook, opener
from flow_core import TaskStatus, config
from flow_core.errors import ConfigError

SECRET = "sesame-do-not-tell"


def connection(**fields: Any) -> Any:
    extra = fields.pop("extra", {})
    given = {"host": None, "login": None, "password": None, "port": None} | fields
    return SimpleNamespace(conn_id="gpus", extra_dejson=extra, **given)


def loaded(**fields: Any) -> config.Settings:
    return config.load(environ={"FLOW_CONFIG": "/dev/null"}, **settings_of(connection(**fields)))


# -- what the fields mean


def test_the_extra_fields_are_settings() -> None:
    settings = loaded(
        extra={"provider": "local", "default_instance_type": "a100", "local": {"gpus": 2}, "home": "/x"}
    )
    assert (settings.provider, settings.default_instance_type) == ("local", "a100")
    assert (settings.local.gpus, settings.local.home) == (2, Path("/x"))


def test_host_login_and_key_name_a_machine_of_ssh() -> None:
    ssh = loaded(
        host="gpu1", login="ada", port=2222, extra={"provider": "ssh", "identity_file": "/k", "home": "/x"}
    ).ssh
    (host,) = ssh.hosts
    assert (host.name, host.user, host.port, host.identity_file) == ("gpu1", "ada", 2222, Path("/k"))
    assert ssh.home == "/x"


def test_several_hosts_are_separated_by_commas() -> None:
    hosts = loaded(host="gpu1, bob@gpu2:2200", login="ada", extra={"provider": "ssh"}).ssh.hosts
    assert [(one.name, one.user, one.port) for one in hosts] == [("gpu1", "ada", None), ("gpu2", "bob", 2200)]


def test_slurm_has_a_login_node_and_its_own_settings() -> None:
    slurm = loaded(
        host="login", login="ada", extra={"provider": "slurm", "partition": "gpu", "modules": ["cuda"]}
    ).slurm
    assert slurm.host is not None and (slurm.host.name, slurm.host.user) == ("login", "ada")
    assert (slurm.partition, slurm.modules) == ("gpu", ("cuda",))


def test_the_password_is_the_key_of_a_cloud() -> None:
    settings = loaded(password=SECRET, extra={"provider": "elsewhere", "project": "p"})
    assert settings.api_key is not None and settings.api_key.get_secret_value() == SECRET
    assert settings.project == "p"


def test_an_operators_provider_wins() -> None:
    assert settings_of(connection(extra={"provider": "ssh"}), "local")["provider"] == "local"


def test_fields_that_a_form_leaves_empty_count_as_not_given() -> None:
    assert settings_of(connection(host="", extra={"provider": "local", "home": None, "python": ""})) == {
        "provider": "local"
    }


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"host": "gpu1"}, "does not say which provider"),
        ({"host": "gpu1", "extra": {"provider": "local"}}, "the provider local has no hosts"),
        ({"login": "ada", "extra": {"provider": "ssh"}}, "has login and no host"),
        ({"host": "a,b", "extra": {"provider": "slurm"}}, "slurm has one login node"),
        ({"password": SECRET, "host": "a", "extra": {"provider": "ssh"}}, "logs in with a key"),
        ({"extra": {"provider": "slurm", "partitions": "gpu"}}, "Did you mean 'partition'?"),
        ({"extra": {"partition": "gpu"}}, "no setting without a provider"),
    ],
)
def test_a_contradiction_is_told_with_the_name_of_the_connection(fields: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(connection(**fields))
    assert "the connection 'gpus'" in str(caught.value) and problem in str(caught.value)
    assert SECRET not in str(caught.value)


# -- looked up by Airflow


@pytest.fixture
def define(monkeypatch: pytest.MonkeyPatch, home: Path) -> Any:
    def define(value: str | dict[str, Any]) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv("AIRFLOW_CONN_GPUS", text)

    return define


@pytest.mark.parametrize(
    "value",
    [
        "flow://?provider=local&home={home}&gpus=3",
        {"conn_type": "flow", "extra": {"provider": "local", "home": "{home}", "local": {"gpus": 3}}},
    ],
)
def test_a_connection_from_the_environment_is_a_uri_or_json(define: Any, tmp_path: Path, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    define(text.replace("{home}", str(tmp_path / "here")))
    flow = FlowHook("gpus").get_conn()
    assert flow.settings.local.gpus == 3
    task = flow.run("echo hello", upload_code=False)
    task.wait(30)
    assert task.status is TaskStatus.COMPLETED
    assert (tmp_path / "here").is_dir()


def test_a_connection_of_another_type_is_refused(define: Any) -> None:
    define("postgres://db")
    with pytest.raises(ConfigError, match="the connection 'gpus' is of type 'postgres'"):
        opener(None, "gpus")


def test_a_value_that_cannot_be_used_is_told_with_the_name_of_the_connection(define: Any) -> None:
    define({"conn_type": "flow", "password": SECRET, "extra": {"provider": "local", "gpus": "many"}})
    with pytest.raises(ConfigError, match="the connection 'gpus' cannot be used: .*gpus") as caught:
        opener(None, "gpus")()
    assert SECRET not in str(caught.value)


# -- the Test button


def test_the_test_button_tells_what_there_is(define: Any) -> None:
    define({"conn_type": "flow", "extra": {"provider": "local", "gpus": 3}})
    worked, said = FlowHook("gpus").test_connection()
    assert worked and said.startswith("local: it answers, and has ") and "\n" not in said
    assert "3 free" in said


def test_the_test_button_tells_what_is_wrong(define: Any) -> None:
    define(
        {"conn_type": "flow", "host": "127.0.0.1", "port": 1, "login": "ada", "extra": {"provider": "ssh"}}
    )
    worked, said = FlowHook("gpus").test_connection()
    assert not worked and "cannot be reached" in said and "\n" not in said


def test_the_test_button_tells_of_a_provider_that_there_is_not(define: Any) -> None:
    define({"conn_type": "flow", "extra": {"provider": "slrum"}})
    worked, said = FlowHook("gpus").test_connection()
    assert not worked and "Did you mean 'slurm'?" in said


# -- secrets


def test_no_secret_shows(define: Any, caplog: pytest.LogCaptureFixture) -> None:
    define(
        {
            "conn_type": "flow",
            "password": SECRET,
            "extra": {"provider": "local", "ssh": {"hosts": [{"name": "a", "private_key": SECRET}]}},
        }
    )
    caplog.set_level(logging.DEBUG)
    operator = FlowGPUOperator(task_id="node", command="true", flow_conn_id="gpus")
    flow = operator._connect()
    trigger = FlowTaskTrigger(flow_task_id="a", flow_conn_id="gpus")
    shown = [repr(one) for one in (flow, flow.settings, operator, vars(operator), trigger, vars(trigger))]
    assert flow.settings.api_key is not None and flow.settings.api_key.get_secret_value() == SECRET
    assert SECRET not in " ".join([*shown, repr(trigger.serialize()), caplog.text])


def test_a_trigger_waits_through_the_connection_and_carries_its_name_alone(
    define: Any, tmp_path: Path
) -> None:
    define({"conn_type": "flow", "extra": {"provider": "local", "home": str(tmp_path / "here")}})
    task = FlowHook("gpus").get_conn().run("sleep 0.3", upload_code=False)

    async def event() -> Any:
        async for one in FlowTaskTrigger(
            flow_task_id=task.task_id, flow_conn_id="gpus", hold_s=0, poll_interval_s=0.1
        ).run():
            return one.payload
        return None

    assert asyncio.run(event())["outcome"] == "ended"
