"""Our own calls as one of the compared systems, through the public names: what a user of them gets."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flow_core import Flow, Runner, Serialization, Session
from tests.benchmarks import memory, work
from tests.benchmarks.peers import Function, System

_ARRAYS = {work.read_ends, work.read_all, work.produce}


class Ours(System):
    """Session.function and Runner.service on the local provider: JSON for numbers, pickle for arrays."""

    name = "flow_core"

    def __init__(self, workers: int) -> None:
        self.home = tempfile.TemporaryDirectory(prefix="flow-bench-")
        self.flow = Flow("local", local={"home": self.home.name})
        environ = {name: os.environ[name] for name in (work.COUNTS, memory.MARK) if name in os.environ}
        self.session = Session(flow=self.flow, workers=workers, env=environ)
        self.functions: dict[Function, Any] = {}
        self.runners: list[Runner] = []

    def function(self, function: Function) -> Any:
        """What a user decorates once."""
        if function not in self.functions:
            how = Serialization.PICKLE if function in _ARRAYS else Serialization.JSON
            self.functions[function] = self.session.function(serialization=how)(function)
        return self.functions[function]

    def submit(self, function: Function, *args: Any) -> Any:
        return self.function(function).remote(*args)

    def map(self, function: Function, items: Iterable[Any]) -> list[Any]:
        return list(self.function(function).imap(items))

    def refer(self, handle: Any) -> Any:
        handle.wait()
        return handle

    def actor(self) -> Callable[[int], Any]:
        # A service brings the current folder along, as it would a project: here an empty one.
        project = Path(self.home.name, "project")
        project.mkdir(exist_ok=True)
        runner = Runner("bench", flow=self.flow, code_root=project)
        self.runners.append(runner)
        add: Callable[[int], Any] = runner.service(work.Counter).add
        return add

    def gather(self, handles: Sequence[Any]) -> list[Any]:
        return [handle.result() for handle in handles]

    def close(self) -> None:
        for runner in self.runners:
            runner.close()
        self.session.close()
        self.home.cleanup()
