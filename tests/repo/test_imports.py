"""What an import costs, and what the code that travels may use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNNER = sorted((ROOT / "flow_core" / "runner").glob("*.py"))
OTHER_PYTHONS = {"_sha2", "_sha256"}  # parts of the standard library that only some versions have
HEAVY = {"cloudpickle", "paramiko", "pathspec", "pydantic", "requests", "yaml"}


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh Python loads for a statement."""
    command = [sys.executable, "-X", "importtime", "-c", statement]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {name.partition(".")[0] for name in re.findall(r"\|\s+([\w.]+)$", report, flags=re.MULTILINE)}


def test_importing_flow_core_loads_none_of_its_dependencies() -> None:
    loaded = loaded_by("import flow_core")
    assert "flow_core" in loaded
    assert loaded & HEAVY == set()


def test_the_measurement_sees_what_an_import_loads() -> None:
    assert "yaml" in loaded_by("import flow_core, yaml")


@pytest.mark.parametrize("file", RUNNER, ids=lambda file: file.name)
def test_the_runner_is_written_for_python_3_8_and_needs_only_its_standard_library(file: Path) -> None:
    tree = ast.parse(file.read_text(), feature_version=(3, 8))
    imported = {name for node in ast.walk(tree) for name in absolute_imports(node)}
    assert imported - set(sys.stdlib_module_names) - OTHER_PYTHONS == set()


def absolute_imports(node: ast.AST) -> list[str]:
    """The top-level modules that a statement imports by their full names."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [node.module.partition(".")[0]]
    return []
