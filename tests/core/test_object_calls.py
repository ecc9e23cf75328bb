"""References through calls: results that stay where they are, and later calls that get them, in any process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from flow_core import Flow, InvokeTask, calls, config, objects
from flow_core.errors import (
    ObjectError,
    ObjectNotFoundError,
    ResultError,
    TaskExecutionError,
    ValidationError,
)
from flow_core.models import TaskSpec
from flow_core.object_ref import ObjectRef, TaskFile
from flow_core.providers.local import LocalProvider
from flow_core.runner.strict_json import from_json
from tests.core.conftest import Machine

MODULE = """
import hashlib, os, types

def make(n):
    return {"numbers": list(range(n))}

def text(n):
    return "x" * n

def raw(n):
    return b"\\xff" * n

def code():
    return lambda: 5

def total(data, extra=None):
    return sum(data["numbers"]) + sum(sum(one["numbers"]) for one in (extra or {}).get("deep", []))

def echo(*values, **named):
    return [values, named]

def length(value):
    return len(value)

def same(a, b):
    return a is b[0]["b"]

def seen():
    return sorted(os.listdir(os.environ["FLOW_TASK_DIR"]))

def call_it(function):
    return function()
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "module's; file.py"
    path.write_text(MODULE)
    return path


@pytest.fixture
def flow(home: Path) -> Flow:
    return Flow("local")


def folder_of(flow: Flow, task_id: str) -> Path:
    assert isinstance(flow.provider, LocalProvider)
    return Path(flow.provider.locate(task_id, "spec.json")).parent


# ------------------------------------------------------------ results


def test_a_result_by_reference_is_a_small_dict_and_the_next_call_gets_the_value(
    flow: Flow, module: Path
) -> None:
    ref = flow.invoke(module, "make", args=[100_000], result="ref")
    assert type(ref) is ObjectRef
    assert ref.place == TaskFile("local", ref.uri.split("/")[3], "result")
    assert flow.invoke(module, "total", args=[ref]) == sum(range(100_000))
    stored = json.loads(json.dumps(ref))  # as an XCom
    assert flow.invoke(
        module, "total", args=[{"numbers": []}], kwargs={"extra": {"deep": [stored, ref]}}
    ) == 2 * sum(range(100_000))
    assert objects.get(stored) == {"numbers": list(range(100_000))}


def test_a_large_result_has_a_file_of_its_own_and_is_taken_either_way(flow: Flow, module: Path) -> None:
    task = flow.invoke_async(module, "text", args=[3_000_000])
    ref = task.ref(60)
    assert isinstance(ref.place, TaskFile) and ref.place.file == "result.data"
    assert (folder_of(flow, task.task_id) / "result").stat().st_size < 300
    assert task.get_result() == objects.get(ref) == "x" * 3_000_000
    assert InvokeTask.from_id(task.task_id, result="ref").get_result() == ref
    assert InvokeTask.from_id(task.task_id).get_result() == "x" * 3_000_000
    again = flow.get_task(task.task_id)
    assert isinstance(again, InvokeTask) and again.ref() == ref


def test_the_settings_say_from_which_size_on_a_result_stays(home: Path, module: Path) -> None:
    flow = Flow("local", objects={"reference_over_bytes": 1000})
    assert flow.invoke(module, "text", args=[998]) == "x" * 998  # and its quotes
    ref = flow.invoke(module, "text", args=[999])
    assert type(ref) is ObjectRef and ref.size_bytes == 1001
    assert flow.invoke(module, "text", args=[999], result="value") == "x" * 999
    assert type(flow.invoke(module, "text", args=[1], result="ref")) is ObjectRef
    with pytest.raises(ValidationError, match="result='maybe'"):
        flow.invoke(module, "text", args=[1], result="maybe")


def test_a_result_over_the_limit_is_named_with_the_option_and_goes_by_reference(
    flow: Flow, module: Path
) -> None:
    eleven_mb = 11 * 1024 * 1024
    with pytest.raises(ResultError, match="at most 10,485,760 can travel.*result='ref'"):
        flow.invoke(module, "text", args=[eleven_mb])
    ref = flow.invoke(module, "text", args=[eleven_mb], result="ref")
    assert ref.size_bytes == eleven_mb + 2
    assert flow.invoke(module, "length", args=[ref]) == eleven_mb


