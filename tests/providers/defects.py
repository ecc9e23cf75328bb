"""Defects to plant into the local provider: each breaks one sentence of the provider interface.

A pytest plugin (``-p tests.providers.defects``): the environment variable FLOW_DEFECT names the one to plant.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from flow_core.models import LogChunk, TaskStatus
from flow_core.providers import folder as folders
from flow_core.providers.local import LocalProvider
from flow_core.runner import machine
from flow_core.runner import task as records

P = pytest.MonkeyPatch


@dataclass(frozen=True)
class Defect:
    """`plant` breaks the provider; `sentence` is what it breaks; `caught_by` the test that must fail."""

    plant: Callable[[P], None]
    sentence: str
    caught_by: str


def runner(patch: P, file: str, good: str, bad: str) -> None:
    """Ship a runner in which one piece of text is another."""
    install = machine.install

    def installed(home: str, sources: dict[str, bytes]) -> str:
        target = install(home, sources)
        source = Path(target) / "flow_runner" / file
        text = source.read_text()
        assert good in text or bad in text, f"{file} has no {good!r} any more: renew the defect"
        source.write_text(text.replace(good, bad))
        return target

    patch.setattr(machine, "install", installed)


def wrap(patch: P, name: str, after: Callable[..., Any]) -> None:
    """Replace a provider's method by one that gets the original as its first argument."""
    original = getattr(LocalProvider, name)
    patch.setattr(LocalProvider, name, lambda *args, **kwargs: after(original, *args, **kwargs))


def existing(self: LocalProvider, task_id: str) -> list[Path]:
    """The folder of a task, if there is one."""
    try:
        return [Path(machine.existing(str(self.home), task_id))]
    except machine.Refused:
        return []


def start_twice(patch: P) -> None:
    runner(
        patch,
        "task.py",
        "    if fd is None:\n        return None\n",
        "    fd = fd or os.open(folder, os.O_RDONLY)\n",
    )
    runner(patch, "task.py", "        proc.unlock(fd)\n        return None\n", "        pass\n")

    def submit(original: Any, self: LocalProvider, spec: Any, *, task_id: str) -> None:
        original(self, spec, task_id=task_id)
        (folders.place(self.tasks, task_id) / "unclaimed").write_bytes(b" " * 512)
        original(self, spec, task_id=task_id)

    wrap(patch, "submit", submit)


def replace_an_existing_task(patch: P) -> None:
    def submit(original: Any, self: LocalProvider, spec: Any, *, task_id: str) -> None:
        shutil.rmtree(folders.place(self.tasks, task_id), ignore_errors=True)
        original(self, spec, task_id=task_id)

    wrap(patch, "submit", submit)


def leave_a_half_way_submit(patch: P) -> None:
    def submit(original: Any, self: LocalProvider, spec: Any, *, task_id: str) -> None:
        if not folders.place(self.tasks, task_id).parent.is_dir():
            original(self, spec, task_id=task_id)

    wrap(patch, "submit", submit)


def do_not_wait_for_the_attempt_before(patch: P) -> None:
    runner(patch, "main.py", 'if self.job.get("after"):', "if False:")


def accept_the_impossible(patch: P) -> None:
    patch.setattr("flow_core.providers.local_machine.Devices.check", lambda *_: None)


def split_arguments(patch: P) -> None:
    runner(patch, "ranks.py", 'return list(job["argv"])', 'return " ".join(job["argv"]).split()')


def find_the_first_attempt(patch: P) -> None:
    def attempts(home: str, digest: str) -> list[int]:
        return [1] if (Path(home) / "tasks" / digest / "1").is_dir() else []

    patch.setattr(machine, "attempts", attempts)


def list_the_oldest_first(patch: P) -> None:
    wrap(patch, "list", lambda original, self, *, limit: list(original(self, limit=limit))[::-1])


def leave_unknown_ids_out(patch: P) -> None:
    def poll(original: Any, self: LocalProvider, ids: Any) -> Any:
        return {one: seen for one, seen in original(self, ids).items() if seen.status is not TaskStatus.LOST}

    wrap(patch, "poll", poll)


def ignore_the_exit_code(patch: P) -> None:
    def poll(original: Any, self: LocalProvider, ids: Any) -> Any:
        ended = dict(original(self, ids))
        return {
            one: replace(seen, status=TaskStatus.COMPLETED) if seen.reason == "exit" else seen
            for one, seen in ended.items()
        }

    wrap(patch, "poll", poll)


def announce_the_end_of_a_log_too_early(patch: P) -> None:
    def read_log(original: Any, self: LocalProvider, task_id: str, **where: Any) -> Any:
        chunk = original(self, task_id, **where)
        return replace(chunk, end=chunk.end or (folders.place(self.tasks, task_id) / "exit.json").exists())

    wrap(patch, "read_log", read_log)


def read_many_logs_from_the_start(patch: P) -> None:
    def read_logs(original: Any, self: LocalProvider, wanted: Any, **how: Any) -> Any:
        chunks = original(self, [at._replace(offset=0) for at in wanted], **how)
        return {at: chunks[at._replace(offset=0)] for at in wanted if at._replace(offset=0) in chunks}

    wrap(patch, "read_logs", read_logs)


def let_a_flood_hold_up_the_others(patch: P) -> None:
    def read_logs(original: Any, self: LocalProvider, wanted: Any, *, limit: int = 65536) -> Any:
        chunks: dict[Any, Any] = {}
        for at in wanted:
            chunks |= original(self, [at], limit=max(1, limit))
            limit -= len(chunks[at].data)
        return chunks

    wrap(patch, "read_logs", read_logs)


