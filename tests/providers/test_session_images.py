"""`container_image=`: a session runs in a real container; a function with an image of its own in another one."""

from __future__ import annotations

import os
from pathlib import Path

from flow_core.sessions import Session
from tests.providers.test_images import containers, python_image

__all__ = ["python_image"]  # a fixture


def inside() -> bool:
    return not os.path.exists("/etc/debian_version")


def test_the_workers_of_a_session_run_in_its_image(home: Path, python_image: str) -> None:
    with Session(container_image=python_image, workers=2) as session:
        handle = session.function(inside)
        assert [future.result(120) for future in handle.map(() for _ in range(4))] == [True] * 4
        assert len(containers()) == 1
    assert containers() == []


def test_a_function_with_an_image_of_its_own_has_its_own_workers(home: Path, python_image: str) -> None:
    with Session(workers=1) as session:
        here = session.function(inside)
        there = session.function(container_image=python_image)(inside)
        assert here.remote().result(60) is False
        assert containers() == []  # it is started when it is called
        assert there.remote().result(120) is True
    assert containers() == []
