"""Settings: defaults < `~/.flow/config.yaml` < environment < arguments. Read here and nowhere else.

    provider: local                 FLOW_PROVIDER
    default_instance_type: cpu      FLOW_DEFAULT_INSTANCE_TYPE
    project: my-project             MITHRIL_DEFAULT_PROJECT or MITHRIL_PROJECT
    region: us-central1-b           MITHRIL_DEFAULT_REGION or MITHRIL_REGION
    ssh_keys: [my-key]              MITHRIL_SSH_KEYS, separated by commas
    api_key: fkey_...               MITHRIL_API_KEY
    debug: false                    FLOW_DEBUG
    task_url: https://…/{task_id}   FLOW_TASK_URL
    local:
      home: ~/.flow/local           FLOW_LOCAL_HOME
      gpus: 4                       FLOW_LOCAL_GPUS
      python: /usr/bin/python3      FLOW_LOCAL_PYTHON
      retention_days: 7             FLOW_LOCAL_RETENTION_DAYS
      kill_grace_s: 10              FLOW_LOCAL_KILL_GRACE_S
    ssh:
      hosts: [gpu1, ada@gpu2:2222]  FLOW_SSH_HOSTS, separated by commas; or mappings, see HostSettings
      home: ~/.flow/ssh             FLOW_SSH_HOME
      python: python3               FLOW_SSH_PYTHON
      config: ~/.ssh/config         FLOW_SSH_CONFIG
      known_hosts: [known_hosts]    FLOW_SSH_KNOWN_HOSTS, separated by commas
      notes: ~/.flow/ssh-notes      FLOW_SSH_NOTES
      connect_timeout_s: 10         FLOW_SSH_CONNECT_TIMEOUT_S
      retention_days: 7             FLOW_SSH_RETENTION_DAYS
      kill_grace_s: 10              FLOW_SSH_KILL_GRACE_S
    slurm:
      host: login.example.org       FLOW_SLURM_HOST; left out: the tools are on this machine
      home: ~/.flow/slurm           FLOW_SLURM_HOME, on a file system that all nodes share
      python: python3               FLOW_SLURM_PYTHON
      partition: gpu                FLOW_SLURM_PARTITION
      account: vision               FLOW_SLURM_ACCOUNT
      qos: normal                   FLOW_SLURM_QOS
      constraint: nvlink            FLOW_SLURM_CONSTRAINT
      reservation: course           FLOW_SLURM_RESERVATION
      memory: 64G                   FLOW_SLURM_MEMORY
      cpus: 8                       FLOW_SLURM_CPUS
      instance_types: {a100: {partition: gpu, gres: "gpu:a100:{count}"}}
      directives: {mail-type: END}  and more, see SlurmSettings
    package:
      storage: file:///shared/code  FLOW_PACKAGE_STORAGE
      excludes: ["*.log", data/]
    objects:
      home: ~/.flow/objects         FLOW_OBJECTS_HOME
      storage: s3://bucket/objects  FLOW_OBJECTS_STORAGE
      trusted: [file:///shared/objects]
      max_age_days: 30              FLOW_OBJECTS_MAX_AGE_DAYS
      reference_over_bytes: 1000000 FLOW_OBJECTS_REFERENCE_OVER_BYTES

`FLOW_CONFIG` names another file. An empty variable counts as unset. The provider is what `provider` says:
a key in the environment never chooses it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from flow_core import gpus
from flow_core.errors import ConfigError, ValidationError
from flow_core.values import Count, Items, Number, Refusal, Text, Value

DEFAULT_PATH = "~/.flow/config.yaml"

# The first variable that is set wins.
_VARIABLES: tuple[tuple[str, str], ...] = (
    ("FLOW_PROVIDER", "provider"),
    ("FLOW_DEFAULT_INSTANCE_TYPE", "default_instance_type"),
    ("MITHRIL_DEFAULT_INSTANCE_TYPE", "default_instance_type"),
    ("MITHRIL_DEFAULT_PROJECT", "project"),
    ("MITHRIL_PROJECT", "project"),
    ("MITHRIL_DEFAULT_REGION", "region"),
    ("MITHRIL_REGION", "region"),
    ("MITHRIL_SSH_KEYS", "ssh_keys"),
    ("MITHRIL_API_KEY", "api_key"),
    ("FLOW_DEBUG", "debug"),
    ("FLOW_TASK_URL", "task_url"),
    ("FLOW_LOCAL_HOME", "local.home"),
    ("FLOW_LOCAL_GPUS", "local.gpus"),
    ("FLOW_LOCAL_PYTHON", "local.python"),
    ("FLOW_LOCAL_RETENTION_DAYS", "local.retention_days"),
    ("FLOW_LOCAL_KILL_GRACE_S", "local.kill_grace_s"),
    ("FLOW_SSH_HOSTS", "ssh.hosts"),
    ("FLOW_SSH_HOME", "ssh.home"),
    ("FLOW_SSH_PYTHON", "ssh.python"),
    ("FLOW_SSH_CONFIG", "ssh.config"),
    ("FLOW_SSH_KNOWN_HOSTS", "ssh.known_hosts"),
    ("FLOW_SSH_NOTES", "ssh.notes"),
    ("FLOW_SSH_CONNECT_TIMEOUT_S", "ssh.connect_timeout_s"),
    ("FLOW_SSH_RETENTION_DAYS", "ssh.retention_days"),
    ("FLOW_SSH_KILL_GRACE_S", "ssh.kill_grace_s"),
    ("FLOW_SLURM_HOST", "slurm.host"),
    ("FLOW_SLURM_HOME", "slurm.home"),
    ("FLOW_SLURM_PYTHON", "slurm.python"),
    ("FLOW_SLURM_PARTITION", "slurm.partition"),
    ("FLOW_SLURM_ACCOUNT", "slurm.account"),
    ("FLOW_SLURM_QOS", "slurm.qos"),
    ("FLOW_SLURM_CONSTRAINT", "slurm.constraint"),
    ("FLOW_SLURM_RESERVATION", "slurm.reservation"),
    ("FLOW_SLURM_MEMORY", "slurm.memory"),
    ("FLOW_SLURM_CPUS", "slurm.cpus"),
    ("FLOW_SLURM_MAX_RUNNING", "slurm.max_running"),
    ("FLOW_SLURM_COMMAND_TIMEOUT_S", "slurm.command_timeout_s"),
    ("FLOW_SLURM_RETENTION_DAYS", "slurm.retention_days"),
    ("FLOW_SLURM_KILL_GRACE_S", "slurm.kill_grace_s"),
    ("FLOW_PACKAGE_STORAGE", "package.storage"),
    ("FLOW_OBJECTS_HOME", "objects.home"),
    ("FLOW_OBJECTS_STORAGE", "objects.storage"),
    ("FLOW_OBJECTS_MAX_AGE_DAYS", "objects.max_age_days"),
    ("FLOW_OBJECTS_REFERENCE_OVER_BYTES", "objects.reference_over_bytes"),
)

_LISTS = frozenset({"ssh_keys", "ssh.hosts", "ssh.known_hosts"})


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise Refusal("needs to know the home folder", "Set HOME, or write an absolute path.") from None


def _instance_type(name: str) -> str:
    gpus.parse(name)
    return name


class LocalSettings(Value):
    """How this machine runs tasks.

    `home` holds the tasks and volumes. `gpus` is the number of GPUs to share out: with real ones at most that
    many of them are used, without any that many are simulated; None means what is found. `python` runs
    functions and scripts, None means the interpreter that submits. What ended is kept for `retention_days`.
    `kill_grace_s` is the time between the request to end and the kill.
    """

    home: Annotated[Path, AfterValidator(_absolute)] = Field(
        Path("~/.flow/local"), validate_default=True, examples=["/var/lib/flow"]
    )
    gpus: Count | None = Field(None, ge=0, examples=[4])
    python: Text | None = Field(None, examples=["/usr/bin/python3"])
    retention_days: Number = Field(7.0, ge=0, examples=[7])
    kill_grace_s: Number = Field(10.0, ge=0, examples=[10])


def _host(given: Any) -> Any:
    """Read 'ada@gpu1:2222' as the mapping that it stands for."""
    if not isinstance(given, str):
        return given
    user, _, rest = given.strip().rpartition("@")
    name, colon, port = rest.partition(":") if rest.count(":") == 1 else (rest, "", "")
    if not name or (colon and not port.isdigit()) or (not user and "@" in given):
        raise Refusal("must name a host", "Write it like gpu1, or ada@gpu1:2222.")
    return {"name": name, "user": user or None, "port": int(port) if colon else None}


def _host_key(text: str) -> str:
    words = text.split()
    if len(words) < 2 or not words[1].startswith("AAAA"):
        raise Refusal("must be a public key", "Write it like host_key: 'ssh-ed25519 AAAA…'.")
    return " ".join(words[:2])


class HostSettings(Value):
    """A machine that is reached by SSH; what is left out, `~/.ssh/config` or the host itself says.

    `name` is what you would type after `ssh`. `host_key` pins the machine's public key, in place of known_hosts.
    `private_key` is the text of our own key, for where it is not kept in a file; no other is then offered, and it never
    shows in `repr` or errors.
    `gpus` is the number of GPUs to share out, as for this machine; None means what is found there. `python` runs
    functions and scripts there (3.8 or later). `address` is the one under which the other hosts reach this one, for
    tasks on several of them.
    """

    secret_fields: ClassVar[frozenset[str]] = frozenset({"private_key"})

    name: Text = Field(examples=["gpu1"])
    host: Text | None = Field(None, examples=["gpu1.example.org"])
    user: Text | None = Field(None, examples=["ada"])
    port: Count | None = Field(None, gt=0, lt=65536, examples=[22])
    identity_file: Annotated[Path, AfterValidator(_absolute)] | None = Field(
        None, examples=["~/.ssh/id_ed25519"]
    )
    private_key: SecretStr | None = None
    host_key: Annotated[Text, AfterValidator(_host_key)] | None = Field(None, examples=["ssh-ed25519 AAAA…"])
    gpus: Count | None = Field(None, ge=0, examples=[8])
    python: Text | None = Field(None, examples=["/opt/conda/bin/python"])
    home: Text | None = Field(None, examples=["/scratch/ada/flow"])
    address: Text | None = Field(None, examples=["10.0.0.11"])


class SSHSettings(Value):
    """Machines that are reached by SSH.

    `home` is a folder on each of them, in which every machine has one of its own name (home folders may be shared).
    `python` and `home` hold for the hosts that do not say otherwise. `config` and `known_hosts` are read besides what
    OpenSSH reads by default (another `config`: in its place). `notes` is a folder here that remembers on which
    host a task was started. `connect_timeout_s` is how long a host may take to answer when it is first asked.
    """

    hosts: Items[Annotated[HostSettings, BeforeValidator(_host)]] = Field(
        (), examples=[["gpu1", "ada@gpu2:2222", {"name": "gpu3", "gpus": 8}]]
    )
    home: Text = Field("~/.flow/ssh", examples=["/scratch/ada/flow"])
    python: Text = Field("python3", examples=["/opt/conda/bin/python"])
    config: Annotated[Path, AfterValidator(_absolute)] = Field(
        Path("~/.ssh/config"), validate_default=True, examples=["~/.ssh/config"]
    )
    known_hosts: Items[Annotated[Path, AfterValidator(_absolute)]] = Field(
        (), examples=[["/etc/flow/known_hosts"]]
    )
    notes: Annotated[Path, AfterValidator(_absolute)] = Field(
        Path("~/.flow/ssh-notes"), validate_default=True, examples=["~/.flow/ssh-notes"]
    )
    connect_timeout_s: Number = Field(10.0, gt=0, examples=[10])
    retention_days: Number = Field(7.0, ge=0, examples=[7])
    kill_grace_s: Number = Field(10.0, ge=0, examples=[10])


def _plain(text: str) -> str:
    if any(ord(sign) < 32 for sign in text):
        raise Refusal("must be one line of text")
    return text


def _directives(given: Any) -> dict[str, str | None]:
    """Check options of sbatch by their long names; None stands for an option without a value."""
    if not isinstance(given, Mapping):
        raise Refusal("must be a mapping")
    options: dict[str, str | None] = {}
    for name, value in given.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise Refusal(f"must use sbatch's long names, and {name!r} is none", "Write it like 'mail-type'.")
        if name in _OWN_DIRECTIVES:
            raise Refusal(f"must leave {name!r} alone: it is set for every task")
        if value is not False:
            options[name] = None if value is None or value is True else _plain(str(value))
    return options


#: What the provider sets itself, or could not work with.
_OWN_DIRECTIVES = frozenset(
    (
        *(
            "array",
            "chdir",
            "error",
            "export",
            "export-file",
            "get-user-env",
            "ignore-pbs",
            "input",
            "job-name",
        ),
        *(
            "kill-on-invalid-dep",
            "nodes",
            "ntasks",
            "ntasks-per-node",
            "open-mode",
            "output",
            "parsable",
            "quiet",
        ),
        *("test-only", "usage", "version", "wait", "wrap", "help"),
    )
)

Directives = Annotated[Mapping[str, str | None], BeforeValidator(_directives)]
Line = Annotated[Text, AfterValidator(_plain)]


class SlurmSettings(Value):
    """A Slurm cluster, and what its tasks ask it for.

    `host` is a login node that is reached by SSH; without one, Slurm's tools are on this machine. `home` is a folder
    that all nodes see under this path. `python` (3.8 or later) runs tasks on the nodes: None means the interpreter that
    submits, or `python3` behind a login node.

    `partition` to `cpus` are options of sbatch of the same names (`cpus` is `cpus-per-task`), `directives` any others
    by their long names. `gpu_directive` is how the cluster wants GPUs to be asked for. `instance_types` says what a
    task's instance_type means here: options again, with `{count}` for the number of GPUs; a type that is not in it is
    looked for among the cluster's own. `requeue` says whether Slurm may start a task again after a preemption or a
    node's failure; None leaves that to the cluster. A task's time limit is enforced to the second by its own runner, so
    Slurm is asked for `time_margin_min` more. `max_running` limits how many tasks of one array run at once.

    `modules` are loaded before a task, then `setup` runs in the same shell. `container` runs `image=`.
    `command_timeout_s` is how long one of Slurm's tools may take.
    """

    host: Annotated[HostSettings, BeforeValidator(_host)] | None = Field(None, examples=["login.example.org"])
    home: Line = Field("~/.flow/slurm", examples=["/scratch/ada/flow"])
    python: Line | None = Field(None, examples=["/opt/conda/bin/python"])
    partition: Line | None = Field(None, examples=["gpu"])
    account: Line | None = Field(None, examples=["vision"])
    qos: Line | None = Field(None, examples=["normal"])
    constraint: Line | None = Field(None, examples=["nvlink"])
    reservation: Line | None = Field(None, examples=["course"])
    memory: Line | None = Field(None, examples=["64G"])
    cpus: Count | None = Field(None, gt=0, examples=[8])
    exclusive: bool = Field(False, examples=[True])
    requeue: bool | None = Field(None, examples=[False])
    time_margin_min: Count = Field(5, ge=0, examples=[5])
    gpu_directive: Literal["gres", "gpus-per-node"] = Field("gres", examples=["gpus-per-node"])
    instance_types: Mapping[Annotated[Line, AfterValidator(_instance_type)], Directives] = Field(
        {}, examples=[{"a100": {"partition": "gpu", "gres": "gpu:a100:{count}"}}]
    )
    directives: Directives = Field({}, examples=[{"mail-type": "END"}])
    max_running: Count | None = Field(None, gt=0, examples=[50])
    modules: Items[Line] = Field((), examples=[["cuda/12.4"]])
    setup: Text | None = Field(None, examples=["source /opt/conda/bin/activate torch"])
    container: Literal["apptainer", "pyxis"] = Field("apptainer", examples=["pyxis"])
    command_timeout_s: Number = Field(30.0, gt=0, examples=[30])
    retention_days: Number = Field(7.0, ge=0, examples=[7])
    kill_grace_s: Number = Field(10.0, ge=0, examples=[10])


def _storage(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator or not scheme or not rest:
        raise Refusal(
            "must be a URL",
            "Write file:///a/shared/folder, or another URL that fsspec knows: s3://bucket/path.",
        )
    if scheme == "file" and not rest.startswith("/"):
        raise Refusal("must name an absolute path after file://", f"Write file:///{rest}.")
    return url.rstrip("/")


class PackageSettings(Value):
    """How a `Runner`'s folder travels.

    `storage` is a folder that this process can write and the workers can read: `file://` on a file system that
    they share, or another URL that fsspec knows. None sends the folder along with the task. What `excludes` names
    stays behind: patterns as in a .gitignore.
    """

    storage: Annotated[Text, AfterValidator(_storage)] | None = Field(
        None, examples=["file:///opt/flow/packages"]
    )
    excludes: Items[Text] = Field((), examples=[["*.log", "data/"]])


class ObjectSettings(Value):
    """Where values by reference are kept, and for how long.

    `put` writes to `storage`: `file://` on a file system that the machines share, or another URL that fsspec knows.
    None means `home`, a folder of this user alone, from which values are sent along with the calls that get them. A
    reference is followed into these two, and into the `trusted` storages. An object is kept for `max_age_days` after
    it was last put. A call's result of more than `reference_over_bytes` comes back as a reference; None means never.
    """

    home: Annotated[Path, AfterValidator(_absolute)] = Field(
        Path("~/.flow/objects"), validate_default=True, examples=["/var/lib/flow-objects"]
    )
    storage: Annotated[Text, AfterValidator(_storage)] | None = Field(None, examples=["s3://bucket/objects"])
    trusted: Items[Annotated[Text, AfterValidator(_storage)]] = Field(
        (), examples=[["file:///shared/objects"]]
    )
    max_age_days: Number = Field(30.0, gt=0, le=36500, examples=[30])
    reference_over_bytes: Count | None = Field(None, ge=0, examples=[1_000_000])


def _task_url(template: str) -> str:
    if not re.match(r"https?://[^/]", template) or "{task_id}" not in template:
        raise Refusal("must be a web address with {task_id} in it")
    return template


class Settings(Value):
    """What is the same for all tasks of one `Flow`.

    `default_instance_type` is used by tasks that do not say which machine they need. `project`, `region`,
    `ssh_keys` and `api_key` are for providers that rent machines; the key never shows in `repr` or errors. `task_url`
    is where people look at a task, a dashboard of the cluster's say, with `{task_id}` in it.
    """

    secret_fields: ClassVar[frozenset[str]] = frozenset({"api_key"})

    provider: Text = Field("local", examples=["local"])
    default_instance_type: Annotated[Text, AfterValidator(_instance_type)] = Field("cpu", examples=["a100"])
    project: Text | None = Field(None, examples=["my-project"])
    region: Text | None = Field(None, examples=["us-central1-b"])
    ssh_keys: Items[Text] = Field((), examples=[["my-key"]])
    api_key: SecretStr | None = None
    debug: bool = Field(False, examples=[True])
    task_url: Annotated[Text, AfterValidator(_task_url)] | None = Field(
        None, examples=["https://dashboards.example.org/gpu?task={task_id}"]
    )
    local: LocalSettings = Field(default_factory=LocalSettings, examples=[{"gpus": 4}])
    ssh: SSHSettings = Field(default_factory=SSHSettings, examples=[{"hosts": ["gpu1"]}])
    slurm: SlurmSettings = Field(default_factory=SlurmSettings, examples=[{"partition": "gpu"}])
    package: PackageSettings = Field(default_factory=PackageSettings, examples=[{"excludes": ["*.log"]}])
    objects: ObjectSettings = Field(
        default_factory=ObjectSettings, examples=[{"storage": "s3://bucket/objects"}]
    )


_SECTIONS = frozenset(
    name
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Value)
)


def load(*, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Gather the settings. `overrides` are fields of `Settings`; None counts as not given.

    A section such as `local` may be a mapping with some of its fields: the others keep what file and environment say.

    Raises:
        ConfigError: the file cannot be read, or a name or value in it, in a variable or in an argument is
            wrong; the message says where it stands.
    """
    env = os.environ if environ is None else environ
    merged: dict[str, Any] = {}
    for origin, layer in _layers(env, overrides):
        _check(origin, layer)
        for name, value in _given(layer).items():
            merged[name] = {**merged.get(name, {}), **_given(value)} if name in _SECTIONS else value
    return Settings(**merged)