def answer_for_the_logs_of_unknown_tasks(patch: P) -> None:
    def read_logs(original: Any, self: LocalProvider, wanted: Any, **how: Any) -> Any:
        return {at: LogChunk(b"", at.offset, end=False) for at in wanted} | original(self, wanted, **how)

    wrap(patch, "read_logs", read_logs)


def kill_the_first_process_alone(patch: P) -> None:
    runner(patch, "ranks.py", "os.killpg(self.pid, number)", "os.kill(self.pid, number)")
    runner(patch, "main.py", "proc.adopt_orphans()", "pass")
    runner(patch, "main.py", "_kill(pid)", "pass")


def forget_a_cancel_before_the_start(patch: P) -> None:
    def cancel(original: Any, self: LocalProvider, ids: Any) -> None:
        original(
            self, [one for one in ids if any((folder / "claimed").exists() for folder in existing(self, one))]
        )

    wrap(patch, "cancel", cancel)


def cancel_what_has_ended(patch: P) -> None:
    def cancel(original: Any, self: LocalProvider, ids: Any) -> None:
        original(self, ids)
        for one in ids:
            for folder in existing(self, one):
                if (folder / "exit.json").exists():
                    records.write_json(str(folder), "exit.json", records.exit_record("cancelled"))

    wrap(patch, "cancel", cancel)


def ask_politely_and_wait_for_ever(patch: P) -> None:
    runner(patch, "main.py", "rank.kill(signal.SIGKILL)", "pass")
    runner(patch, "main.py", "                _kill(pid)", "                pass")


def forget_the_time_limit(patch: P) -> None:
    runner(patch, "main.py", 'limit = self.job.get("max_run_time_s")', "limit = None")


def fetch_from_anywhere(patch: P) -> None:
    patch.setattr(
        machine, "locate", lambda home, task_id, name: Path(machine.place(home, task_id), name or "x")
    )


def locate_what_nobody_can_open(patch: P) -> None:
    wrap(patch, "locate", lambda original, self, *args: original(self, *args) + ".elsewhere")


def release_the_record_too(patch: P) -> None:
    patch.setattr(machine, "strip", shutil.rmtree)


def remember_in_this_process(patch: P) -> None:
    seen: dict[str, Any] = {}

    def poll(original: Any, self: LocalProvider, ids: Any) -> Any:
        fresh = original(self, [one for one in ids if one not in seen or not seen[one].status.final])
        seen.update({one: value for one, value in fresh.items() if value.status is not TaskStatus.LOST})
        return {one: fresh.get(one) or seen[one] for one in ids}

    wrap(patch, "poll", poll)


DEFECTS = {
    defect.plant.__name__: defect
    for defect in (
        Defect(start_twice, "starts at most once per id", "test_racing_threads_start_one_task"),
        Defect(replace_an_existing_task, "left as it is", "test_an_id_that_exists_is_left_as_it_is"),
        Defect(
            leave_a_half_way_submit,
            "a submit which died half-way is finished",
            "test_a_submit_that_was_killed",
        ),
        Defect(
            do_not_wait_for_the_attempt_before, "only when the last process …", "test_the_next_attempt_starts"
        ),
        Defect(accept_the_impossible, "SpecRejected: nothing exists now", "test_what_can_never_run"),
        Defect(split_arguments, "arrive unchanged", "test_arguments_and_variables_arrive_unchanged"),
        Defect(find_the_first_attempt, "the newest attempt", "test_find_returns_the_newest_attempt"),
        Defect(list_the_oldest_first, "the newest first", "test_list_returns_the_newest_first"),
        Defect(leave_unknown_ids_out, "exactly the ids asked for", "test_poll_answers_exactly"),
        Defect(ignore_the_exit_code, "exit codes decide", "test_the_exit_code_decides_the_status"),
        Defect(announce_the_end_of_a_log_too_early, "`end` is True only when …", "test_a_log_is_whole"),
        Defect(
            read_many_logs_from_the_start, "added since these positions", "test_many_logs_are_read_together"
        ),
        Defect(let_a_flood_hold_up_the_others, "nobody's flood holds up another", "test_who_has_much_to_say"),
        Defect(answer_for_the_logs_of_unknown_tasks, "is left out", "test_logs_that_cannot_be_read"),
        Defect(kill_the_first_process_alone, "until the last process is gone", "test_cancel_ends_the_whole"),
        Defect(
            forget_a_cancel_before_the_start, "also if it has not started", "test_cancel_right_after_submit"
        ),
        Defect(cancel_what_has_ended, "final ids are left alone", "test_cancel_is_idempotent"),
        Defect(
            ask_politely_and_wait_for_ever, "each of them will end", "test_cancel_ends_a_task_that_ignores"
        ),
        Defect(forget_the_time_limit, "the limit needs nobody", "test_the_time_limit_ends_a_task"),
        Defect(fetch_from_anywhere, "a path that leaves the folder", "test_fetch_does_not_leave_the_folder"),
        Defect(
            locate_what_nobody_can_open, "where tasks … can open a file", "test_another_task_opens_a_file"
        ),
        Defect(release_the_record_too, "status … stay readable", "test_release_frees_the_files"),
    )
}


def pytest_configure(config: pytest.Config) -> None:
    patch = pytest.MonkeyPatch()
    DEFECTS[os.environ["FLOW_DEFECT"]].plant(patch)
    config.add_cleanup(patch.undo)
