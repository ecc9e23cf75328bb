"""FlowResource in ops and assets of one process: values, metadata, failures, and plain calls without Dagster."""

import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
import pytest

from flow_core import Flow, TaskConfig, TaskStatus
from flow_core.errors import FlowError, FlowTimeoutError, RemoteExecutionError, SerializationError
from flow_dagster import FlowResource

WORK = Path(__file__).parent / "remote" / "work.py"


def metadata_of(result: dg.ExecuteInProcessResult, name: str) -> dict[str, Any]:
    [event] = result.asset_materializations_for_node(name)
    return {key: value.value for key, value in event.metadata.items()}


def failure_of(result: dg.ExecuteInProcessResult, step: str) -> dg.DagsterEvent:
    [event] = [event for event in result.all_events if event.is_step_failure and event.step_key == step]
    return event


# -- without Dagster


def test_a_plain_call_returns_the_value(flow: FlowResource) -> None:
    assert flow.invoke(None, WORK, "add", [1], {"b": 2}) == 3


def test_an_imported_module_travels_as_its_file(flow: FlowResource, tmp_path: Path) -> None:
    module = ModuleType("work")
    module.__file__ = str(WORK)
    assert flow.invoke(None, module, "add", [1]) == 1
    assert flow.invoke(None, module, "add", [1], code_root=str(WORK.parent)) == 1


def test_a_plain_command_returns_how_it_ended(flow: FlowResource, capfd: pytest.CaptureFixture[str]) -> None:
    result = flow.run(None, "echo hello; echo world")
    assert (result.status, result.exit_code, result.log_tail) == (TaskStatus.COMPLETED, 0, "hello\nworld\n")
    assert result.metadata["flow/gpu"] == "a100"
    assert capfd.readouterr().out == "hello\nworld\n"


def test_a_plain_failure_carries_the_engines_error(flow: FlowResource) -> None:
    with pytest.raises(dg.Failure, match="Remote execution failed: ValueError: bad value") as caught:
        flow.invoke(None, WORK, "fail")
    assert isinstance(caught.value.__cause__, RemoteExecutionError)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_handle_can_be_asked_waited_for_and_cancelled(flow: FlowResource, folder: Path) -> None:
    handle = flow.invoke_async(None, WORK, "count_until", [str(folder), str(folder / "gate")])
    with pytest.raises(FlowTimeoutError, match=handle.task_id):
        handle.wait(timeout=0.1)
    assert not handle.status.final
    handle.cancel()
    assert handle.status is TaskStatus.CANCELLED
    with pytest.raises(dg.Failure, match="cancelled"):
        handle.result()


def test_a_handle_of_a_command_results_in_its_end(flow: FlowResource) -> None:
    handle = flow.submit(None, ["printf", "%s", "a b"])
    assert handle.result().log_tail == "a b"
    assert handle.result() == handle.wait()
    assert handle.logs() == "a b"


def test_a_whole_config_is_run_as_it_is(flow: FlowResource) -> None:
    config = TaskConfig(
        name="mine", command="echo $GREETING", env={"GREETING": "hi"}, instance_type="cpu", upload_code=False
    )
    result = flow.run(None, config)
    assert (result.log_tail, result.metadata["flow/gpu_count"]) == ("hi\n", 0)
    assert result.task_id.startswith("mine-")


def test_only_the_code_root_travels_with_a_command(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "hello.sh").write_text("echo from the code root\n")
    assert FlowResource().run(None, "ls -A | wc -l").log_tail.strip() == "0"
    with_code = FlowResource(code_root=str(tmp_path / "code"))
    assert with_code.run(None, "sh hello.sh").log_tail == "from the code root\n"


# -- in assets and ops


def test_an_asset_has_the_value_and_the_metadata(flow: FlowResource) -> None:
    @dg.asset
    def accuracy(context: dg.AssetExecutionContext, flow: FlowResource) -> int:
        value = flow.invoke(context, WORK, "add", [1], {"b": 2})
        assert isinstance(value, int)
        return value

    result = dg.materialize([accuracy], resources={"flow": flow})
    assert result.output_for_node("accuracy") == 3
    shown = metadata_of(result, "accuracy")
    assert (shown["flow/provider"], shown["flow/status"], shown["flow/exit_code"]) == (
        "local",
        "completed",
        0,
    )
    assert (shown["flow/gpu"], shown["flow/gpu_count"], shown["flow/attempts"]) == ("a100", 1, 1)
    assert shown["flow/duration_seconds"] > 0
    assert shown["flow/queue_seconds"] >= 0
    assert "flow/reattached" not in shown
    assert not any(value is None for value in shown.values())
    task = Flow().get_task(shown["flow/task_id"])
    assert task.snapshot.labels["dagster/run_id"] == result.run_id
    assert task.snapshot.labels["dagster/step"] == "accuracy"