def test_a_pickle_over_the_limit_is_not_lost(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PICKLE_LIMIT_BYTES", 2_000_000)
    task = flow.call_async(bytes, [3_000_000])
    with pytest.raises(
        ResultError, match="takes 3,000,.* bytes as pickle; at most 2,000,000 travel by value"
    ) as caught:
        task.get_result(60)
    assert "task.ref()" in str(caught.value) and "result='ref'" in str(caught.value)
    assert flow.call_async(len, [task.ref()]).get_result(60) == 3_000_000


def test_a_failure_is_a_failure_by_reference_too(flow: Flow, module: Path) -> None:
    task = flow.invoke_async(module, "make", args=["x"], result="ref")
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        task.ref(60)
    with pytest.raises(TypeError):
        task.get_result()


# ------------------------------------------------------------ arguments


def halve(value: Any) -> Any:
    return value / 2


class Batch:
    def __init__(self, data: Any) -> None:
        self.data = data


def mean_of(batch: Batch, factor: float = 1.0) -> float:
    return float(batch.data.mean() * factor)


def test_arrays_go_from_call_to_call_without_passing_through_here(flow: Flow) -> None:
    first = flow.call_async(np.full, [(500, 500), 8.0], result="ref").get_result(60)
    second = flow.call_async(halve, [first], result="ref").get_result(60)
    assert second.size_bytes > 2_000_000
    assert np.array_equal(objects.get(second, allow_pickle=True), np.full((500, 500), 4.0))


def overwrite(data: Any) -> float:
    data[:] = 7
    return float(data.sum())


def test_a_function_that_writes_into_its_argument_changes_nobody_elses(flow: Flow) -> None:
    ref = objects.put(np.ones(1_000_000), codec="pickle")
    assert flow.call_async(overwrite, [ref]).get_result(60) == 7_000_000
    assert objects.get(ref, allow_pickle=True).sum() == 1_000_000


def test_a_reference_is_found_wherever_a_live_call_refers_to_it(flow: Flow) -> None:
    ref = objects.put(np.ones(10), codec="pickle")
    factor = objects.put(3.0)
    assert flow.call_async(mean_of, [Batch(ref)], {"factor": dict(factor)}).get_result(60) == 3.0

    def closes_over() -> float:
        return float(ref.sum())  # type: ignore[attr-defined]  # there it is the array

    assert flow.call_async(closes_over).get_result(60) == 10.0


def test_one_reference_given_twice_is_one_value(flow: Flow, module: Path) -> None:
    ref = objects.put([1, 2])
    assert flow.invoke(module, "same", args=[ref, [{"b": dict(ref)}]]) is True


def test_json_bytes_and_what_stands_for_itself_arrive_as_they_are(flow: Flow, module: Path) -> None:
    values = [{"a": [None, 1.5]}, "é", [], 0]
    refs = [objects.put(value) for value in values]
    assert flow.invoke(module, "echo", args=refs, kwargs={"x": refs[0]}) == [values, {"x": values[0]}]
    assert flow.invoke(module, "length", args=[objects.put(b"\xff" * 5)]) == 5


def test_a_pickle_needs_the_word_of_whoever_calls(flow: Flow, module: Path) -> None:
    ref = objects.put({1, 2, 3}, codec="pickle")
    with pytest.raises(ObjectError, match="which is a pickle") as caught:
        flow.invoke(module, "length", args=[ref])
    assert 'serialization="pickle"' in str(caught.value)
    assert flow.invoke(module, "length", args=[ref], serialization="pickle") == 3
    assert flow.list_tasks()[1:] == []  # nothing was started for the first


def test_a_named_call_returns_any_value_by_pickle(flow: Flow, module: Path) -> None:
    assert flow.invoke(module, "raw", args=[5], serialization="pickle") == b"\xff" * 5
    ref = flow.invoke(module, "raw", args=[3_000_000], serialization="pickle", result="ref")
    assert flow.invoke(module, "length", args=[ref], serialization="pickle") == 3_000_000


def test_an_array_that_comes_back_is_the_callers_own_to_write_to(flow: Flow, module: Path) -> None:
    module.write_text("def zeros(size):\n    import numpy\n    return numpy.zeros(size)\n")
    array = flow.invoke(module, "zeros", args=[100_000], serialization="pickle")
    array[0] = 1
    assert array.sum() == 1


def test_a_pickle_with_code_is_loaded_by_a_machine_without_cloudpickle(flow: Flow, module: Path) -> None:
    number = 4
    ref = objects.put(lambda: number + 1, codec="pickle")
    assert flow.invoke(module, "call_it", args=[ref], serialization="pickle") == 5


def test_what_is_no_reference_after_all_is_refused_before_anything_starts(flow: Flow, module: Path) -> None:
    with pytest.raises(ValidationError, match="is damaged"):
        flow.invoke(module, "echo", args=[{"flow/ref": 1, "uri": "x"}])
    ref = objects.put("x")
    objects.delete(ref)
    with pytest.raises(ObjectNotFoundError, match="there is no object"):
        flow.invoke(module, "echo", args=[ref])
    assert flow.list_tasks() == []


# ------------------------------------------------------------ other processes, later

SUBMITS = """
import json, sys
from flow_core import Flow
print(json.dumps(Flow("local").invoke(sys.argv[1], "text", args=[2_000_000], result="ref")))
"""


def test_a_reference_works_after_the_process_that_made_it_is_gone(flow: Flow, module: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUBMITS, str(module)], capture_output=True, text=True, check=True
    )
    ref = json.loads(done.stdout)
    assert flow.invoke(module, "length", args=[ref]) == 2_000_000
    assert len(objects.get(ref)) == 2_000_000


