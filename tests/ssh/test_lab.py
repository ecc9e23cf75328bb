"""The lab leaves nothing behind, and says so where it cannot be made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.infra import lab as labs
from tests.infra import packages
from tests.infra.fixtures import install
from tests.infra.lab import Lab

CHECKOUT = Path(__file__).parents[2]


def started_elsewhere(code: str) -> subprocess.Popen[str]:
    """A process with a lab of its own, which has printed the lab's folder and the pid of something that runs in it."""
    head = """
    import os, signal, sys, time
    from tests.infra.lab import Lab
    lab = Lab()
    print(lab.folder, lab.start("sleep", "1000", log=lab.folder / "log"), flush=True)
    """
    code = textwrap.dedent(head) + code
    return subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str]) -> tuple[Path, int]:
    assert process.stdout is not None
    folder, pid = process.stdout.readline().split()
    return Path(folder), int(pid)


def test_a_killed_test_run_leaves_no_process_and_no_file(lab: Lab) -> None:
    with started_elsewhere("time.sleep(1000)") as run:
        folder, pid = told(run)
        assert folder.exists() and labs.alive(pid)
        run.kill()
    labs.until(lambda: not labs.alive(pid) and not folder.exists(), "the end of the lab")


def test_what_a_killed_lab_leaves_is_removed_by_the_next(lab: Lab) -> None:
    with started_elsewhere("os.kill(lab.init, signal.SIGKILL); time.sleep(1000)") as run:
        folder, pid = told(run)
        labs.until(lambda: not labs.alive(pid), "the end of the lab")
        run.kill()
    assert folder.exists()

    def swept() -> bool:
        Lab().close()
        return not folder.exists()

    labs.until(swept, "the removal")  # at the first try, unless the dead lab's parent is still about to exit
    assert lab.folder.exists()  # the living are left alone


def test_a_closed_lab_leaves_no_mount_and_no_network(lab: Lab) -> None:
    other = Lab()
    other.close()
    assert str(other.folder) not in Path("/proc/self/mountinfo").read_text()
    assert not other.folder.exists() and not labs.alive(other.init)


def test_without_root_tests_are_left_out_and_in_ci_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="left out: it takes root"):
        install(packages.SSH)
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="it takes root"):
        install(packages.SSH)


def test_at_the_end_a_contributor_is_told_what_was_left_out(lab: Lab) -> None:
    code = "import os, sys, pytest; os.geteuid = lambda: 1000; sys.exit(pytest.main(sys.argv[1:]))"
    tests = ["-q", "-p", "no:cacheprovider", "tests/ssh/test_machines.py"]
    environ = {name: value for name, value in os.environ.items() if name != "CI"}
    run = subprocess.run(
        [sys.executable, "-c", code, *tests],
        cwd=CHECKOUT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "9 tests were left out: it takes root" in run.stdout


def test_what_is_missing_is_named_where_there_is_no_apt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(packages.Unavailable, match="no-such-program: not installed, and there is no apt-get"):
        packages.install(packages.Needs(("no-such-program",), ("no-such-package",)))


def test_signals_reach_every_process_of_a_namespace(lab: Lab) -> None:
    isolate = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    launcher = lab.start(*isolate, "sh", "-c", "sleep 100 & sleep 100 & wait", log=lab.folder / "signals.log")
    init = labs.child_of(launcher)
    labs.until(lambda: len(labs.namespace_members(init)) == 3, "three processes")
    labs.signal_all(init, signal.SIGKILL)
    labs.until(lambda: not labs.alive(init) and not labs.alive(launcher), "their end")