def test_metadata_joins_what_the_asset_says_itself(flow: FlowResource) -> None:
    @dg.asset
    def accuracy(context: dg.AssetExecutionContext, flow: FlowResource) -> dg.MaterializeResult[Any]:
        return dg.MaterializeResult(metadata={"sum": flow.invoke(context, WORK, "add", [1])})

    shown = metadata_of(dg.materialize([accuracy], resources={"flow": flow}), "accuracy")
    assert (shown["sum"], shown["flow/exit_code"]) == (1, 0)


def test_two_calls_of_a_step_are_two_tasks_and_shown_together(flow: FlowResource) -> None:
    @dg.asset
    def both(context: dg.AssetExecutionContext, flow: FlowResource) -> list[int]:
        return [flow.invoke(context, WORK, "add", [number]) for number in (1, 2)]

    result = dg.materialize([both], resources={"flow": flow})
    assert result.output_for_node("both") == [1, 2]
    shown = metadata_of(result, "both")
    assert (shown["flow/tasks"], shown["flow/failed_tasks"]) == (2, 0)
    assert len(Flow().list_tasks()) == 2


def test_every_asset_of_a_multi_asset_shows_the_tasks(flow: FlowResource) -> None:
    @dg.multi_asset(outs={"one": dg.AssetOut(), "two": dg.AssetOut()})
    def both(context: dg.AssetExecutionContext, flow: FlowResource) -> tuple[int, int]:
        return flow.invoke(context, WORK, "add", [1]), flow.invoke(context, WORK, "add", [2])

    result = dg.materialize([both], resources={"flow": flow})
    shown = [event.metadata["flow/tasks"].value for event in result.asset_materializations_for_node("both")]
    assert shown == [2, 2]


def test_the_same_asset_run_again_runs_again(flow: FlowResource) -> None:
    @dg.asset
    def accuracy(context: dg.AssetExecutionContext, flow: FlowResource) -> None:
        flow.run(context, "true")

    with dg.instance_for_test() as instance:
        for _ in range(2):
            assert dg.materialize([accuracy], resources={"flow": flow}, instance=instance).success
    assert len(Flow().list_tasks()) == 2


def test_an_op_and_a_fan_out_pass_values_on(flow: FlowResource) -> None:
    @dg.op(out=dg.DynamicOut(int))
    def numbers() -> list[dg.DynamicOutput[int]]:
        return [dg.DynamicOutput(number, mapping_key=f"n{number}") for number in (1, 2)]

    @dg.op
    def added(context: dg.OpExecutionContext, flow: FlowResource, number: int) -> int:
        value = flow.invoke(context, WORK, "add", [number], {"b": 10})
        assert isinstance(value, int)
        return value

    @dg.job(resource_defs={"flow": flow})
    def fan_out() -> None:
        numbers().map(added)

    result = fan_out.execute_in_process()
    assert result.output_for_node("added") == {"n1": 11, "n2": 12}


def test_an_asset_check_can_call_too(flow: FlowResource) -> None:
    @dg.asset
    def number() -> int:
        return 1

    @dg.asset_check(asset=number)
    def adds_up(context: dg.AssetCheckExecutionContext, flow: FlowResource) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=flow.invoke(context, WORK, "add", [1], {"b": 1}) == 2)

    result = dg.materialize([number, adds_up], resources={"flow": flow})
    assert [check.passed for check in result.get_asset_check_evaluations()] == [True]


def test_an_op_is_testable_with_a_built_context(flow: FlowResource) -> None:
    @dg.op
    def added(context: dg.OpExecutionContext, flow: FlowResource) -> list[int]:
        return [flow.invoke(context, WORK, "add", [number]) for number in (1, 2)]

    context = dg.build_op_context()
    assert added(context, flow=flow) == [1, 2]
    shown = context.get_output_metadata("result")
    assert shown is not None
    assert shown["flow/exit_code"] == 0


def test_the_output_of_the_task_is_the_output_of_the_step(
    flow: FlowResource, capfd: pytest.CaptureFixture[str]
) -> None:
    @dg.asset
    def talks(context: dg.AssetExecutionContext, flow: FlowResource) -> None:
        flow.run(context, "printf 'line 1\\nline 2 \\303\\274'")

    dg.materialize([talks], resources={"flow": flow})
    assert "line 1\nline 2 ü\n" in capfd.readouterr().out