def test_what_a_released_or_unknown_task_returned_is_said_to_be_gone(flow: Flow, module: Path) -> None:
    task = flow.invoke_async(module, "text", args=[5])
    ref = task.ref(60)
    kept = objects.put(ref)
    task.release()
    with pytest.raises(ObjectNotFoundError, match="was released by the host") as caught:
        objects.get(ref)
    assert "put(ref)" in str(caught.value) and "Run the task again" in str(caught.value)
    with pytest.raises(ObjectNotFoundError, match="was released by the host"):
        flow.invoke(module, "length", args=[ref])
    assert flow.invoke(module, "length", args=[kept]) == 5
    unknown = {**ref, "uri": "flow+task://local/gone-0123456789abcdef-1/result"}
    with pytest.raises(ObjectNotFoundError, match="is not known to the local provider"):
        objects.get(unknown)
    with pytest.raises(ValidationError, match="Release the task"):
        objects.delete(ref)


def test_a_retry_adopts_its_task_although_what_that_was_given_is_gone(flow: Flow, module: Path) -> None:
    ref = objects.put("abc")
    first = flow.invoke_async(module, "length", args=[ref], idempotency_key="k")
    assert first.get_result(60) == 3
    objects.delete(ref)
    again = flow.invoke_async(module, "length", args=[ref], idempotency_key="k")
    assert (again.task_id, again.get_result(60)) == (first.task_id, 3)
    with pytest.raises(ObjectNotFoundError):
        flow.invoke_async(module, "length", args=[ref], idempotency_key="another")


def test_a_value_is_linked_into_the_call_and_outlives_the_task_that_made_it(flow: Flow, module: Path) -> None:
    made = flow.invoke_async(module, "text", args=[2_000_000])
    ref = made.ref(60)
    inode = (folder_of(flow, made.task_id) / "result.data").stat().st_ino
    used = flow.invoke_async(module, "length", args=[ref])
    made.release()
    assert used.get_result(60) == 2_000_000
    assert (folder_of(flow, used.task_id) / "inputs" / "0").stat().st_ino == inode
    used.release()
    assert not (folder_of(flow, used.task_id) / "inputs").exists()


# ------------------------------------------------------------ damage


def test_a_damaged_result_is_an_error_for_whoever_reads_it_and_for_the_next_call(
    flow: Flow, module: Path
) -> None:
    task = flow.invoke_async(module, "text", args=[2_000_000])
    ref = task.ref(60)
    with open(folder_of(flow, task.task_id) / "result.data", "r+b") as file:
        file.write(b'"y')
    with pytest.raises(ResultError, match="its hash is another"):
        task.get_result()
    with pytest.raises(TaskExecutionError, match=re.escape(f"the value of the reference {ref.uri}")):
        flow.invoke(module, "length", args=[ref])
    (folder_of(flow, task.task_id) / "result.data").unlink()
    with pytest.raises(ResultError, match="has no such file"):
        task.get_result()


def test_a_result_file_that_names_another_file_is_damaged(flow: Flow, module: Path) -> None:
    task = flow.invoke_async(module, "text", args=[2_000_000])
    path = folder_of(flow, task.task_id)
    task.wait(60)
    head = (path / "result").read_bytes().replace(b"result.data", b"../job.json")
    (path / "result").write_bytes(head)
    with pytest.raises(ResultError, match="the result file is damaged"):
        task.get_result()


# ------------------------------------------------------------ providers


class Elsewhere(LocalProvider):
    """A provider whose machines have another file system than this process."""

    shares_files: ClassVar[bool] = False
    sees: ClassVar[bool] = False

    def __init__(self, settings: config.Settings) -> None:
        super().__init__(settings)
        self.specs: list[TaskSpec] = []

    def submit(self, spec: TaskSpec, *, task_id: str) -> None:
        self.specs.append(spec)
        super().submit(spec, task_id=task_id)

    def locate(self, task_id: str, path: str) -> str:
        return super().locate(task_id, path) if self.sees else None  # type: ignore[return-value]

    def read(self, task_id: str, path: str) -> bytes:
        return Path(LocalProvider.locate(self, task_id, path)).read_bytes()

    def fetch(self, task_id: str, path: str, into: Path) -> None:
        into.write_bytes(self.read(task_id, path))


