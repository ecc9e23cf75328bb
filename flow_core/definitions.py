"""What a session is asked for: a function as it travels, the wishes of one call, and the machine it all runs on."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flow_core import gpus
from flow_core.capture import cloudpickle_zip
from flow_core.models import SpecFile
from flow_core.runner import wire
from flow_core.runner.execute import WIRE_VERSION
from flow_core.runner.pickles import CLOUDPICKLE_ZIP
from flow_core.runner.strict_json import to_json

if TYPE_CHECKING:
    from flow_core.object_ref import ObjectRef
    from flow_core.objects import Carried

#: How long a call takes of which nothing is known (microseconds).
UNKNOWN_US = 1e12


@dataclass(frozen=True)
class Retries:
    """How often a call is made again: after the loss of its worker, and after exceptions of its own.

    None unless asked, since a call may have had effects. Between attempts lie `delay_s` seconds, times `backoff` after
    each, at most `max_delay_s`. Retries of the orchestrator's multiply with these.
    """

    lost: int = 0
    exceptions: int = 0
    on: tuple[type[BaseException], ...] = (Exception,)
    delay_s: float = 1.0
    backoff: float = 2.0
    max_delay_s: float = 60.0

    def delay(self, attempt: int) -> float:
        """Return the seconds before the attempt after number `attempt` (from 1)."""
        return min(self.max_delay_s, self.delay_s * self.backoff ** (attempt - 1))


@dataclass(frozen=True)
class CallOptions:
    """What one call asks for. `timeout_s` counts from the start of the user's code, for each attempt.

    With `stays` a large value stays where it is made until somebody asks for it, also when nothing is known yet of
    another call that takes it (`flow_core.staying`).
    """

    timeout_s: float | None = None
    retries: Retries = field(default_factory=Retries)
    stays: bool = False

    @property
    def repeats(self) -> bool:
        """Whether there may be another attempt. Its arguments are then not lent: an attempt may change what it got."""
        return self.retries.lost > 0 or self.retries.exceptions > 0


PLAIN = CallOptions()


class Definition:
    """A function as it travels: sent to each worker once, before the first call that needs it.

    `payload` is what `pickle.loads` makes the function of, there. `kind`: "function"; "make", which makes a service's
    object and keeps it on its worker; "each", which makes an object on every worker that is asked for a method of it;
    "method" `name` of the object that the definition `of` has made, the object itself where there is no name; "touch",
    which only sees to it that the object is made. `refs` are the references in the payload; what they need is provided
    before it is sent.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        payload: bytes,
        name: str,
        *,
        codec: str = "json",
        kind: str = "function",
        of: Definition | None = None,
        generator: bool = False,
        sources: Mapping[str, str] | None = None,
        refs: Sequence[ObjectRef] = (),
    ) -> None:
        self.number = next(self._numbers)
        self.name = name
        self.codec = codec
        self.of = of
        self.generator = generator
        self.estimate = UNKNOWN_US
        self._payload = payload
        self._head = {
            "kind": kind,
            "name": name,
            "codec": codec,
            "generator": generator,
            "of": of.number if of else 0,
            "sources": dict(sources or {}),
        }
        self.refs = refs
        self.lacking = [one for one in (of, self) if one is not None and one.refs]
        self.frame = b"" if refs else self._framed()

    def provide(self, carried: Carried) -> None:
        """Add what a worker needs to get the values of the references."""
        self._head["objects"] = carried.listed
        self._head["sizes"] = [len(self._payload), *map(len, carried.values)]
        self.frame = self._framed(*carried.values)

    def _framed(self, *values: bytes | bytearray) -> bytes:
        head = json.dumps(self._head).encode() + b"\n"
        return wire.frame(wire.DEFINE, self.number, b"".join([head, self._payload, *values]))

    def took(self, micros: float) -> None:
        """Learn from a call: quick to believe that it takes long, slow to believe that it does not."""
        if micros > self.estimate or self.estimate == UNKNOWN_US:
            self.estimate = micros
        else:
            self.estimate += 0.1 * (micros - self.estimate)


@dataclass(frozen=True)
class SessionSpec:
    """What a session asks for. `instance_type` is what each of the `workers` gets; they share one machine.

    `min_workers` of them (all, if None) are started at once, the others when calls queue up. A session ends by itself
    when it is `owned` and its owner has been silent for `lease_s`, or nothing has run for `idle_limit_s`. A call that
    is cancelled, or past its time, has `grace_s` before its worker is killed. `dependencies` are lines of a
    requirements file, installed before the first worker starts; `package` says where the working directory comes from,
    see `flow_core.packages.Package.source`. `task` holds further fields of TaskConfig.
    """

    name: str = "session"
    workers: int = 2
    min_workers: int | None = None
    instance_type: str = "cpu"
    image: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    files: tuple[SpecFile, ...] = ()
    idle_limit_s: float | None = None
    lease_s: float = 30.0
    owned: bool = True
    startup_timeout_s: float | None = None
    grace_s: float = 5.0
    paths: tuple[str, ...] = ()
    dependencies: tuple[str, ...] = ()
    package: Mapping[str, str] | None = None
    task: Mapping[str, Any] = field(default_factory=dict)

    def orders(self) -> tuple[SpecFile, ...]:
        """Return the files of the session's task: what its supervisor is to do, and what it needs for that."""
        call = {
            "v": WIRE_VERSION,
            "kind": "serve",
            "codec": "json",
            "python": list(sys.version_info[:2]),
            "gpus_each": gpus.parse(self.instance_type).count,
            "workers": self.workers,
            "lease_s": self.lease_s,
            "owned": self.owned,
            "idle_limit_s": self.idle_limit_s,
            "grace_s": self.grace_s,
            "paths": list(self.paths),
            "dependencies": list(self.dependencies),
            "package": None if self.package is None else dict(self.package),
        }
        return (
            SpecFile(name="call.json", data=to_json(call, "session")),
            SpecFile(name=CLOUDPICKLE_ZIP, data=cloudpickle_zip()),
            *self.files,
        )

    def machine(self) -> dict[str, Any]:
        """Return the fields of the session's TaskConfig: one machine with what all workers need together."""
        each = gpus.parse(self.instance_type)
        kind = str(replace(each, count=each.count * max(1, self.workers)))
        return {
            "name": self.name,
            "instance_type": kind,
            "image": self.image,
            "env": dict(self.env),
            **self.task,
        }
