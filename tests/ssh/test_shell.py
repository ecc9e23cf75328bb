"""Commands and terminals beside a task on a host, by `task.shell` and by `flow ssh`."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flow_core import Flow, Task
from flow_core.errors import TaskNotFoundError, ValidationError
from tests.infra.lab import until
from tests.infra.ssh import Client, Machines, Sshd


def running(flow: Flow, command: str = "sleep 1000", **fields: object) -> Task:
    task = flow.run(f"echo ready; {command}", upload_code=False, **fields)  # type: ignore[arg-type]
    until(lambda: "ready" in task.logs(), f"{task}")
    return task


def test_a_command_runs_in_the_tasks_folder_with_its_environment_and_gives_its_exit_code(
    three: Flow, capfd: pytest.CaptureFixture[str]
) -> None:
    task = running(three, "echo made > here; sleep 1000", env={"MINE": "it's; $HOME"}, gpu="a100")
    until(lambda: task.shell("test -e here") == 0, "the file")
    assert (
        task.shell('cat here; echo "$MINE|$CUDA_VISIBLE_DEVICES|$FLOW_TASK_ID"; echo trouble >&2; exit 7')
        == 7
    )
    out, err = capfd.readouterr()
    assert out == f"made\nit's; $HOME|0|{task.task_id}\n"
    assert err == "trouble\n"
    task.cancel()


def test_a_command_that_a_signal_ends_gives_128_and_its_number(lo: Flow) -> None:
    task = running(lo)
    assert task.shell("kill -9 $$") == 137
    task.cancel()


def test_each_node_has_a_shell_of_its_own(three: Flow, capfd: pytest.CaptureFixture[str]) -> None:
    task = running(three, num_instances=3)
    for node in range(3):
        until(lambda node=node: "ready" in task.logs(node=node), "all nodes")  # type: ignore[misc]
        assert task.shell("hostname; echo $RANK", node=node) == 0
    assert capfd.readouterr().out.split() == [
        word for node in range(3) for word in (task.instances[node], str(node))
    ]
    assert task.shell("true", node=3) == 125
    assert "node=3 does not exist" in capfd.readouterr().err
    with pytest.raises(ValidationError, match="node=-1"):
        task.shell("true", node=-1)
    task.cancel()


def test_no_shell_opens_beside_what_does_not_run(lo: Flow, capfd: pytest.CaptureFixture[str]) -> None:
    task = lo.run("true", upload_code=False)
    task.wait(30)
    assert task.shell("true") == 125
    assert "is not running" in capfd.readouterr().err
    unknown = task.task_id[:-1] + "9"
    with pytest.raises(TaskNotFoundError):
        Task(lo.engine, unknown).shell("true")


# -- the command line


class Terminal:
    """`flow ssh` with a terminal of its own."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(80, 24)
        self.before = termios.tcgetattr(theirs)
        self.seen = ""
        self._theirs = theirs
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flow_core.cli", "ssh", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def expect(self, pattern: str, *, within_s: float = 30.0) -> re.Match[str]:
        deadline = time.monotonic() + within_s
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"waited for {pattern!r}, and saw:\n{self.seen}"
            if select.select([self.ours], [], [], 0.05)[0]:
                self.seen += os.read(self.ours, 65536).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found

    @property
    def restored(self) -> bool:
        return termios.tcgetattr(self._theirs) == self.before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for end in (self.ours, self._theirs):
            os.close(end)


@pytest.fixture
def environment(loopback_sshd: Sshd, ssh_client: Client, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "FLOW_CONFIG": "/dev/null",
        "FLOW_PROVIDER": "ssh",
        "FLOW_SSH_HOSTS": "lo",
        "FLOW_SSH_HOME": f"~/{tmp_path.name}",
        "FLOW_SSH_NOTES": str(tmp_path / "notes"),
        "TERM": "dumb",
    }


@pytest.fixture
def terminal(environment: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_(*arguments: str) -> Terminal:
        opened.append(Terminal(environment, *arguments))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


def test_a_terminal_carries_keys_sizes_and_signals_and_is_restored(
    lo: Flow, terminal: Callable[..., Terminal]
) -> None:
    task = running(lo, env={"MINE": "mine"})
    there = terminal(task.task_id)
    there.type("echo $((6*7)) $MINE $(tty | cut -c1-8)\n")
    there.expect(r"42 mine /dev/pts")
    there.type("stty size\n")
    there.expect(r"24 80")
    there.resize(132, 50)

    def new_size() -> bool:
        there.type("stty size\n")
        return there.expect(r"\n(\d+ \d+)\r")[1] == "50 132"

    until(new_size, "the new size")
    there.type("sleep 4322; echo after\n")
    until(lambda: subprocess.run(["pgrep", "-fx", "sleep 4322"], check=False).returncode == 0, "the command")
    there.type("\x03")
    until(lambda: subprocess.run(["pgrep", "-fx", "sleep 4322"], check=False).returncode == 1, "its end")
    there.type("echo still here\n")
    there.expect(r"still here\r\n")
    there.type("exit 5\n")
    assert there.process.wait(timeout=30) == 5
    assert there.restored
    task.cancel()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_is_restored_when_a_signal_ends_us(
    lo: Flow, terminal: Callable[..., Terminal], number: int
) -> None:
    task = running(lo)
    there = terminal(task.task_id)
    there.expect(r"[$#] ")
    there.type("echo here\n")
    there.expect(r"\nhere\r\n")
    there.process.send_signal(number)
    assert there.process.wait(timeout=30) == 128 + number
    assert there.restored
    task.cancel()


def flow_ssh(
    environment: dict[str, str], *arguments: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "flow_core.cli", "ssh", *arguments]
    return subprocess.run(command, env=environment, input=stdin, capture_output=True, check=False)


def test_one_word_is_a_line_and_several_are_an_argument_list(lo: Flow, environment: dict[str, str]) -> None:
    task = running(lo)
    assert flow_ssh(environment, task.task_id, "echo a  b | tr a-z A-Z; exit 3").stdout == b"A B\n"
    assert (
        flow_ssh(environment, task.task_id, "printf", "%s|", "a  b", "$HOME", "it's").stdout
        == b"a  b|$HOME|it's|"
    )
    assert flow_ssh(environment, "--node", "0", task.task_id, "ls", "-d", "--", "/tmp").stdout == b"/tmp\n"
    task.cancel()


def test_what_is_piped_in_arrives_whole_and_what_comes_out_does_too(
    lo: Flow, environment: dict[str, str]
) -> None:
    task = running(lo)
    data = os.urandom(3_000_000)
    done = flow_ssh(environment, task.task_id, "cat", stdin=data)
    assert (done.returncode, done.stdout == data) == (0, True)
    task.cancel()


def test_a_command_ends_when_we_do(lo: Flow, environment: dict[str, str], ssh_machines: Machines) -> None:
    task = running(lo)
    command = [sys.executable, "-m", "flow_core.cli", "ssh", task.task_id, "echo here; sleep 4321"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        process.kill()
    until(
        lambda: subprocess.run(["pgrep", "-f", "sleep 4321"], capture_output=True, check=False).stdout == b"",
        "its end",
    )
    task.cancel()


def test_an_unknown_task_is_told_in_words(environment: dict[str, str]) -> None:
    done = flow_ssh(environment, "no-such-0123456789abcdef-1", "true")
    assert done.returncode == 1
    assert done.stderr.decode().startswith(
        "flow: the ssh provider knows no task 'no-such-0123456789abcdef-1'"
    )
    assert b"Traceback" not in done.stderr
