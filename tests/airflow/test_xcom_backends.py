"""Other XCom backends than Airflow's own: object storage, and one that fails. Each DAG runs in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from example_dags.hosts.airflow_server import AIRFLOW

ROOT = Path(__file__).parents[2]

MOODY = """
import os
from pathlib import Path
from airflow.sdk.bases.xcom import BaseXCom

class MoodyXCom(BaseXCom):
    @staticmethod
    def serialize_value(value, *, key=None, **where):
        mended = Path(os.environ["MENDED"])
        if key == "return_value" and not mended.exists():
            mended.touch()
            raise OSError("the bucket is out of reach")
        return BaseXCom.serialize_value(value)
"""

RUN = """
import json
import example
run = example.dag.test()
states = {one.task_id: str(one.state) for one in run.get_task_instances()}
given = {name: str(run.get_task_instance(name).xcom_pull(name)) for name in states}
print(json.dumps({"states": states, "given": given}))
"""

HEAD = """
import os
from datetime import timedelta
from airflow.sdk import DAG, task
from flow_airflow import FlowGPUOperator, load

WORK = {work!r}

@task
def describe(value):
    with open(os.environ["SAID"], "a") as file:
        print(repr(load(value)), file=file)
"""


@pytest.fixture(scope="module")
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("airflow-home")
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "FLOW_"))},
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "FLOW_LOCAL_HOME": str(home / "flow"),
        "FLOW_LOCAL_GPUS": "2",
    }
    subprocess.run([AIRFLOW, "db", "migrate"], env=variables, check=True, capture_output=True, timeout=240)
    return variables


@pytest.fixture
def run(airflow_home: dict[str, str], tmp_path: Path) -> Callable[..., Any]:
    def run_dag(dag: str, **variables: str) -> Any:
        (tmp_path / "moody.py").write_text(MOODY)
        (tmp_path / "example.py").write_text(HEAD.format(work=str(ROOT / "tests/airflow/dags/work.py")) + dag)
        (tmp_path / "run.py").write_text(RUN)
        path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "integrations")])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "run.py"],
            cwd=tmp_path,
            env={
                **airflow_home,
                "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path),
                "PYTHONPATH": path,
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        said = [line for line in done.stdout.splitlines() if line.startswith('{"states"')]
        assert said, done.stderr[-3000:]
        return {**json.loads(said[0]), "log": done.stdout}

    return run_dag


def test_when_the_backend_fails_a_retry_hands_the_same_result_on_and_the_work_is_not_repeated(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    trail = tmp_path / "trail"
    done = run(
        f"""
with DAG("moody") as dag:
    FlowGPUOperator(
        task_id="fit", module=WORK, function="leave_mark", op_args=[{str(trail)!r}],
        retries=1, retry_delay=timedelta(0),
    )
""",
        AIRFLOW__CORE__XCOM_BACKEND="moody.MoodyXCom",
        MENDED=str(tmp_path / "mended"),
    )
    assert "the bucket is out of reach" in done["log"]
    assert (done["states"], done["given"]) == ({"fit": "success"}, {"fit": "1"})
    assert len(trail.read_text().splitlines()) == 1, "the work ran once"


def test_airflows_backend_for_object_storage_gets_the_same_values_and_the_same_refusals(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    done = run(
        """
with DAG("stored") as dag:
    for name in ("tuple", "int_keys"):
        made = FlowGPUOperator(
            task_id=name, module=WORK, function="typed", op_args=[name], serialization="pickle"
        )
        describe.override(task_id=f"got_{name}")(made.output)
    large = FlowGPUOperator(
        task_id="large", module=WORK, function="zeros", op_args=[5], result_as="reference"
    )
    describe.override(task_id="got_large")(large.output)
""",
        AIRFLOW__CORE__XCOM_BACKEND="airflow.providers.common.io.xcom.backend.XComObjectStorageBackend",
        AIRFLOW__COMMON_IO__XCOM_OBJECTSTORAGE_PATH=(tmp_path / "xcoms").as_uri(),
        AIRFLOW__COMMON_IO__XCOM_OBJECTSTORAGE_THRESHOLD="0",
        SAID=str(tmp_path / "said"),
    )
    assert sorted((tmp_path / "said").read_text().splitlines()) == ["(1, 'two')", "[0, 0, 0, 0, 0]"]
    assert done["states"]["int_keys"] == "failed"
    assert "has a key that is no text: 1" in done["log"]
    assert list((tmp_path / "xcoms").rglob("tuple/*"))
