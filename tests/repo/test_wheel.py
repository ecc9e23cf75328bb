"""What people who install the project get."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"flow_core", "flow_airflow", "flow_prefect", "flow_dagster"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, check=True, capture_output=True, cwd=ROOT)
    [file] = folder.iterdir()
    assert file.name == "flow_gpu-0.1.0-py3-none-any.whl"
    return zipfile.ZipFile(file)


def test_its_top_level_is_the_four_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert top == PACKAGES | {"flow_gpu-0.1.0.dist-info"}


def test_every_package_is_complete_and_says_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    sources = {
        str(file.relative_to(parent))
        for parent in (ROOT, ROOT / "integrations")
        for package in PACKAGES
        for file in (parent / package).rglob("*.py")
    }
    assert sources <= names


def test_it_names_its_hosts_as_extras_and_offers_no_extra_for_all_of_them(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(wheel.read("flow_gpu-0.1.0.dist-info/METADATA"))
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert extras - {"cli", "fsspec", "s3", "ssh"} == {"airflow", "dagster", "prefect"}
    assert metadata["License-Expression"] == "Apache-2.0"
    always = [need for need in metadata.get_all("Requires-Dist") or [] if "extra ==" not in need]
    assert {need.partition(">")[0] for need in always} == {"cloudpickle", "pydantic", "pyyaml"}


def test_airflow_finds_the_provider_by_its_entry_point(wheel: zipfile.ZipFile) -> None:
    entry_points = wheel.read("flow_gpu-0.1.0.dist-info/entry_points.txt").decode()
    assert (
        "[apache_airflow_provider]\nprovider_info = flow_airflow.provider_info:get_provider_info"
        in entry_points
    )