# -- failures


def test_a_failing_function_fails_the_step_with_its_traceback_and_metadata(flow: FlowResource) -> None:
    @dg.asset
    def broken(context: dg.AssetExecutionContext, flow: FlowResource) -> None:
        flow.invoke(context, WORK, "fail", ["loss is NaN"])

    result = dg.materialize([broken], resources={"flow": flow}, raise_on_error=False)
    assert not result.success
    failed = failure_of(result, "broken").step_failure_data
    assert failed.user_failure_data is not None
    said = failed.user_failure_data.description
    assert said is not None
    assert said.startswith("Remote execution failed: ValueError: loss is NaN")
    assert "work.py" in said
    assert "in fail" in said
    assert "before the failure" in said
    shown = {key: value.value for key, value in failed.user_failure_data.metadata.items()}
    assert (shown["flow/status"], shown["flow/gpu"], shown["flow/attempts"]) == ("failed", "a100", 1)
    assert shown["flow/exit_code"] != 0
    assert isinstance(shown["flow/duration_seconds"], float)


def test_a_failing_command_fails_the_step_with_its_exit_code(flow: FlowResource) -> None:
    @dg.asset
    def broken(context: dg.AssetExecutionContext, flow: FlowResource) -> None:
        flow.run(context, "echo last words; exit 7")

    result = dg.materialize([broken], resources={"flow": flow}, raise_on_error=False)
    failed = failure_of(result, "broken").step_failure_data.user_failure_data
    assert failed is not None
    assert failed.metadata["flow/exit_code"].value == 7
    assert "last words" in (failed.description or "")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda flow, context: flow.invoke(context, WORK, "add", [1], gpu="nvidia-a100"), "nvidia-a100"),
        (lambda flow, context: flow.invoke(context, WORK, "add", [{1, 2}]), "Cannot serialize arguments"),
        (lambda flow, context: flow.invoke(context, WORK, "add", [1], gpu="8xa100"), "8"),
        (lambda flow, context: flow.invoke(context, WORK, "unserializable"), "model"),
        (lambda flow, context: flow.invoke(context, WORK, "add", [1], gpus="a100"), "gpus"),
        (lambda flow, context: flow.map(context, WORK, "add", [1], max_parallel=0), "max_parallel=0"),
    ],
    ids=["gpu name", "arguments", "too many gpus", "result", "keyword", "max_parallel"],
)
def test_what_can_never_succeed_is_not_retried(flow: FlowResource, call: Any, says: str) -> None:
    tries: list[int] = []

    @dg.op(retry_policy=dg.RetryPolicy(max_retries=2))
    def broken(context: dg.OpExecutionContext, flow: FlowResource) -> None:
        tries.append(context.retry_number)
        call(flow, context)

    @dg.job(resource_defs={"flow": flow})
    def job() -> None:
        broken()

    result = job.execute_in_process(raise_on_error=False)
    assert tries == [0]
    failed = failure_of(result, "broken").step_failure_data.user_failure_data
    assert failed is not None
    assert says in (failed.description or "")


def test_a_retry_after_a_failure_is_the_next_attempt(flow: FlowResource, folder: Path) -> None:
    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
    def second_time_lucky(context: dg.AssetExecutionContext, flow: FlowResource) -> None:
        flow.run(context, f"test -e '{folder}/again' || {{ touch '{folder}/again'; exit 1; }}")

    result = dg.materialize([second_time_lucky], resources={"flow": flow})
    shown = metadata_of(result, "second_time_lucky")
    assert (shown["flow/attempts"], shown["flow/reattached"]) == (2, False)


def test_a_retry_takes_over_what_has_succeeded(flow: FlowResource, folder: Path) -> None:
    tries: list[int] = []

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
    def clumsy(context: dg.AssetExecutionContext, flow: FlowResource) -> int:
        made = flow.invoke(context, WORK, "count", [str(folder)])
        tries.append(context.retry_number)
        if not context.retry_number:
            raise RuntimeError("after the task, in Dagster")
        assert isinstance(made, int)
        return made

    result = dg.materialize([clumsy], resources={"flow": flow})
    assert tries == [0, 1]
    assert result.output_for_node("clumsy") == 1
    assert len(list(folder.iterdir())) == 1
    assert metadata_of(result, "clumsy")["flow/reattached"] is True


# -- map


