"""What every provider promises, as tests.

A provider's test is a subclass::

    class TestMyProvider(ProviderContract):
        @pytest.fixture
        def environment(self, tmp_path):            # what a process must have to reach the same back end
            return {"FLOW_PROVIDER": "mine", "MINE_HOME": str(tmp_path)}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flow_core import config, providers
from flow_core.engine import Engine
from flow_core.errors import ResourceNotFoundError, SpecRejected, TaskNotFoundError, ValidationError
from flow_core.ids import TaskId, digest, random_key
from flow_core.models import LogChunk, LogPosition, Snapshot, TaskConfig, TaskSpec, TaskStatus
from flow_core.providers.spi import Provider

#: Strings that a shell, a path, a URL or a JSON document could mangle.
NASTY = (
    "",
    " leading and trailing ",
    "a'b\"c`d$HOME\\n",
    "$(echo no) ; exit 9 && ! * ? [a] {b} ~ #c",
    "line\nbreak\ttab",
    "\u00fc\u4e16\U0001f600 \u202ertl",
    "--option=-1",
    "%s %d {} {0} \\u0041",
)


class ProviderContract:
    """What every provider promises, as tests. Each names the sentence of `flow_core.providers.spi` that it checks.

    The commands need a POSIX shell on the machine; `patience_s` is how long any of them may take to end.
    """

    patience_s: ClassVar[float] = 60.0

    @pytest.fixture
    def environment(self) -> Mapping[str, str]:
        """The variables with which any process reaches the back end under test."""
        pytest.fail("a provider's test overrides the fixture `environment`")

    @pytest.fixture
    def impossible(self) -> TaskSpec:
        """A spec that this provider can never run."""
        return self.spec("true", instance_type="64xh100", num_instances=8)

    @pytest.fixture
    def provider(self, environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        provider = providers.load(config.load())
        yield provider
        provider.cancel(provider.list(limit=1000))

    # -- helpers

    @staticmethod
    def spec(shell: str = "true", **fields: Any) -> TaskSpec:
        fields.setdefault("instance_type", "cpu")
        if "command" not in fields:
            fields["shell"] = shell
        return TaskSpec.from_config(TaskConfig(**fields))

    @staticmethod
    def new_id(name: str = "contract") -> str:
        return str(TaskId.first(name, random_key()))

    def start(self, provider: Provider, shell: str, **fields: Any) -> str:
        task_id = self.new_id()
        provider.submit(self.spec(shell, **fields), task_id=task_id)
        return task_id

    def until(self, what: str, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.patience_s
        while not seen():
            assert time.monotonic() < deadline, f"waited {self.patience_s:g} s for: {what}"
            time.sleep(0.02)

    def end(self, provider: Provider, task_id: str) -> Snapshot:
        self.until(f"the end of {task_id}", lambda: provider.poll([task_id])[task_id].status.final)
        return provider.poll([task_id])[task_id]

    def running(self, provider: Provider, task_id: str, word: str = "ready") -> None:
        """Wait until a task has printed a word."""
        self.until(f"{task_id} to print {word!r}", lambda: word.encode() in provider.read_log(task_id).data)

    def output(self, provider: Provider, task_id: str, *, node: int = 0, step: int = 65536) -> str:
        data, offset = b"", 0
        while True:
            chunk = provider.read_log(task_id, node=node, offset=offset, limit=step)
            assert len(chunk.data) <= step
            data, offset = data + chunk.data, chunk.next_offset
            if chunk.end:
                return data.decode()
            if not chunk.data:
                time.sleep(0.02)

    def file(self, provider: Provider, task_id: str, name: str, folder: Path) -> str:
        into = folder / f"fetched-{random_key()}"
        provider.fetch(task_id, name, into)
        return into.read_text()

    #: A command that leaves one line per start where it can be counted.
    COUNTED = 'echo start >> "$FLOW_TASK_DIR/starts"; echo ready'

    def process(self, environment: Mapping[str, str], code: str, *args: str) -> subprocess.Popen[str]:
        """Run Python code in a process of its own; `provider` is there."""
        head = (
            "import sys\nfrom flow_core import config, providers\nprovider = providers.load(config.load())\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(code), *args],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finished(self, process: subprocess.Popen[str]) -> str:
        """Wait for a process that must succeed; return what it printed."""
        out, err = process.communicate(timeout=self.patience_s)
        assert process.returncode == 0, err
        return out

    def submit_elsewhere(
        self, environment: Mapping[str, str], spec: TaskSpec, task_id: str
    ) -> subprocess.Popen[str]:
        code = """
        from flow_core.models import TaskSpec
        provider.submit(TaskSpec.model_validate_json(sys.argv[1]), task_id=sys.argv[2])
        """
        return self.process(environment, code, spec.model_dump_json(), task_id)

    # -- submit

    def test_a_submitted_task_runs_and_ends(self, provider: Provider) -> None:
        seen = self.end(provider, self.start(provider, "echo hello"))
        assert (seen.status, seen.exit_code, seen.reason) == (TaskStatus.COMPLETED, 0, "exit")
        assert self.output(provider, seen.task_id) == "hello\n"

    def test_a_task_starts_and_ends_without_its_submitter(
        self, provider: Provider, environment: Mapping[str, str]
    ) -> None:
        task_id = self.new_id()
        self.finished(self.submit_elsewhere(environment, self.spec("sleep 0.3; echo done"), task_id))
        assert self.end(provider, task_id).status is TaskStatus.COMPLETED
        assert self.output(provider, task_id) == "done\n"

    def test_an_id_that_exists_is_left_as_it_is(self, provider: Provider, tmp_path: Path) -> None:
        task_id = self.start(provider, self.COUNTED)
        provider.submit(self.spec("echo something else"), task_id=task_id)
        self.end(provider, task_id)
        provider.submit(self.spec("echo something else"), task_id=task_id)
        assert self.end(provider, task_id).status is TaskStatus.COMPLETED
        assert self.output(provider, task_id) == "ready\n"
        assert self.file(provider, task_id, "starts", tmp_path) == "start\n"

    def test_racing_threads_start_one_task(self, provider: Provider, tmp_path: Path) -> None:
        task_id, spec = self.new_id(), self.spec(self.COUNTED)
        threads = [
            threading.Thread(target=provider.submit, args=(spec,), kwargs={"task_id": task_id})
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self.end(provider, task_id).status is TaskStatus.COMPLETED
        time.sleep(0.1)  # a second runner would be late
        assert self.file(provider, task_id, "starts", tmp_path) == "start\n"

    def test_racing_processes_start_one_task(
        self, provider: Provider, environment: Mapping[str, str], tmp_path: Path
    ) -> None:
        task_id, spec = self.new_id(), self.spec(self.COUNTED)
        racers = [self.submit_elsewhere(environment, spec, task_id) for _ in range(4)]
        for racer in racers:
            self.finished(racer)
        assert self.end(provider, task_id).status is TaskStatus.COMPLETED
        assert self.file(provider, task_id, "starts", tmp_path) == "start\n"

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.8, 0.9])
    def test_a_submit_that_was_killed_half_way_is_finished_by_the_next(
        self, provider: Provider, environment: Mapping[str, str], tmp_path: Path, share: float
    ) -> None:
        task_id, spec = self.new_id(), self.spec(self.COUNTED)
        code = """
        import os, signal, time
        from flow_core.models import TaskSpec
        spec = TaskSpec.model_validate_json(sys.argv[1])
        events = 0
        def hook(name, _args):
            global events
            if name.split(".")[0] in ("open", "os", "subprocess", "fcntl", "socket", "shutil", "tempfile"):
                events += 1
                if events == int(sys.argv[3]):
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        provider.submit(spec, task_id=sys.argv[2])
        print(events)
        """
        provider.submit(spec, task_id=self.new_id())  # what is done once per home is done
        counted = self.process(environment, code, spec.model_dump_json(), self.new_id(), "-1")
        kill_at = max(1, int(int(self.finished(counted)) * share))
        victim = self.process(environment, code, spec.model_dump_json(), task_id, str(kill_at))
        victim.communicate(timeout=self.patience_s)
        provider.submit(spec, task_id=task_id)
        assert self.end(provider, task_id).status is TaskStatus.COMPLETED
        time.sleep(0.1)
        assert self.file(provider, task_id, "starts", tmp_path) == "start\n"

    def test_the_next_attempt_starts_when_the_last_process_of_the_one_before_is_gone(
        self, provider: Provider
    ) -> None:
        first = TaskId.first("contract", random_key())
        lingering = "trap 'sleep 0.6; date +%s%N; exit 1' TERM; echo ready; while :; do sleep 0.05; done"
        provider.submit(self.spec(lingering), task_id=str(first))
        self.running(provider, str(first))
        provider.cancel([str(first)])
        provider.submit(self.spec("date +%s%N"), task_id=str(first.next()))
        assert self.end(provider, str(first.next())).status is TaskStatus.COMPLETED
        gone = int(self.output(provider, str(first)).split()[-1])
        assert int(self.output(provider, str(first.next()))) >= gone

    def test_what_can_never_run_is_rejected_and_leaves_nothing(
        self, provider: Provider, impossible: TaskSpec
    ) -> None:
        task_id = self.new_id()
        with pytest.raises(SpecRejected):
            provider.submit(impossible, task_id=task_id)
        assert provider.find(TaskId.parse(task_id).digest) is None
        assert provider.poll([task_id])[task_id].status is TaskStatus.LOST

    def test_arguments_and_variables_arrive_unchanged(self, provider: Provider) -> None:
        env = {f"NASTY_{index}": value for index, value in enumerate(NASTY)}
        show = f"import json,os,sys; print(json.dumps([sys.argv[1:], [os.environ[name] for name in {list(env)}]]))"
        task_id = self.new_id()
        provider.submit(self.spec(command=["python3", "-c", show, *NASTY], env=env), task_id=task_id)
        assert self.end(provider, task_id).status is TaskStatus.COMPLETED, self.output(provider, task_id)
        assert json.loads(self.output(provider, task_id)) == [list(NASTY), list(NASTY)]

    def test_every_node_runs_and_knows_its_rank(self, provider: Provider) -> None:
        task_id = self.start(
            provider,
            'echo "$FLOW_NODE_RANK/$FLOW_NUM_NODES ${FLOW_MAIN_IP:+main} ${MASTER_PORT:+port}"',
            num_instances=3,
        )
        assert self.end(provider, task_id).status is TaskStatus.COMPLETED
        assert [self.output(provider, task_id, node=node) for node in range(3)] == [
            f"{node}/3 main port\n" for node in range(3)
        ]

    def test_one_failed_node_fails_the_task_and_ends_the_others(self, provider: Provider) -> None:
        task_id = self.start(provider, 'test "$FLOW_NODE_RANK" = 1 && exit 5; sleep 100', num_instances=2)
        seen = self.end(provider, task_id)
        assert (seen.status, seen.exit_code) == (TaskStatus.FAILED, 5)

    # -- find and list

    def test_find_returns_the_newest_attempt(self, provider: Provider) -> None:
        key = random_key()
        assert provider.find(digest(key)) is None
        first = TaskId.first("contract", key)
        for one in (first, first.next()):
            provider.submit(self.spec("exit 1"), task_id=str(one))
            self.end(provider, str(one))
            assert provider.find(digest(key)) == str(one)

    def test_list_returns_the_newest_first_and_no_more_than_asked(self, provider: Provider) -> None:
        ids = [self.start(provider, "true") for _ in range(3)]
        assert list(provider.list(limit=100))[:3] == ids[::-1]
        assert list(provider.list(limit=2)) == ids[:0:-1]

    # -- poll

    def test_poll_answers_exactly_what_was_asked(self, provider: Provider) -> None:
        here, other, nobody = self.start(provider, "true"), self.start(provider, "true"), self.new_id()
        asked = [here, nobody, "no-id-of-ours", "../../etc/passwd", ""]
        seen = provider.poll(asked)
        assert set(seen) == set(asked) and other not in seen
        assert {one for one in asked if seen[one].status is TaskStatus.LOST} == set(asked) - {here}
        assert dict(provider.poll([])) == {}

    @pytest.mark.parametrize("code", [0, 1, 7, 126, 255])
    def test_the_exit_code_decides_the_status(self, provider: Provider, code: int) -> None:
        seen = self.end(provider, self.start(provider, f"exit {code}"))
        assert (seen.status is TaskStatus.COMPLETED) == (code == 0)
        assert (seen.status.final, seen.exit_code, seen.reason) == (True, code, "exit")

    def test_a_killed_command_has_failed_and_the_signal_is_named(self, provider: Provider) -> None:
        seen = self.end(provider, self.start(provider, "kill -9 $$"))
        assert (seen.status, seen.signal, seen.reason) == (TaskStatus.FAILED, 9, "killed")

    def test_a_command_that_does_not_exist_has_failed_and_is_named(self, provider: Provider) -> None:
        task_id = self.new_id()
        provider.submit(self.spec(command=["no-such-command-anywhere"]), task_id=task_id)
        seen = self.end(provider, task_id)
        assert seen.status is TaskStatus.FAILED
        assert "no-such-command-anywhere" in seen.message + self.output(provider, task_id)

    def test_times_are_in_order_and_memory_is_measured(self, provider: Provider) -> None:
        seen = self.end(provider, self.start(provider, "sleep 0.2"))
        assert seen.submitted_at is not None and seen.started_at is not None and seen.ended_at is not None
        assert seen.submitted_at <= seen.started_at <= seen.ended_at
        assert 0.2 <= (seen.ended_at - seen.started_at).total_seconds() < 10
        assert seen.peak_memory_bytes is not None and seen.peak_memory_bytes > 100_000

    def test_a_running_task_is_seen_running(self, provider: Provider) -> None:
        task_id = self.start(provider, "echo ready; sleep 100")
        self.running(provider, task_id)
        assert provider.poll([task_id])[task_id].status is TaskStatus.RUNNING

    def test_the_time_limit_ends_a_task_with_or_without_its_submitter(
        self, provider: Provider, environment: Mapping[str, str]
    ) -> None:
        spec = self.spec("sleep 100 & sleep 100").model_copy(update={"max_run_time_s": 0.3})
        here, alone = self.new_id(), self.new_id()
        provider.submit(spec, task_id=here)
        self.finished(self.submit_elsewhere(environment, spec, alone))
        for task_id in (here, alone):
            seen = self.end(provider, task_id)
            assert (seen.status, seen.reason) == (TaskStatus.FAILED, "time-limit")

    # -- read_log

    @pytest.mark.parametrize("step", [1, 3, 4096])
    def test_a_log_is_whole_in_pieces_of_any_size(self, provider: Provider, step: int) -> None:
        text = "\u4e16\u754c \U0001f680 no newline at the end"
        task_id = self.start(provider, f"printf '%s' '{text}'")
        self.end(provider, task_id)  # all of it is there, and the end must not be announced before it is read
        assert self.output(provider, task_id, step=step) == text

    def test_the_end_of_a_log_is_announced_after_the_last_byte_alone(self, provider: Provider) -> None:
        task_id = self.start(provider, "echo ready; sleep 0.3; seq 1 2000; printf last")
        self.running(provider, task_id)
        before = time.monotonic()
        chunk = provider.read_log(task_id, offset=6)
        assert (chunk.data, chunk.end) == (b"", False)
        assert time.monotonic() - before < 5
        assert (
            self.output(provider, task_id) == "ready\n" + "".join(f"{n}\n" for n in range(1, 2001)) + "last"
        )

    def test_a_negative_offset_counts_from_the_end(self, provider: Provider) -> None:
        task_id = self.start(provider, "printf abcdef")
        self.end(provider, task_id)
        assert provider.read_log(task_id, offset=-2).data == b"ef"
        assert provider.read_log(task_id, offset=-100).data == b"abcdef"

    def test_the_log_of_an_unknown_task_is_an_error(self, provider: Provider) -> None:
        for unknown in (self.new_id(), "no-id-of-ours"):
            with pytest.raises(TaskNotFoundError):
                provider.read_log(unknown)

    # -- read_logs

    def test_many_logs_are_read_together_each_byte_once(self, provider: Provider) -> None:
        one, two = (self.start(provider, f"seq {first} {first + 400}; printf end") for first in (1, 5000))
        pair = self.start(provider, 'echo "node $FLOW_NODE_RANK"; sleep 0.2; echo done', num_instances=2)
        places = [(one, 0), (two, 0), (pair, 0), (pair, 1)]
        said, offsets, ended = dict.fromkeys(places, b""), dict.fromkeys(places, 0), set[tuple[str, int]]()

        def read_on() -> bool:
            wanted = [LogPosition(*place, offsets[place]) for place in places if place not in ended]
            chunks = provider.read_logs(wanted, limit=1500)
            assert set(chunks) == set(wanted)
            for at, chunk in chunks.items():
                place = at.task_id, at.node
                assert chunk.next_offset == at.offset + len(chunk.data)
                said[place], offsets[place] = said[place] + chunk.data, chunk.next_offset
                if chunk.end:
                    ended.add(place)
            return len(ended) == len(places)

        self.until("the end of all logs", read_on)
        assert {place: data.decode() for place, data in said.items()} == {
            place: self.output(provider, place[0], node=place[1]) for place in places
        }
        assert said[one, 0].endswith(b"401\nend") and said[pair, 1] == b"node 1\ndone\n"

    def test_who_has_much_to_say_leaves_the_others_their_part(self, provider: Provider) -> None:
        flood = self.start(provider, "seq 1 20000")
        quiet = [self.start(provider, f"echo quiet {number}") for number in range(3)]
        for task_id in (flood, *quiet):
            self.end(provider, task_id)
        for wanted in ([flood, *quiet], [*quiet, flood]):
            chunks = provider.read_logs([LogPosition(task_id) for task_id in wanted], limit=400)
            assert [chunks[LogPosition(task_id)].data for task_id in quiet] == [
                f"quiet {number}\n".encode() for number in range(3)
            ]
            assert 20 <= len(chunks[LogPosition(flood)].data) <= 400
            assert sum(len(chunk.data) for chunk in chunks.values()) <= 400
            assert not chunks[LogPosition(flood)].end

    def test_logs_that_cannot_be_read_are_left_out_and_the_others_are_there(self, provider: Provider) -> None:
        live = self.start(provider, "echo ready; sleep 100")
        self.running(provider, live)
        nobody = [LogPosition(self.new_id()), LogPosition("no-id-of-ours", 0, 3)]
        chunks = provider.read_logs([nobody[0], LogPosition(live), nobody[1], LogPosition(live, 0, 6)])
        assert chunks == {
            LogPosition(live): LogChunk(b"ready\n", 6, end=False),
            LogPosition(live, 0, 6): LogChunk(b"", 6, end=False),
        }
        assert provider.read_logs(nobody) == {}

    # -- cancel

    def test_cancel_ends_the_whole_process_group(self, provider: Provider) -> None:
        beat = 'while :; do echo x >> "$FLOW_TASK_DIR/beats"; sleep 0.02; done'
        beat = f"({beat}) & setsid sh -c '{beat}' & echo ready; wait"
        task_id = self.start(provider, beat)
        self.running(provider, task_id)
        provider.cancel([task_id])
        seen = self.end(provider, task_id)
        assert (seen.status, seen.reason) == (TaskStatus.CANCELLED, "cancelled")
        sizes = []
        for _ in range(2):
            sizes.append(self._beats(provider, task_id))
            time.sleep(0.15)
        assert sizes[0] == sizes[1], "something of the task still runs"

    @staticmethod
    def _beats(provider: Provider, task_id: str) -> int:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            into = Path(folder) / "beats"
            provider.fetch(task_id, "beats", into)
            return into.stat().st_size

    def test_cancel_ends_a_task_that_ignores_the_wish(self, provider: Provider) -> None:
        task_id = self.start(provider, "trap '' TERM; echo ready; while :; do sleep 0.1; done")
        self.running(provider, task_id)
        provider.cancel([task_id])
        assert provider.poll([task_id])[task_id].reason in ("cancelling", "cancelled")
        assert self.end(provider, task_id).status is TaskStatus.CANCELLED

    def test_cancel_right_after_submit_ends_the_task(self, provider: Provider) -> None:
        for _ in range(5):
            task_id = self.start(provider, "sleep 100")
            provider.cancel([task_id])
            assert self.end(provider, task_id).status is TaskStatus.CANCELLED

    def test_cancel_is_idempotent_and_leaves_final_and_unknown_tasks_alone(self, provider: Provider) -> None:
        done, live = self.start(provider, "true"), self.start(provider, "sleep 100")
        before = self.end(provider, done)
        for _ in range(2):
            provider.cancel([done, live, self.new_id(), "no-id-of-ours"])
        assert self.end(provider, live).status is TaskStatus.CANCELLED
        assert provider.poll([done])[done] == before

    # -- fetch

    def test_fetch_brings_a_file_and_says_when_there_is_none(
        self, provider: Provider, tmp_path: Path
    ) -> None:
        task_id = self.start(provider, 'printf content > "$FLOW_TASK_DIR/made"')
        self.end(provider, task_id)
        assert self.file(provider, task_id, "made", tmp_path) == "content"
        into = tmp_path / "into"
        into.write_text("before")
        with pytest.raises(ResourceNotFoundError):
            provider.fetch(task_id, "not-made", into)
        assert into.read_text() == "before"
        with pytest.raises(TaskNotFoundError):
            provider.fetch(self.new_id(), "made", into)

    @pytest.mark.parametrize("path", ["../spec.json", "/etc/passwd", "a/../../../x", "", "way-out"])
    def test_fetch_does_not_leave_the_folder(self, provider: Provider, tmp_path: Path, path: str) -> None:
        task_id = self.start(provider, 'ln -s /etc/passwd "$FLOW_TASK_DIR/way-out"')
        self.end(provider, task_id)
        with pytest.raises(ValidationError):
            provider.fetch(task_id, path, tmp_path / "into")
        assert not (tmp_path / "into").exists()

    def test_another_task_opens_a_file_where_it_is_located(self, provider: Provider) -> None:
        made = self.start(
            provider, 'printf content > "$FLOW_TASK_DIR/made"; ln -s /etc/passwd "$FLOW_TASK_DIR/out"'
        )
        self.end(provider, made)
        path = provider.locate(made, "made")
        if path is None:
            return  # no other task can: it is fetched and sent along
        reader = self.start(provider, "", command=["cat", path])
        self.end(provider, reader)
        assert self.output(provider, reader) == "content"
        for name in ("not-made", "../spec.json", "out"):
            with pytest.raises((ResourceNotFoundError, ValidationError)):
                provider.locate(made, name)

    # -- release

    def test_release_frees_the_files_and_keeps_the_record(self, provider: Provider, tmp_path: Path) -> None:
        task_id = self.start(provider, 'echo x > "$FLOW_TASK_DIR/made"; exit 3')
        live = self.start(provider, "echo ready; sleep 100")
        self.running(provider, live)
        before = self.end(provider, task_id)
        for _ in range(2):
            provider.release([task_id, live, self.new_id(), "no-id-of-ours"])
        after = provider.poll([task_id])[task_id]
        assert (after.status, after.exit_code, after.ended_at, after.reason) == (
            before.status,
            3,
            before.ended_at,
            "released",
        )
        chunk = provider.read_log(task_id)
        assert (chunk.data, chunk.end) == (b"", True)
        with pytest.raises(ResourceNotFoundError):
            provider.fetch(task_id, "made", tmp_path / "into")
        assert provider.poll([live])[live].status is TaskStatus.RUNNING

    def test_a_released_success_is_run_again(self, provider: Provider) -> None:
        engine, key = Engine(provider), random_key()
        first = engine.submit(self.spec("true"), key=key)
        self.end(provider, first)
        assert engine.submit(self.spec("true"), key=key) == first
        provider.release([first])
        second = engine.submit(self.spec("true"), key=key)
        assert TaskId.parse(second) == TaskId.parse(first).next()

    # -- nothing is held in this process

    def test_another_process_follows_collects_and_cancels(
        self, provider: Provider, environment: Mapping[str, str], tmp_path: Path
    ) -> None:
        task_id = self.start(provider, 'echo ready; echo made > "$FLOW_TASK_DIR/made"; sleep 100')
        code = """
        import time
        from pathlib import Path
        while b"ready" not in provider.read_log(sys.argv[1]).data:
            time.sleep(0.02)
        assert provider.poll([sys.argv[1]])[sys.argv[1]].status.value == "running"
        assert sys.argv[1] in provider.list(limit=10)
        while True:
            try:
                provider.fetch(sys.argv[1], "made", Path(sys.argv[2]))
                break
            except Exception as error:
                time.sleep(0.02)
        provider.cancel([sys.argv[1]])
        """
        other = self.process(environment, code, task_id, str(tmp_path / "into"))
        self.finished(other)
        assert self.end(provider, task_id).status is TaskStatus.CANCELLED
        assert (tmp_path / "into").read_text() == "made\n"

    def test_instances_can_be_asked_for(self, provider: Provider) -> None:
        for one in provider.find_instances():
            assert one.instance_type and one.gpu_count >= 0