class Cluster(Elsewhere):
    """Machines that see each other's task folders, and shared folders."""

    sees: ClassVar[bool] = True


def inputs_of(spec: TaskSpec) -> tuple[list[str], list[dict[str, Any]]]:
    sent = [file.name for file in spec.files if file.name.startswith("inputs/")]
    (envelope,) = (file.data for file in spec.files if file.name == "call.json")
    assert envelope is not None
    return sent, from_json(envelope).get("inputs", [])


def test_a_machine_elsewhere_is_sent_the_values(home: Path, module: Path, tmp_path: Path) -> None:
    shared = f"file://{tmp_path}/shared"
    provider = Elsewhere(config.load())
    flow = Flow(provider, objects={"trusted": [shared]})
    result = flow.invoke_async(module, "text", args=[2_000_000]).ref(60)
    mine = objects.put("abc")
    assert flow.invoke(module, "echo", args=[mine, mine]) == [["abc", "abc"], {}]
    assert inputs_of(provider.specs[-1])[0] == ["inputs/0"]
    assert flow.invoke(module, "length", args=[result]) == 2_000_000
    sent, listed = inputs_of(provider.specs[-1])
    assert sent == ["inputs/0"] and listed[0]["file"] == "inputs/0" and "path" not in listed[0]
    assert list(config.load().objects.home.glob(".new-*")) == []


def test_a_value_that_the_machine_can_open_stays_where_it_is(
    home: Path, module: Path, tmp_path: Path
) -> None:
    shared = f"file://{tmp_path}/shared"
    provider = Cluster(config.load())
    flow = Flow(provider, objects={"storage": shared})
    result = flow.invoke_async(module, "text", args=[2_000_000]).ref(60)
    common = objects.put("abc", storage=shared)
    assert flow.invoke(module, "echo", args=[common, objects.put("mine")]) == [["abc", "mine"], {}]
    sent, listed = inputs_of(provider.specs[-1])
    assert sent == ["inputs/1"] and listed[0]["path"] == common.uri.removeprefix("file://")
    assert flow.invoke(module, "length", args=[result]) == 2_000_000
    sent, listed = inputs_of(provider.specs[-1])
    assert sent == [] and listed[0]["path"].endswith("/result.data")


def test_a_container_sees_only_its_own_folder_so_the_value_is_in_it(
    flow: Flow, module: Path, tmp_path: Path
) -> None:
    shared = f"file://{tmp_path}/shared"
    ref = objects.put("abc", storage=shared)
    reached = objects.Objects(config.load(objects={"trusted": [shared]}), flow.engine)
    with reached.inputs([ref], provider="local", contained=True, allow_pickle=False) as inputs:
        assert [file.name for file in inputs.files] == ["inputs/0"]
    with reached.inputs([ref], provider="local", contained=False, allow_pickle=False) as inputs:
        assert inputs.files == () and "path" in inputs.listed[0]


# ------------------------------------------------------------ the runner


def test_the_runner_opens_what_the_call_lists_and_nothing_else(each: Machine, home: Path) -> None:
    """On every Python that functions may run on."""
    given, other = objects.put({"numbers": [1, 2]}), objects.put("other")
    each.put("train.py", MODULE)
    (each.task / "inputs").mkdir()
    (each.task / "inputs" / "0").write_bytes(Path(given.uri.removeprefix("file://")).read_bytes())
    one = {
        "uri": given.uri,
        "sha256": given.sha256,
        "size": given.size_bytes,
        "codec": "json",
        "file": "inputs/0",
    }
    done = each.run("train.py", "echo", args=[given, {"x": [other]}], more={"inputs": [one]})
    assert done.value == [[{"numbers": [1, 2]}, {"x": [dict(other)]}], {}]


def test_every_python_writes_and_reads_a_pickle_by_reference(each: Machine, home: Path) -> None:
    ref = objects.put({"numbers": (1, 2), "raw": b"\xff" * 100_000}, codec="pickle")
    path = ref.uri.removeprefix("file://")
    one = {"uri": ref.uri, "sha256": ref.sha256, "size": ref.size_bytes, "codec": "pickle", "path": path}
    each.put("train.py", MODULE + "\ndef double(x):\n    return [x, bytearray(x['raw'])] * 20\n")
    done = each.run("train.py", "double", args=[ref], codec="pickle", more={"inputs": [one]})
    value = done.value
    assert value[0] == {"numbers": (1, 2), "raw": b"\xff" * 100_000} and value[1] == b"\xff" * 100_000
    os.unlink(path)
    record = each.run("train.py", "double", args=[ref], more={"inputs": [one]}).record
    assert (record["type"], record["module"].rpartition(".")[2]) == ("ObjectMissing", "objects")
    assert "is not there any more" in record["message"]
