"""Where settings come from, which one wins, and what a user reads about a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flow_core.config import LocalSettings, PackageSettings, Settings, load
from flow_core.errors import ConfigError


class Machine:
    """A user's home with a settings file, and nothing of this process's environment."""

    def __init__(self, home: Path) -> None:
        self.path = home / ".flow" / "config.yaml"
        self.path.parent.mkdir()

    def load(self, text: str = "", env: dict[str, str] | None = None, **overrides: Any) -> Settings:
        self.path.write_text(text, encoding="utf-8")
        return load(environ=env or {}, **overrides)

    def refusal(self, text: str = "", env: dict[str, str] | None = None, **overrides: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(text, env, **overrides)
        return str(caught.value)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("HOME", str(tmp_path))
    return Machine(tmp_path)


def test_without_any_settings_this_machine_runs_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load(environ={})
    assert (settings.provider, settings.default_instance_type, settings.debug) == ("local", "cpu", False)
    assert (settings.project, settings.region, settings.ssh_keys, settings.api_key) == (None, None, (), None)
    local = settings.local
    assert (local.gpus, local.python, local.retention_days, local.kill_grace_s) == (None, None, 7.0, 10.0)
    assert local.home == tmp_path / ".flow" / "local"


FILE = """
provider: other
default_instance_type: a100
project: file-project
region: file-region
ssh_keys: [file-key]
api_key: file-secret
debug: true
local:
  home: ~/elsewhere
  gpus: 1
  python: /file/python
  retention_days: 1
  kill_grace_s: 1