def test_map_returns_the_values_in_order(flow: FlowResource) -> None:
    @dg.asset
    def sums(context: dg.AssetExecutionContext, flow: FlowResource) -> list[int]:
        return flow.map(context, WORK, "add", range(4), kwargs={"b": 100})

    result = dg.materialize([sums], resources={"flow": flow})
    assert result.output_for_node("sums") == [100, 101, 102, 103]
    shown = metadata_of(result, "sums")
    assert (shown["flow/tasks"], shown["flow/failed_tasks"], shown["flow/gpu_count"]) == (4, 0, 1)


def test_map_of_nothing_is_nothing(flow: FlowResource) -> None:
    assert flow.map(None, WORK, "add", []) == []


def test_map_of_equal_items_runs_each(flow: FlowResource) -> None:
    assert flow.map(None, WORK, "add", [1, 1, 1]) == [1, 1, 1]
    assert len(Flow().list_tasks()) == 3


def test_map_runs_every_item_and_then_names_those_that_failed(flow: FlowResource) -> None:
    @dg.asset
    def doubled(context: dg.AssetExecutionContext, flow: FlowResource) -> None:
        flow.map(context, WORK, "double_or_fail", [1, 3, 5, 6])

    result = dg.materialize([doubled], resources={"flow": flow}, raise_on_error=False)
    failed = failure_of(result, "doubled").step_failure_data.user_failure_data
    assert failed is not None
    said = failed.description or ""
    assert said.startswith("2 of 4 items failed:\n  [1] ")
    assert "3 divides by three" in said
    assert "6 divides by three" in said
    assert "in double_or_fail" in said
    assert (failed.metadata["flow/tasks"].value, failed.metadata["flow/failed_tasks"].value) == (4, 2)
    assert sum(task.status.succeeded for task in Flow().list_tasks()) == 2


def test_map_can_return_the_errors_in_their_places(flow: FlowResource) -> None:
    first, second, third = flow.map(None, WORK, "double_or_fail", [1, 3, 5], return_errors=True)
    assert (first, third) == (2, 10)
    assert isinstance(second, FlowError)
    assert isinstance(second, ValueError)


def test_map_marks_whose_output_it_shows(flow: FlowResource, capfd: pytest.CaptureFixture[str]) -> None:
    flow.map(None, WORK, "double_or_fail", [7, 8])
    assert sorted(capfd.readouterr().out.splitlines()) == ["[0] item 7", "[1] item 8"]


def test_map_holds_at_most_max_parallel_tasks_at_once(flow: FlowResource) -> None:
    flow.map(None, WORK, "add", range(4), max_parallel=1)
    tasks = sorted((task.snapshot for task in Flow().list_tasks()), key=lambda seen: str(seen.submitted_at))
    assert len(tasks) == 4
    for before, after in itertools.pairwise(tasks):
        assert before.ended_at is not None
        assert after.submitted_at is not None
        assert before.ended_at <= after.submitted_at


def test_a_retry_of_a_map_runs_only_what_has_not_succeeded(flow: FlowResource, folder: Path) -> None:
    gate = folder.parent / "gate"
    orders = [[0, 1, 2], [2, 1, 0]]  # the order of the items may change between the tries

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
    def numbers(context: dg.AssetExecutionContext, flow: FlowResource) -> list[int]:
        if context.retry_number:
            gate.touch()
        return flow.map(
            context,
            WORK,
            "fail_until",
            orders[context.retry_number],
            kwargs={"folder": str(folder), "gate": str(gate)},
        )

    result = dg.materialize([numbers], resources={"flow": flow})
    assert result.output_for_node("numbers") == [2, 1, 0]
    ran = sorted(path.name.partition("-")[0] for path in folder.iterdir())
    assert ran == ["item0", "item1", "item1", "item2"]


def test_map_with_an_item_that_cannot_travel_runs_the_others(flow: FlowResource) -> None:
    first, second, third = flow.map(None, WORK, "add", [1, {2}, 3], return_errors=True)
    assert (first, third) == (1, 3)
    assert isinstance(second, SerializationError)


def test_map_of_a_module_without_a_file_runs_nothing(flow: FlowResource) -> None:
    with pytest.raises(dg.Failure, match="has no file"):
        flow.map(None, ModuleType("made_up"), "add", [1])
    assert not Flow().list_tasks()


def test_the_key_of_the_provider_is_not_shown() -> None:
    resource = FlowResource(api_key="secret-key")
    assert "secret-key" not in f"{resource} {resource!r}"