def _layers(env: Mapping[str, str], overrides: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where settings come from, the weakest first."""
    path = _path(env)
    if path is not None:
        yield f"The settings file {path}", _read(path)
    for variable, target in reversed(_VARIABLES):
        text = env.get(variable, "").strip()
        if text:
            value = [one.strip() for one in text.split(",") if one.strip()] if target in _LISTS else text
            section, _, name = target.rpartition(".")
            yield (
                f"The environment variable {variable}",
                {section: {name: value}} if section else {name: value},
            )
    yield "The arguments", overrides


def _check(origin: str, layer: Mapping[str, Any]) -> None:
    """Look at one layer alone, so that a mistake is reported with the place where it was made."""
    try:
        Settings.model_validate(dict(layer))
    except ValidationError as error:
        raise ConfigError(
            f"{origin} cannot be used: {error.message}", suggestions=error.suggestions
        ) from None


def _given(values: Mapping[str, Any] | Value) -> dict[str, Any]:
    if isinstance(values, Value):
        return {name: getattr(values, name) for name in values.model_fields_set}
    return {name: value for name, value in values.items() if value is not None}


def _path(env: Mapping[str, str]) -> Path | None:
    """The settings file that counts; None where there is none and none was named."""
    named = env.get("FLOW_CONFIG", "").strip()
    try:
        path = Path(named or DEFAULT_PATH).expanduser()
    except RuntimeError:  # this user has no home folder
        return Path(named) if named else None
    return path if named or path.exists() else None


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The settings file {path} cannot be read: {error.strerror}.",
            suggestions=["Correct FLOW_CONFIG or the file's permissions."],
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"The settings file {path} is not text in UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"The settings file {path}{where} is not YAML: {getattr(error, 'problem', error)}."
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"The settings file {path} must hold names and values.",
            suggestions=["Write it like: provider: local"],
        )
    return content