"""


def test_the_file_wins_over_the_defaults(machine: Machine) -> None:
    settings = machine.load(FILE)
    assert (settings.provider, settings.default_instance_type, settings.debug) == ("other", "a100", True)
    assert (settings.project, settings.region, settings.ssh_keys) == (
        "file-project",
        "file-region",
        ("file-key",),
    )
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "file-secret"
    assert settings.local.home == Path.home() / "elsewhere"
    assert (settings.local.gpus, settings.local.python) == (1, "/file/python")


@pytest.mark.parametrize(
    ("variable", "text", "path", "value"),
    [
        ("FLOW_PROVIDER", "mine", "provider", "mine"),
        ("FLOW_DEFAULT_INSTANCE_TYPE", "8xh100", "default_instance_type", "8xh100"),
        ("FLOW_DEBUG", "0", "debug", False),
        ("FLOW_DEBUG", "false", "debug", False),
        ("FLOW_LOCAL_HOME", "/env/home", "local.home", Path("/env/home")),
        ("FLOW_LOCAL_GPUS", "4", "local.gpus", 4),
        ("FLOW_LOCAL_GPUS", "0", "local.gpus", 0),
        ("FLOW_LOCAL_PYTHON", "/env/python", "local.python", "/env/python"),
        ("FLOW_LOCAL_RETENTION_DAYS", "0.5", "local.retention_days", 0.5),
        ("FLOW_LOCAL_KILL_GRACE_S", "2", "local.kill_grace_s", 2.0),
        ("FLOW_PACKAGE_STORAGE", "s3://bucket/code/", "package.storage", "s3://bucket/code"),
        ("MITHRIL_DEFAULT_PROJECT", "env-project", "project", "env-project"),
        ("MITHRIL_PROJECT", "env-project", "project", "env-project"),
        ("MITHRIL_DEFAULT_REGION", "env-region", "region", "env-region"),
        ("MITHRIL_REGION", "env-region", "region", "env-region"),
        ("MITHRIL_SSH_KEYS", "one, two,", "ssh_keys", ("one", "two")),
    ],
)
def test_the_environment_wins_over_the_file(
    machine: Machine, variable: str, text: str, path: str, value: Any
) -> None:
    found: Any = machine.load(FILE, {variable: text})
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_the_documented_variable_wins_over_its_other_name(machine: Machine) -> None:
    both = {"MITHRIL_PROJECT": "second", "MITHRIL_DEFAULT_PROJECT": "first"}
    assert machine.load(env=both).project == "first"


def test_an_argument_wins_over_everything(machine: Machine) -> None:
    settings = machine.load(
        FILE, {"MITHRIL_REGION": "env", "FLOW_LOCAL_GPUS": "2"}, region="mine", local={"gpus": 3}
    )
    assert (settings.region, settings.local.gpus) == ("mine", 3)


def test_where_packages_go_and_what_stays_behind_are_settings(machine: Machine) -> None:
    text = "package: {storage: 'file:///opt/flow/packages', excludes: ['*.log', data/]}"
    assert machine.load(text, package={"excludes": ["models/"]}).package == PackageSettings(
        storage="file:///opt/flow/packages", excludes=["models/"]
    )
    assert machine.load().package == PackageSettings(storage=None, excludes=())


def test_arguments_for_the_local_provider_leave_its_other_settings_alone(machine: Machine) -> None:
    for local in ({"kill_grace_s": 3}, LocalSettings(kill_grace_s=3)):
        settings = machine.load(FILE, {"FLOW_LOCAL_PYTHON": "/env/python"}, local=local)
        assert (settings.local.kill_grace_s, settings.local.gpus, settings.local.python) == (
            3,
            1,
            "/env/python",
        )


def test_an_argument_of_none_and_an_empty_variable_count_as_not_given(machine: Machine) -> None:
    settings = machine.load(FILE, {"FLOW_LOCAL_GPUS": "", "MITHRIL_REGION": " "}, provider=None, local=None)
    assert (settings.local.gpus, settings.region, settings.provider) == (1, "file-region", "other")


def test_an_empty_file_and_empty_entries_change_nothing(machine: Machine) -> None:
    assert machine.load("# nothing\n") == machine.load("region:\nlocal:\n  gpus:\n") == load(environ={})


def test_a_key_never_chooses_the_provider(machine: Machine) -> None:
    settings = machine.load("api_key: mithril-secret", {"MITHRIL_API_KEY": "mithril-secret"})
    assert settings.provider == "local"


def test_another_file_can_be_named(machine: Machine, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("region: other")
    for name in (str(other), "~/other.yaml"):
        assert machine.load("region: usual", {"FLOW_CONFIG": name}).region == "other"


def test_a_relative_home_means_the_same_after_a_change_of_folder(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert machine.load(env={"FLOW_LOCAL_HOME": "here"}).local.home == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("provder: local", "Did you mean provider?"),
        ("local: {gpu: 3}", "Did you mean gpus?"),
        ("colour: red", "Its fields are"),
        ("local: {gpus: -1}", "gpus must be at least 0 (got -1)"),
        ("local: {gpus: true}", "gpus must be a number (got True)"),
        ("local: {retention_days: .nan}", "finite"),
        ("local: [1]", "must be a LocalSettings or a mapping"),
        ("package: {storage: /opt/flow/packages}", "storage must be a URL (got '/opt/flow/packages')"),
        ("package: {storage: 'file://opt/flow'}", "Write file:///opt/flow."),
        ("package: {storage: 'file://'}", "storage must be a URL"),
        ("ssh_keys: my-key", "ssh_keys=['my-key']"),
        ("default_instance_type: nvidia-a100", "Write 'a100'."),
        ("debug: perhaps", "true or false"),
        ("1: x", "text as the names of its fields"),
        ("- provider", "must hold names and values"),
        ("just text", "must hold names and values"),
        ("provider: [", "line 1 is not YAML"),
        ("a: 1\nb: 'x\n", "is not YAML"),
        ("provider: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_mistake_in_the_file_is_reported_with_its_path(machine: Machine, text: str, says: str) -> None:
    refusal = machine.refusal(text)
    assert str(machine.path) in refusal
    assert says in refusal


def test_a_mistake_in_a_variable_is_reported_with_its_name(machine: Machine) -> None:
    refusal = machine.refusal(FILE, {"FLOW_LOCAL_GPUS": "many"})
    assert "environment variable FLOW_LOCAL_GPUS" in refusal
    assert "(got 'many')" in refusal


def test_an_unknown_argument_lists_the_close_names(machine: Machine) -> None:
    assert "Did you mean provider?" in machine.refusal(provder="local")
    assert "Did you mean kill_grace_s?" in machine.refusal(local={"kill_grace": 3})


def test_a_named_file_must_be_there_and_readable(machine: Machine, tmp_path: Path) -> None:
    assert "No such file" in machine.refusal(env={"FLOW_CONFIG": str(tmp_path / "nowhere.yaml")})
    assert "Is a directory" in machine.refusal(env={"FLOW_CONFIG": str(tmp_path)})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "not text in UTF-8" in machine.refusal(env={"FLOW_CONFIG": str(tmp_path / "binary")})


@pytest.mark.parametrize("text", ["api_key: s3cret", "api_key: [s3cret]", "api_key: s3cret\nprovder: x"])
def test_the_key_never_shows(machine: Machine, text: str) -> None:
    try:
        shown = repr(machine.load(text, {"MITHRIL_API_KEY": "s3cret"}))
    except ConfigError as error:
        shown = str(error)
    assert "s3cret" not in shown
