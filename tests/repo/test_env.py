"""How the environments and their pins are made."""

from __future__ import annotations

from scripts.env import ENVIRONMENTS, install_arguments, pins, uv_settings


def test_a_pin_keeps_its_marker_only_where_pythons_need_different_versions() -> None:
    resolved = (
        "# a comment\n"
        "colorama==0.4.6 ; sys_platform == 'win32'\n"
        "numpy==2.2.6 ; python_full_version < '3.11'\n"
        "numpy==2.4.0 ; python_full_version >= '3.11'\n"
        "    # via something\n"
        "rich==15.0.0\n"
    )
    assert pins(resolved).splitlines() == [
        "colorama==0.4.6",
        "numpy==2.2.6 ; python_full_version < '3.11'",
        "numpy==2.4.0 ; python_full_version >= '3.11'",
        "rich==15.0.0",
    ]


def test_uv_gets_what_pip_is_configured_with() -> None:
    pip = {"index-url": "https://pypi.example/simple", "trusted-host": "pypi.example", "find-links": "/a /b"}
    assert uv_settings(pip, {}) == {
        "UV_DEFAULT_INDEX": "https://pypi.example/simple",
        "UV_INSECURE_HOST": "pypi.example",
        "UV_FIND_LINKS": "/a,/b",
    }


def test_a_second_index_counts_as_much_as_the_first_as_it_does_for_pip() -> None:
    settings = uv_settings({"extra-index-url": "https://more.example/simple"}, {})
    assert settings == {"UV_INDEX": "https://more.example/simple", "UV_INDEX_STRATEGY": "unsafe-best-match"}


def test_what_the_user_has_set_for_uv_stays() -> None:
    pip = {"index-url": "https://pypi.example/simple"}
    assert uv_settings(pip, {"UV_DEFAULT_INDEX": "https://mine.example/simple"}) == {}


def test_the_gpu_machines_python_holds_nothing_of_ours() -> None:
    assert "--editable" not in install_arguments(ENVIRONMENTS["demo"])
    assert "--editable" in install_arguments(ENVIRONMENTS["airflow"])
