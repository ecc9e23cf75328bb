"""The batch script: golden texts, and nothing of the user's that could become a command."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flow_core import config
from flow_core.config import SlurmSettings
from flow_core.errors import ConfigError
from flow_core.models import TaskConfig, TaskSpec
from flow_core.providers.slurm_machines import choose
from flow_core.providers.slurm_script import Batch, minutes, quoted, render, wishes
from flow_core.testing import NASTY

GOLDEN = Path(__file__).parent / "golden"

EVERYTHING: dict[str, Any] = {
    "partition": "gpu",
    "account": "vision",
    "qos": "high prio",
    "constraint": "a100&nvlink",
    "reservation": "course",
    "memory": "64G",
    "cpus": 8,
    "exclusive": True,
    "requeue": False,
    "directives": {"mail-type": "END,FAIL", "comment": 'it\'s "so" #1', "nice": 5, "contiguous": True},
    "modules": ["cuda/12.4", "odd name"],
    "setup": "source /opt/conda/bin/activate torch\nexport OMP_NUM_THREADS=8",
}

SCRIPTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"instance_type": "cpu"}),
    "gpus": (
        {"instance_types": {"a100": {"partition": "gpu", "gres": "gpu:a100:{count}"}}},
        {"instance_type": "2xa100", "max_run_time_hours": 1.5},
    ),
    "gpus-per-node": (
        {"instance_types": {"h100": {"partition": "h100"}}, "gpu_directive": "gpus-per-node"},
        {"instance_type": "8xh100", "num_instances": 4},
    ),
    "everything": (EVERYTHING, {"instance_type": "cpu", "region": "long", "max_run_time_hours": 0.001}),
}


def spec(**fields: Any) -> TaskSpec:
    return TaskSpec.from_config(TaskConfig(command="true", **fields))


def batch(settings: SlurmSettings, task: TaskSpec) -> Batch:
    return Batch(
        name="flow-train-0123456789abcdef-1-89abcdef",
        folder="/scratch/ada/flow/tasks/0123456789abcdef/1",
        directives=wishes(task, settings, choose(task, settings, list)),
        runner=("/opt/python/bin/python", "-I", "-S", "/scratch/ada/flow/runner/0123456789abcdef"),
        subject=("/scratch/ada/flow/tasks/0123456789abcdef/1",),
        modules=tuple(settings.modules),
        setup=settings.setup,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_as_they_were(name: str) -> None:
    settings, fields = SCRIPTS[name]
    golden = GOLDEN / f"slurm-{name}.sh"
    script = render(batch(SlurmSettings(**settings), spec(**fields)))
    assert script == golden.read_text(), f"if this is better, write it to {golden.name}"
    subprocess.run(["bash", "-n", golden], check=True)


def test_the_script_of_an_array_takes_its_task_from_a_list() -> None:
    one = batch(SlurmSettings(), spec(instance_type="cpu"))
    script = render(replace(one, elements=100, max_running=7, subject=("--list", "/a list")))
    assert "#SBATCH --array=0-99%7\n" in script
    assert script.splitlines()[-1].endswith("batch --list '/a list'")
    assert "--array=0-99\n" in render(replace(one, elements=100))


NASTY_PATHS = [text for text in NASTY if text and "\n" not in text and "\\" not in text]


@pytest.mark.parametrize("text", NASTY_PATHS)
def test_a_nasty_path_is_one_word_everywhere(text: str) -> None:
    folder = f"/home/{text}"
    runner, one = ("/py thon", "-I", "-S", folder), batch(SlurmSettings(), spec(instance_type="cpu"))
    script = render(replace(one, folder=folder, runner=runner, subject=(folder,)))
    assert shlex.split(script.splitlines()[-1]) == ["exec", *runner, "batch", folder]
    assert commands(script) == [script.splitlines()[-1]]


@pytest.mark.parametrize("text", ["a\\b", "a\nb", "a\tb"])
def test_a_path_that_slurm_cannot_write_to_is_an_error_that_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match="slurm.home"):
        render(replace(batch(SlurmSettings(), spec(instance_type="cpu")), folder=f"/{text}"))


def test_percent_signs_in_a_path_are_no_patterns() -> None:
    script = render(replace(batch(SlurmSettings(), spec(instance_type="cpu")), folder="/a/%j"))
    assert "#SBATCH --output=/a/%%j/slurm.out\n" in script


lines = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), max_size=40)


@given(lines)
def test_any_value_of_an_option_stays_one_value(value: str) -> None:
    assert sbatch_reads(f"--comment={quoted(value)} --next") == [f"--comment={value}", "--next"]


@given(st.dictionaries(st.from_regex(r"x[a-z-]{0,10}", fullmatch=True), lines, max_size=4))
def test_no_option_becomes_a_command(directives: dict[str, str]) -> None:
    settings = SlurmSettings(directives=directives)
    assert len(commands(render(batch(settings, spec(instance_type="cpu"))))) == 1


def commands(script: str) -> list[str]:
    """The lines of a script that a shell runs."""
    return [line for line in script.split("\n") if line and not line.startswith("#")]


def sbatch_reads(text: str) -> list[str]:
    """Split options as sbatch does in a script: quotes of both kinds, a backslash takes the next sign as it is."""
    words, word, quote, signs = [], "", "", iter(text)
    inside = False
    for sign in signs:
        if sign == "\\":
            word, inside = word + next(signs, ""), True
        elif sign == quote or (not quote and sign in "\"'"):
            quote, inside = "" if quote else sign, True
        elif not quote and sign == " ":
            words += [word] if inside else []
            word, inside = "", False
        elif not quote and sign == "#":
            break
        else:
            word, inside = word + sign, True
    return [*words, word] if inside else words


@pytest.mark.parametrize(("seconds", "limit"), [(0.5, 6), (60, 7), (3600, 66), (86400, 1446)])
def test_slurms_limit_comes_after_ours(seconds: float, limit: int) -> None:
    assert minutes(seconds, SlurmSettings(kill_grace_s=10, time_margin_min=5)) == limit
    assert limit * 60 > seconds + 10


def test_nothing_of_the_task_itself_is_in_the_script() -> None:
    task = TaskSpec.from_config(
        TaskConfig(name="x", command=("run", *NASTY), env={"KEY": "secret"}, instance_type="cpu")
    )
    script = render(batch(SlurmSettings(), task))
    assert "secret" not in script and not re.search(r"echo no|exit 9", script)


def test_the_configuration_in_the_documentation_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert example is not None
    (tmp_path / "config.yaml").write_text(example[1])
    settings = config.load(environ={"FLOW_CONFIG": str(tmp_path / "config.yaml")})
    task = spec(instance_type="8xh100")
    script = render(batch(settings.slurm, task))
    assert "--gpus-per-node=8\n" in script and "--exclusive\n" in script and "module load cuda/12.4" in script
