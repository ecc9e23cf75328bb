"""All hosts of the ssh provider, and what this process knows of where tasks are."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from flow_core.config import SSHSettings
from flow_core.errors import FlowError, ProviderUnavailable
from flow_core.providers.ssh_hosts import Host, together
from flow_core.providers.ssh_places import Notebook, Place, Placement

Key = TypeVar("Key")
Value = TypeVar("Value")

#: What each host says of a key (`notes.look`), and why the others say nothing.
Heard = tuple[dict[Host, Mapping[str, Any]], dict[Host, FlowError]]

#: Of so many tasks we remember where they are and what was last said of them.
REMEMBERED = 20_000

#: How old the answer about a key may be that is submitted now (seconds).
_FRESH_S = 10.0

_PATIENCE_S = 15.0


def keep(table: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    """Put something into a table that does not grow for ever."""
    table[key] = value
    table.move_to_end(key)
    while len(table) > REMEMBERED:
        table.popitem(last=False)


class Fleet:
    """The hosts, asked together. Thread-safe; holds nothing that the hosts would not tell once more."""

    def __init__(self, settings: SSHSettings) -> None:
        self.hosts = [Host(host, settings) for host in settings.hosts]
        for host in self.hosts:
            host.transport.target  # noqa: B018 - a mistake in ~/.ssh/config is told now, not host by host
        self._notebook = Notebook(settings.notes)
        self._table = threading.Lock()
        self._placements: OrderedDict[str, Placement] = OrderedDict()
        self._heard: OrderedDict[str, tuple[float, Heard]] = OrderedDict()

    # -- keys

    def ask_about(self, digests: Collection[str]) -> Mapping[str, Heard]:
        """Ask all hosts about keys, one request for each host."""
        wanted = [*digests]
        answers, silent = together(self.hosts, lambda host: host.look(wanted), patience_s=_PATIENCE_S)
        return {
            digest: ({host: answer[digest] for host, answer in answers.items()}, silent) for digest in wanted
        }

    def find(self, digests: Collection[str]) -> Mapping[str, str]:
        """Return the newest attempts at keys, those that exist. Raises ProviderUnavailable."""
        asked_at = time.monotonic()
        heard = self.ask_about(digests) if digests else {}
        found = {digest: self._newest(digest, one) for digest, one in heard.items()}
        with self._table:
            for digest, one in heard.items():
                keep(self._heard, digest, (asked_at, one))
        return {digest: task_id for digest, task_id in found.items() if task_id is not None}

    def look(self, digest: str) -> Heard:
        """Return what hosts say of a key that is about to be submitted. Raises ProviderUnavailable when none answers.

        It may be what a `find` has just heard: who places the task at the same time is met when it is written down.
        """
        with self._table:
            at, heard = self._heard.pop(digest, (float("-inf"), None))
        if heard is None or time.monotonic() - at > _FRESH_S:
            heard = self.ask_about([digest])[digest]
        if not heard[0]:
            raise self.nobody(heard[1])
        return heard

    def _newest(self, digest: str, heard: Heard) -> str | None:
        looks, silent = heard
        found = {
            int(number): str(one["task_id"])
            for look in looks.values()
            for number, one in look["tasks"].items()
        }
        for look in looks.values():
            found |= {int(number): str(note["task_id"]) for number, note in look["notes"].items()}
        here = self._notebook.newest(digest)
        if here is not None:
            found.setdefault(int(here.rpartition("-")[2]), here)
        if not looks and not found:
            raise self.nobody(silent)
        return found[max(found)] if found else None

    # -- where tasks are

    def remember(self, task_id: str, placement: Placement, *, write: bool = False) -> None:
        """Keep in mind where a task is; `write` also for other processes here."""
        with self._table:
            keep(self._placements, task_id, placement)
        if write:
            self._notebook.write(task_id, placement)

    def recall(self, task_id: str) -> Placement | None:
        """Return where a task is, as far as is known without asking."""
        with self._table:
            known = self._placements.get(task_id)
        if known is None:
            known = self._notebook.read(task_id)
            if known is not None and known.started:
                self.remember(task_id, known)
        return known

    def noted(self, task_id: str) -> Placement | None:
        """Return what this machine's notebook says."""
        return self._notebook.read(task_id)

    def host(self, place: Place) -> Host | None:
        """Return the host of a place: by what the machine calls itself, or by name where it cannot be asked."""
        for host in self.hosts:
            if host.transport.connected and host.id == place.id:
                return host
        named = (host for host in self.hosts if host.name == place.name and not host.transport.connected)
        return next(named, None)

    def find_host(self, place: Place) -> Host | None:
        """Do `host`, and ask all hosts for their names where it is not known yet."""
        found = self.host(place)
        if found is None:
            together(self.hosts, lambda host: host.id, patience_s=_PATIENCE_S)
            found = self.host(place)
        return found

    def hosts_of(self, placement: Placement) -> list[Host]:
        """Return the hosts of a placement, those that are still in the settings."""
        return [host for host in map(self.host, placement.places) if host is not None]

    def configured(self, placement: Placement) -> bool:
        """Whether all hosts of a placement are in the settings."""
        return len(self.hosts_of(placement)) == len(placement.places)

    def reachable(self, placement: Placement) -> bool:
        """Whether all hosts of a placement can be asked now, as far as is known."""
        return self.configured(placement) and all(
            host.transport.connected for host in self.hosts_of(placement)
        )

    # -- in words

    def nobody(self, silent: Mapping[Host, FlowError]) -> FlowError:
        """Say that none of the hosts that were asked can be reached."""
        errors = [silent[host] for host in self.hosts if host in silent]
        if len(errors) == 1:
            return errors[0]
        said = "; ".join(error.message for error in errors)
        advice = dict.fromkeys(hint for error in errors for hint in error.suggestions)
        return ProviderUnavailable(f"no host can be reached: {said}", suggestions=[*advice])

    def out_of_reach(self, task_id: str, placement: Placement) -> ProviderUnavailable:
        """Say that a task cannot be started where it must be."""
        return ProviderUnavailable(
            f"task {task_id} was placed on {self.absence(placement)}, so it is not started anywhere else",
            suggestions=[
                "Wait until the host is back.",
                "To give up what may run there, take the host out of ssh.hosts and submit again.",
            ],
        )

    def absence(self, placement: Placement) -> str:
        """Say which host of a placement cannot be asked, and why."""
        for place in placement.places:
            host = self.host(place)
            if host is None:
                return f"host {place.name}, which is not among ssh.hosts any more"
            if host.transport.outage is not None:
                return f"host {host.name}, {host.transport.outage}"
        return f"host {placement.places[0].name}, which has not answered yet"


def others(hosts: Sequence[Host], silent: Mapping[Host, FlowError]) -> str:
    """Say why some hosts are silent."""
    return "; ".join(silent[host].message for host in hosts if host in silent)
