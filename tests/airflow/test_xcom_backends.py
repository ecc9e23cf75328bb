"""Other XCom backends than Airflow's own: object storage, and one that fails. Each DAG runs in one process."""

from __future__ import annotations

from pathlib import Path

from tests.airflow.in_process import ROOT, run_dag

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

HEAD = f"""
import os
from datetime import timedelta
from airflow.sdk import DAG, task
from flow_airflow import FlowGPUOperator, load

WORK = {str(ROOT / "tests/airflow/dags/work.py")!r}

@task
def describe(value):
    with open(os.environ["SAID"], "a") as file:
        print(repr(load(value)), file=file)
"""


def test_when_the_backend_fails_a_retry_hands_the_same_result_on_and_the_work_is_not_repeated(
    variables: dict[str, str], tmp_path: Path
) -> None:
    trail = tmp_path / "trail"
    (tmp_path / "moody.py").write_text(MOODY)
    backend = {"AIRFLOW__CORE__XCOM_BACKEND": "moody.MoodyXCom", "MENDED": str(tmp_path / "mended")}
    dag = f"""
with DAG("moody") as dag:
    FlowGPUOperator(
        task_id="fit", module=WORK, function="leave_mark", op_args=[{str(trail)!r}],
        retries=1, retry_delay=timedelta(0),
    )
"""
    done = run_dag(tmp_path, HEAD + dag, variables | backend)
    assert "the bucket is out of reach" in done.log
    assert (done.states, done.given) == ({"fit": "success"}, {"fit": 1})
    assert len(trail.read_text().splitlines()) == 1, "the work ran once"


def test_airflows_backend_for_object_storage_gets_the_same_values_and_the_same_refusals(
    variables: dict[str, str], tmp_path: Path
) -> None:
    backend = {
        "AIRFLOW__CORE__XCOM_BACKEND": "airflow.providers.common.io.xcom.backend.XComObjectStorageBackend",
        "AIRFLOW__COMMON_IO__XCOM_OBJECTSTORAGE_PATH": (tmp_path / "xcoms").as_uri(),
        "AIRFLOW__COMMON_IO__XCOM_OBJECTSTORAGE_THRESHOLD": "0",
        "SAID": str(tmp_path / "said"),
    }
    dag = """
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
"""
    done = run_dag(tmp_path, HEAD + dag, variables | backend)
    assert sorted((tmp_path / "said").read_text().splitlines()) == ["(1, 'two')", "[0, 0, 0, 0, 0]"]
    assert done.states["int_keys"] == "failed"
    assert "has a key that is no text: 1" in done.log
    assert list((tmp_path / "xcoms").rglob("tuple/*"))
