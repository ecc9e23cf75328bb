"""Runner: how it starts and ends, and that its workers have exactly the folder and the packages they should have."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from flow_core import ConfigError, Flow, Runner, SessionClosedError, TaskExecutionError, ValidationError
from tests.conftest import processes_under
from tests.core.test_installs import sdist, wheel
from tests.core.test_services import until


@pytest.fixture(autouse=True)
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    path = tmp_path / "my project's; echo"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    path.mkdir()
    return path


def one() -> int:
    return 1


def listing() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def answer() -> Any:
    import answering  # type: ignore[import-not-found]

    return answering.ANSWER


def imported(name: str) -> Any:
    import importlib

    module = importlib.import_module(name)
    return module.VALUE, module.__file__


# ------------------------------------------------------------ start and end


def test_a_runner_starts_with_its_first_service_and_ends_when_it_is_closed(home: Path) -> None:
    rr = Runner("lazy")
    assert not home.exists()
    service = rr.service(one)
    call = service()
    assert call.get() == 1 and rr.task_id.startswith("lazy-")
    rr.close()
    rr.close()
    until(lambda: processes_under(home) == [])
    assert call.get() == 1  # what was read is still there
    for use in (lambda: rr.service(one), rr.__enter__, lambda: rr.put_object(1)):
        with pytest.raises(SessionClosedError, match="the Runner 'lazy' is closed"):
            use()
    with pytest.raises(SessionClosedError, match="is closed"):
        service()


def test_with_starts_the_workers_session_and_ends_it_also_after_an_error(home: Path) -> None:
    def interrupted() -> None:
        with Runner("with") as rr:
            assert [task.task_id for task in rr.flow.list_tasks()] == [rr.task_id]
            rr.service(one)()
            raise LookupError

    with pytest.raises(LookupError):
        interrupted()
    until(lambda: processes_under(home) == [])


def test_a_runner_that_was_never_used_can_be_closed(home: Path) -> None:
    Runner("unused").close()
    assert not home.exists()


def test_two_runners_of_one_name_go_on_side_by_side_unless_that_is_forbidden() -> None:
    with Runner("twin") as first, Runner("twin") as second, Runner("other", fail_if_exists=True):
        assert first.service(one)().get() == second.service(one)().get() == 1
        with pytest.raises(ValidationError, match="a Runner named 'twin' is open already: task twin-"):
            Runner("twin", fail_if_exists=True).service(one)
    with Runner("twin", fail_if_exists=True) as alone:
        assert alone.service(one)().get() == 1


def test_several_threads_may_start_it_at_once() -> None:
    values: list[int] = []
    with_one = Runner("threads")
    threads = [
        threading.Thread(target=lambda: values.append(with_one.service(one)().get())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with_one.close()
    assert values == [1] * 4 and len(with_one.flow.list_tasks()) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "my app"}, "1 to 128 letters, digits, dashes and underscores"),
        ({"python_version": "2.7"}, "python_version='2.7' cannot be served"),
        ({"dependencies": "numpy"}, r"dependencies='numpy' must be a list"),
        ({"dependencies": ["-r requirements.txt"]}, "names a file of this machine"),
        ({"dependencies": ["--requirement=x.txt"]}, "names a file of this machine"),
        ({"dependencies": ["./local"]}, "names a file of this machine"),
        ({"storage": "/opt/packages"}, "storage must be a URL"),
        ({"excludes": "*.log"}, "excludes must be"),
        ({"worker": 3}, "Did you mean workers?"),
        ({"provider": "local", "flow": Flow()}, "got both provider and flow"),
    ],
)
def test_what_cannot_be_is_refused_when_the_runner_is_made(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Runner(**{"name": "app", **options})


def test_this_python_may_be_asked_for() -> None:
    version = "{}.{}".format(*sys.version_info)
    with Runner("app", False, [], version) as rr:
        assert rr.service(one)().get() == 1


def test_gpus_and_variables_are_those_of_the_workers() -> None:
    def look() -> tuple[str | None, str | None]:
        return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("GREETING")

    class Looks:
        def look(self) -> str | None:
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    with Runner("gpus", gpu="1xa100", env={"GREETING": "hello"}) as rr:
        assert rr.service(look)().get() == ("0", "hello")
        assert rr.service(Looks).look().get() == "0"
        assert rr.service(Looks, autoscale=True).look().get() == "0"


# ------------------------------------------------------------ the folder


def test_the_folder_arrives_without_what_is_excluded(folder: Path, tmp_path: Path) -> None:
    kept = ["app.py", "sub/module.py", "data.txt"]
    for name in [
        *kept,
        ".venv/x",
        "venv/x",
        "a.pyc",
        "__pycache__/a",
        ".gitignore",
        "x.log",
        "big/x",
        "no/x",
    ]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / ".flowignore").write_text("no/\n")
    (tmp_path / "config.yaml").write_text("package: {excludes: ['*.log']}")
    with Runner("app", excludes=["big/"]) as rr:
        assert rr.service(listing)().get() == sorted([".flowignore", *kept])


@pytest.mark.parametrize("kind", ["file", "local", None])
def test_a_second_runner_of_the_name_never_gets_the_code_of_the_first(
    kind: str | None, folder: Path, shared: Path
) -> None:
    storage = None if kind is None else f"{kind}://{shared}"
    seen = []
    for number in (1, 2, 1):
        (folder / "answering.py").write_text(f"ANSWER = {number}")
        with Runner("app", storage=storage) as rr:
            seen.append(rr.service(answer)().get())
    assert seen == [1, 2, 1]
    assert len(list(shared.iterdir())) == (0 if kind is None else 2)


def test_code_that_changes_while_a_runner_is_open_is_the_next_ones(folder: Path) -> None:
    (folder / "answering.py").write_text("ANSWER = 1")
    with Runner("app") as first:
        first.task_id  # noqa: B018 - starts it
        (folder / "answering.py").write_text("ANSWER = 2")
        with Runner("app") as second:
            assert (first.service(answer)().get(), second.service(answer)().get()) == (1, 2)


def test_another_folder_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").touch()
    with Runner("app", code_root=tmp_path / "elsewhere") as rr:
        assert rr.service(listing)().get() == ["x.txt"]


def test_a_storage_that_cannot_be_used_is_an_error_before_anything_starts(home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"package: {{storage: 'file://{tmp_path}/missing'}}")
    with pytest.raises(ConfigError, match="Storage directory does not exist"):
        Runner("app").service(one)
    assert not home.exists()


def test_a_package_that_the_worker_does_not_find_fails_the_calls_with_what_to_do(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flow_core import packages

    make = packages.make

    def lost(*args: Any, **options: Any) -> packages.Package:
        made = make(*args, **options)
        for path in shared.iterdir():
            path.unlink()
        return made

    monkeypatch.setattr(packages, "make", lost)
    with Runner("app", storage=f"file://{shared}") as rr:
        service = rr.service(one)
        with pytest.raises(TaskExecutionError, match="Package path not found: .* cannot be read on"):
            service().get()
        with pytest.raises(SessionClosedError, match="Package path not found"):
            service()


# ------------------------------------------------------------ dependencies


def test_dependencies_are_installed_before_the_workers_start(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "tool", tool="VALUE = 'installed'")
    lines = ["# for the model", "", "--no-index", f"--find-links {tmp_path / 'wheels'}", "tool>=1"]
    with Runner("app", dependencies=lines) as rr:
        calls = [rr.service(imported)("tool"), rr.service(Importer).value("tool")]
        assert [call.get()[0] for call in calls] == ["installed"] * 2


class Importer:
    def value(self, name: str) -> Any:
        import importlib

        return importlib.import_module(name).VALUE, None


def test_a_set_of_dependencies_is_installed_once_for_all_runners(tmp_path: Path) -> None:
    source, note = tmp_path / "source", tmp_path / "note"
    sdist(source, note, tmp_path / "hold")
    for _ in range(2):
        with Runner("app", dependencies=["--no-index", f"--find-links {source}", "built"]) as rr:
            value, file = rr.service(imported)("built").get()
            assert value == "from source" and "envs" in file
    assert note.read_text() == "built\n"


def test_a_dependency_that_cannot_be_installed_fails_every_call_with_the_installers_words() -> None:
    with Runner("app", dependencies=["--no-index", "no-such-package-here"]) as rr:
        service = rr.service(one)
        with pytest.raises(
            TaskExecutionError, match="No matching distribution found for no-such-package-here"
        ):
            service().get()
        with pytest.raises(SessionClosedError, match="the dependencies could not be installed"):
            service()


# ------------------------------------------------------------ as a program


def test_a_class_of_the_program_itself_is_a_service(folder: Path, home: Path) -> None:
    (folder / "shapes.py").write_text("class Square:\n    def __init__(self, a): self.a = a\n")
    (folder / "app.py").write_text(
        "from flow_core import Runner\n"
        "import shapes\n"
        "class Area:\n"
        "    def of(self, shape):\n"
        "        import shapes\n"
        "        return shape.a ** 2, type(shape).__name__\n"
        "if __name__ == '__main__':\n"
        "    with Runner('app') as rr:\n"
        "        print(rr.service(Area).of(shapes.Square(3)).get())\n"
        "        print(rr.service(lambda shape: shape.a)(shapes.Square(4)).get())\n"
    )
    done = subprocess.run([sys.executable, "app.py"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("(9, 'Square')\n4\n", 0), done.stderr
    until(lambda: processes_under(home) == [])
