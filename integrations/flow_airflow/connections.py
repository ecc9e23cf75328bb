"""What a connection of type `flow` stands for: the settings of a Flow. Pure; `hooks` looks connections up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from pydantic import SecretStr

from flow_core.config import HostSettings, Settings
from flow_core.errors import ConfigError, close_names

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Providers whose machine, or machines, a connection's host, login and port name.
_BY_SSH = ("ssh", "slurm")

#: Settings that are secrets.
_SECRETS = ("api_key", "private_key")


class Connection(Protocol):
    """What this module needs of Airflow's connections."""

    conn_id: str
    host: str | None
    login: str | None
    password: str | None
    port: int | None

    @property
    def extra_dejson(self) -> dict[str, Any]:
        """The extra fields."""


def settings_of(connection: Connection, provider: str | None = None) -> dict[str, Any]:
    """Return the keywords of `flow_core.Flow` that a connection stands for; `provider` replaces the one it names.

    The extra fields are settings, as in the settings file; those of the provider's own section may stand there as they
    are, as in `{"provider": "slurm", "partition": "gpu"}`. Host, login and port say which machine `ssh` or `slurm` logs
    in on, and the fields of `HostSettings` how; several hosts of `ssh` are separated by commas. The password is the API
    key of a provider that has one. What is not there, the worker's settings file and environment say.

    Raises ConfigError that names the connection and the field.
    """
    extra = {name: value for name, value in connection.extra_dejson.items() if value not in (None, "")}
    named = extra.pop("provider", None)
    chosen = provider or named
    settings: dict[str, Any] = {"provider": chosen}
    section, machine = _own(chosen), set[str]()
    if chosen in _BY_SSH:
        machine = set(HostSettings.model_fields) - {"name"} - section
    own: dict[str, Any] = {}
    host: dict[str, Any] = {}
    for name, value in extra.items():
        kept = _sealed(value, name)
        if name in Settings.model_fields:
            settings[name] = kept
        elif name in section:
            own[name] = kept
        elif name in machine:
            host[name] = kept
        else:
            raise _unknown(connection, name, chosen, {*Settings.model_fields, *section, *machine})
    if connection.password:
        if chosen in _BY_SSH:
            raise _refused(
                connection,
                f"has a password, and {chosen} logs in with a key",
                "Put the path of the key into identity_file, or its text into private_key.",
            )
        settings["api_key"] = SecretStr(connection.password)
    own |= _machines(connection, chosen, host)
    if own and chosen is not None:
        settings[chosen] = {**settings.get(chosen, {}), **own}
    return settings


def _sealed(value: Any, name: str = "") -> Any:
    """Return a setting so that no secret shows in its `repr`, however deep it stands."""
    if isinstance(value, str) and name in _SECRETS:
        return SecretStr(value)
    if isinstance(value, dict):
        return {key: _sealed(one, key) for key, one in value.items()}
    return [_sealed(one) for one in value] if isinstance(value, list) else value


def _own(provider: str | None) -> set[str]:
    """Return the names of the fields in the provider's own section of the settings."""
    field = Settings.model_fields.get(provider or "")
    return set(getattr(field.annotation, "model_fields", ())) if field is not None else set()


def _machines(connection: Connection, provider: str | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the setting that says which machines to log in on."""
    if not connection.host:
        if fields or connection.login or connection.port:
            name = next(iter(fields), "login" if connection.login else "port")
            raise _refused(connection, f"has {name} and no host", "Say which machine it is for.")
        return {}
    if provider not in _BY_SSH:
        raise _refused(
            connection,
            f"names the host {connection.host!r}, and "
            + (f"the provider {provider} has no hosts" if provider else "does not say which provider to use"),
            "Host, login and port are for the providers ssh and slurm; leave them empty for others.",
        )
    shared = {"user": connection.login or None, "port": connection.port, **fields}
    machines: list[Any] = [
        one if "@" in one or ":" in one else {"name": one, **shared}
        for one in (part.strip() for part in connection.host.split(","))
        if one
    ]
    if provider == "ssh":
        return {"hosts": machines}
    if len(machines) != 1:
        raise _refused(connection, f"names {len(machines)} hosts", "slurm has one login node.")
    return {"host": machines[0]}


def _unknown(connection: Connection, name: str, provider: str | None, known: set[str]) -> ConfigError:
    near = [f"Did you mean {one!r}?" for one in close_names(name, known)]
    whose = f"of the provider {provider}" if provider else "without a provider"
    return ConfigError(
        f"the connection {connection.conn_id!r} has the extra field {name!r}, which is no setting {whose}",
        suggestions=[*near, f"Settings: {', '.join(sorted(known))}."],
    )


def _refused(connection: Connection, problem: str, hint: str) -> ConfigError:
    return ConfigError(f"the connection {connection.conn_id!r} {problem}", suggestions=[hint])
