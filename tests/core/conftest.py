"""A machine to run calls on: a folder, a Python, an otherwise empty environment."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow, payload, runner
from flow_core.runner.strict_json import from_json
from flow_core.sessions import Session

VERSIONS = ("3.8", "3.10", "3.11", "3.13")


@functools.cache
def interpreter(version: str) -> str | None:
    """Return the Python of this version that is installed here."""
    if version == "{}.{}".format(*sys.version_info):
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [str(path) for path in pyenv.glob(f"versions/{version}.*/bin/python")]
    for path in (*found, shutil.which(f"python{version}")):
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    return None


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    result: bytes | None
    folder: Path

    @property
    def value(self) -> Any:
        assert self.result is not None, self.err
        about = payload.describe_result(self.result)
        if about.file is not None:
            return payload.decode(about.codec, (self.folder / about.file).read_bytes())
        return payload.decode_result(self.result, allow_pickle=True)

    @property
    def record(self) -> dict[str, Any]:
        """What the runner says went wrong."""
        assert self.result is not None, self.err
        header = from_json(self.result.partition(b"\n")[0])
        assert header["ok"] is False, header
        record: dict[str, Any] = header["error"]
        return record


class Machine:
    """One task folder with its runner, on a Python that has nothing but its standard library."""

    def __init__(self, folder: Path, python: str) -> None:
        self.python = python
        self.task = folder / "the task's; echo folder"
        self.work = self.task / "work"
        self.work.mkdir(parents=True)
        self.runner = folder / "runner" / "flow_runner"
        self.runner.mkdir(parents=True)
        for source in Path(runner.__file__).parent.glob("*.py"):
            (self.runner / source.name).write_bytes(runner.source(source.name))

    def write(self, files: dict[str, str]) -> None:
        """Put files into the work folder."""
        for path, text in files.items():
            self.put(path, text)

    def put(self, path: str, text: str) -> None:
        target = self.work / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def call(
        self, code: str, function: str = "f", args: Any = (), kwargs: Any = None, **options: Any
    ) -> Outcome:
        """Write `code` as train.py and call a function of it."""
        self.put("train.py", code)
        return self.run("train.py", function, args, kwargs, **options)

    def run(
        self,
        module: str,
        function: str = "f",
        args: Any = (),
        kwargs: Any = None,
        *,
        codec: Any = "json",
        more: Any = None,
        **options: Any,
    ) -> Outcome:
        envelope = payload.encode_call(module, function, args, kwargs, codec=codec)
        (self.task / "call.json").write_bytes(payload.with_fields(envelope, more or {}))
        return self.start(**options)

    def start(self, *flags: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Outcome:
        """Run the call whose files are in the task folder."""
        done = subprocess.run(
            [self.python, *flags, str(self.runner / "call.py")],
            cwd=cwd or self.work,
            env={"FLOW_TASK_DIR": str(self.task), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        path = self.task / "result"
        result = path.read_bytes() if path.exists() else None
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode(), result, self.task)


@pytest.fixture(params=VERSIONS)
def each(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    """A machine of each Python that functions may run on."""
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"no Python {request.param} here")
    return Machine(tmp_path, python)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with the Python that runs the tests."""
    return Machine(tmp_path, sys.executable)


def without_our_modules(folder: Path) -> dict[str, str]:
    """Return the variables with which a Python cannot import what the tests' own environment has of this project."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('flow_core', 'tests', 'integrations', 'example_dags'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def shared_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Two warm workers in a home of their own, for all tests of a module."""
    home = tmp_path_factory.mktemp("a home")
    env = without_our_modules(tmp_path_factory.mktemp("site"))
    with Session(flow=Flow("local", local={"home": home, "gpus": 2}), workers=2, env=env) as session:
        yield session
    assert all(task.is_terminal for task in session.flow.list_tasks())
