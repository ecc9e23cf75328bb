"""A call that goes on in a fork of its runner: to the function, and to who waits, it is a new Python like any other.

The other kind, a Python of its own, is what a call gets whose variables mean something to an interpreter.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flow_core import Flow, TaskStatus
from flow_core.errors import (
    RemoteExecutionError,
    ResourceNotFoundError,
    TaskExecutionError,
    WorkerDiedError,
)
from flow_core.runner.spawn import Gate
from tests.conftest import processes_under
from tests.providers import defects

APART = {"PYTHONNOTHING": "1"}  # means nothing, but who knows


@pytest.fixture
def flow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flow:
    monkeypatch.chdir(tmp_path)
    return Flow("local")


def write(text: str) -> Path:
    path = Path("module.py")
    path.write_text(text)
    return path


LOOK = '''
import atexit, faulthandler, gc, inspect, io, locale, os, resource, signal, site, sys, threading, warnings


def look():
    """Everything that a process can know about how it was started."""
    main = sys.modules["__main__"]
    handlers = {}
    for number in sorted(signal.valid_signals()):
        handler = signal.getsignal(number)
        handlers[str(int(number))] = getattr(handler, "__name__", str(handler))
    streams = [
        [s.encoding, s.errors, s.line_buffering, s.write_through, s.fileno(), s.mode, s.isatty()]
        for s in (sys.stdin, sys.stdout, sys.stderr)
    ]
    files = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink("/proc/self/fd/" + fd)
        except FileNotFoundError:
            continue
        files[fd] = [os.path.basename(target), os.get_inheritable(int(fd))]
    status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    return {
        "flags": list(sys.flags),
        "path": [part.replace(os.environ["FLOW_TASK_DIR"], "TASK") for part in sys.path],
        "argv": sys.argv,
        "arguments": getattr(sys, "orig_argv", []),
        "executable": [sys.executable, sys.prefix, sys.base_prefix, sys.exec_prefix],
        "main": [main.__name__, main.__file__, str(main.__spec__), sorted(vars(main))],
        "stack": [[frame.function, os.path.basename(frame.filename)] for frame in inspect.stack()],
        "handlers": handlers,
        "masks": [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
        "streams": streams,
        "input": sys.stdin.read(),
        "files": files,
        "faulthandler": faulthandler.is_enabled(),
        "process": [os.getpid() == os.getpgid(0), os.getpid() == os.getsid(0), os.getcwd().rpartition("/")[2]],
        "parent": open("/proc/%d/cmdline" % os.getppid()).read().count("call.py"),
        "threads": [threading.active_count(), len(os.listdir("/proc/self/task"))],
        "locale": [locale.getpreferredencoding(), sys.getfilesystemencoding(), locale.setlocale(locale.LC_CTYPE)],
        "site": [site.ENABLE_USER_SITE, site.getusersitepackages()],
        "warnings": [sys.warnoptions, len(warnings.filters)],
        "gc": [gc.isenabled(), list(gc.get_threshold()), gc.get_debug()],
        "limits": [sys.getrecursionlimit(), sys.getswitchinterval(), sys.dont_write_bytecode],
        "hooks": [str(sys.meta_path), len(sys.path_hooks), sys.excepthook is sys.__excepthook__, sys.gettrace()],
        "atexit": atexit._ncallbacks(),
        "exception": str(sys.exc_info()[1]),
        "umask": os.umask(0o77),
        "rlimits": [list(resource.getrlimit(which)) for which in range(16)],
        "environment": sorted(
            [name, value.replace(os.environ["FLOW_TASK_DIR"], "TASK").replace(os.environ["FLOW_TASK_ID"], "ID")]
            for name, value in os.environ.items()
            if name != "PYTHONNOTHING"
        ),
        "ours": sorted(name for name in sys.modules if "flow" in name and name.partition(".")[0] != "flow_runner"),
    }
'''


def test_a_function_finds_everything_as_in_a_python_of_its_own(flow: Flow) -> None:
    module = write(LOOK)
    forked: dict[str, Any] = flow.invoke(module, "look", env={"MINE": "a b"})
    apart: dict[str, Any] = flow.invoke(module, "look", env={"MINE": "a b", **APART})
    for name, value in apart.items():
        assert forked[name] == value, name
    assert ["MINE", "a b"] in forked["environment"]


def test_it_is_a_fork_of_its_runner_unless_a_variable_means_something_to_an_interpreter(flow: Flow) -> None:
    module = write("def line():\n    return open('/proc/self/cmdline').read().split('\\0')[1:-1]\n")
    assert len(flow.invoke(module, "line")) > 1, "the runner's own command line"
    for name in ("PYTHONPATH", "LD_PRELOAD"):
        assert len(flow.invoke(module, "line", env={name: ""})) == 1


def test_variables_for_an_interpreter_take_effect(flow: Flow, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "found.py").write_text("X = 7\n")
    module = write("import sys\n\ndef f():\n    import found\n    return [found.X, sys.flags.optimize]\n")
    env = {"PYTHONPATH": str(tmp_path / "elsewhere"), "PYTHONOPTIMIZE": "1"}
    assert flow.invoke(module, "f", env=env) == [7, 1]


def test_what_is_installed_for_editing_can_be_imported(flow: Flow) -> None:
    module = write("def f():\n    import flow_core\n    return flow_core.__file__\n")
    assert flow.invoke(module, "f") == sys.modules["flow_core"].__file__


def test_variables_of_the_system_reach_the_c_library_too(flow: Flow) -> None:
    module = write(
        "import time\n\ndef f():\n    return [time.tzname[0], time.strftime('%Z', time.localtime(0))]\n"
    )
    assert flow.invoke(module, "f", env={"TZ": "Asia/Tokyo"}) == ["JST", "JST"]


def test_a_function_starts_processes_of_multiprocessing_in_every_way(flow: Flow) -> None:
    module = write(
        "import multiprocessing\n\n"
        "def square(x):\n    return x * x\n\n"
        "def f(method):\n"
        "    with multiprocessing.get_context(method).Pool(2) as pool:\n        return pool.map(square, range(5))\n"
    )
    for method in ("spawn", "fork", "forkserver"):
        assert flow.invoke(module, "f", [method]) == [0, 1, 4, 9, 16]


def test_a_call_on_two_nodes_has_two_forks_that_know_their_rank(flow: Flow) -> None:
    module = write(
        "import os\n\ndef f():\n    print(os.environ['RANK'], os.getpid() == os.getsid(0))\n    return 1\n"
    )
    task = flow.invoke_async(module, "f", num_instances=2)
    assert task.get_result(60) == 1
    assert [task.logs(node=node) for node in (0, 1)] == ["0 True\n", "1 True\n"]


# -- ends


def test_all_that_python_does_at_its_end_is_done(flow: Flow) -> None:
    module = write(
        "import atexit, sys, threading, time\n\n"
        "class Noisy:\n    def __del__(self):\n        print('deleted')\n\n"
        "noisy = Noisy()\n"
        "notes = open('notes', 'w')\n\n"
        "def late():\n    time.sleep(0.1)\n    print('thread')\n\n"
        "def f():\n"
        "    atexit.register(print, 'atexit')\n"
        "    threading.Thread(target=late).start()\n"
        "    threading.Thread(target=time.sleep, args=[1000], daemon=True).start()\n"
        "    notes.write('buffered')\n"
        "    sys.stdout.write('no newline ')\n"
        "    return 1\n"
    )
    task = flow.invoke_async(module, "f")
    assert task.get_result(60) == 1
    assert task.logs() == "no newline thread\natexit\ndeleted\n"
    assert task._engine.collect(task.task_id, "work/notes") == b"buffered"


@pytest.mark.parametrize(
    ("ending", "exit_code", "number"),
    [("os._exit(3)", 3, None), ("os._exit(0)", 0, None), ("os.abort()", None, signal.SIGABRT)],
)
def test_an_end_without_a_value_is_told_as_it_was(
    flow: Flow, ending: str, exit_code: int | None, number: int | None
) -> None:
    module = write(f"import os\n\ndef f():\n    print('before')\n    {ending}\n")
    task = flow.invoke_async(module, "f")
    with pytest.raises(TaskExecutionError):
        task.get_result(60)
    seen = task.snapshot
    assert seen.signal == number
    assert exit_code is None or seen.exit_code == exit_code
    assert task.logs().startswith("before\n")


def test_a_crash_in_native_code_leaves_the_python_stack_in_the_log(flow: Flow) -> None:
    module = write("import ctypes\n\ndef f():\n    ctypes.string_at(0)\n")
    task = flow.invoke_async(module, "f")
    with pytest.raises(TaskExecutionError, match="SIGSEGV"):
        task.get_result(60)
    assert "Fatal Python error: Segmentation fault" in task.logs()
    assert '/module.py", line 4 in f' in task.logs()


@pytest.mark.parametrize("code", ["", "0", "'a reason'"])
def test_a_system_exit_is_no_value(flow: Flow, code: str) -> None:
    module = write(f"import sys\n\ndef f():\n    sys.exit({code})\n")
    with pytest.raises(RemoteExecutionError, match="SystemExit"):
        flow.invoke(module, "f")


def test_an_interrupt_is_an_exception_there_as_in_any_python(flow: Flow) -> None:
    module = write(
        "import os, signal\n\n"
        "def f():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n        signal.pause()\n"
        "    except KeyboardInterrupt:\n        return 'interrupted'\n"
    )
    assert flow.invoke(module, "f") == "interrupted"


def test_a_traceback_shows_no_frame_of_the_runner(flow: Flow) -> None:
    module = write("def f():\n    raise ValueError('no')\n")
    with pytest.raises(RemoteExecutionError) as caught:
        flow.invoke(module, "f")
    assert str(caught.value.remote_traceback).count("File ") == 1
    task = flow.list_tasks()[0]
    assert task.logs().count("File ") == 1


# -- beginnings


def test_a_folder_to_work_in_that_is_not_there_is_told_before_anything_runs(flow: Flow) -> None:
    module = write("def f():\n    return 1\n")
    task = flow.invoke_async(module, "f", working_dir="nowhere")
    with pytest.raises(TaskExecutionError, match="could not start"):
        task.get_result(60)
    assert (task.status, task.snapshot.reason) == (TaskStatus.FAILED, "start-failed")


def test_a_thread_that_a_start_up_file_has_started_is_there(home: Path, tmp_path: Path) -> None:
    """A fork would be without it, so the call gets a Python of its own."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = tmp_path / "venv" / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (tmp_path / "venv" / "bin").mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    python.symlink_to(sys.executable)
    (tmp_path / "venv" / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    (packages / "all.pth").write_text("".join(f"{part}\n" for part in sys.path if part))
    thread = "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()"
    (packages / "thread.pth").write_text(f"import threading, time; {thread}\n")
    module = tmp_path / "module.py"
    module.write_text("import threading\n\ndef f():\n    return threading.active_count()\n")
    code = (
        "import threading; here = threading.active_count()\n"
        f"from flow_core import Flow; print(here > 1, Flow('local').invoke({str(module)!r}, 'f') == here)"
    )
    assert (
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
        == "True True\n"
    )


def test_the_function_does_not_run_when_the_runner_is_killed_before_its_guard_stands(
    flow: Flow, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defects.runner(
        monkeypatch, "main.py", "        self.mark_start(granted)  # while", "        _kill(os.getpid())  #"
    )
    module = write("def f():\n    open('ran', 'w')\n")
    task = flow.invoke_async(module, "f")
    with pytest.raises(WorkerDiedError):
        task.get_result(60)
    with pytest.raises(ResourceNotFoundError):
        task._engine.collect(task.task_id, "work/ran")
    deadline = time.monotonic() + 30
    while processes_under(home) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes_under(home)


def test_who_waits_at_a_gate_goes_through_when_it_opens_and_ends_when_nobody_is_left_to_open_it() -> None:
    for opened, code in ((True, 0), (False, 127)):
        gate = Gate()
        gate.waiting = 1
        pid = os.fork()
        if pid == 0:
            gate.enter()
            os._exit(0)
        if opened:
            gate.open()
        else:
            os.close(gate._outside)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
