"""Finding a provider by its name. Providers never import each other; other distributions add theirs by entry point."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from flow_core.config import Settings
from flow_core.errors import ConfigError, close_names
from flow_core.providers.spi import Provider

#: Entry-point group; the value names a callable that takes Settings and returns a Provider.
GROUP = "flow_core.providers"

_BUILT_IN = {
    "local": "flow_core.providers.local:LocalProvider",
    "slurm": "flow_core.providers.slurm:SlurmProvider",
    "ssh": "flow_core.providers.ssh:SSHProvider",
}


def load(settings: Settings) -> Provider:
    """Return the provider that the settings name. Raises ConfigError for a name that nobody offers."""
    offered = {**{point.name: point.value for point in entry_points(group=GROUP)}, **_BUILT_IN}
    target = offered.get(settings.provider)
    if target is None:
        raise ConfigError(
            f"there is no provider named {settings.provider!r}",
            suggestions=[
                *(f"Did you mean {name!r}?" for name in close_names(settings.provider, offered)),
                f"Installed providers: {', '.join(sorted(offered))}.",
            ],
        )
    module, _, attribute = target.partition(":")
    try:
        provider = getattr(import_module(module), attribute)(settings)
    except ImportError as error:
        raise ConfigError(
            f"the provider {settings.provider!r} cannot be loaded: {error}",
            suggestions=[f"Install what it needs, for example: pip install 'flow-gpu[{settings.provider}]'."],
        ) from error
    if not isinstance(provider, Provider):
        raise ConfigError(
            f"the provider {settings.provider!r} ({target}) is not a flow_core.providers.spi.Provider"
        )
    return provider
