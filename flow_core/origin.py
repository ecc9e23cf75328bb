"""Where code comes from: what is installed travels by name, what is the user's own travels by value.

Installed are the standard library and site-packages. The user's own are `__main__`, notebooks, DAG files, and modules
of a project that is not installed, editable installs included. Looks at names only, and sets off no lazy import.
"""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

_OURS = __name__.partition(".")[0]


def is_project(module: object, name: str) -> bool:
    """Whether a module's code is the user's: from a file that is not installed, and not ours."""
    if not issubclass(type(module), ModuleType):
        return False  # sys.modules holds whatever was put into it; a library of cffi's only says that it is a module
    # Not getattr: that would set off the import behind a lazy module.
    namespace = ModuleType.__getattribute__(module, "__dict__")
    file = namespace.get("__file__")
    if not isinstance(file, str) or namespace.get("__name__") != name or name == "__main__":
        return False
    return name.partition(".")[0] != _OURS and is_project_file(file)


@functools.lru_cache(maxsize=100_000)
def is_project_file(file: str) -> bool:
    """Whether a source file lies outside of what is installed."""
    path = str(Path(file).absolute())
    return not path.startswith(_installed()) and "site-packages" not in path and "dist-packages" not in path


def is_importable(obj: Any) -> bool:
    """Whether a function or class can be found by its name on any machine that has the same packages."""
    name = getattr(obj, "__module__", None)
    module = sys.modules.get(name) if isinstance(name, str) else None
    if module is None or name == "__main__" or is_project(module, str(name)):
        return False
    found: Any = module
    for part in obj.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is obj


@functools.cache
def _installed() -> tuple[str, ...]:
    """The folders of what the other side may have as well."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = {sysconfig.get_path(name) for name in names} | {
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
    return tuple(real + os.sep for folder in folders for real in {folder, os.path.realpath(folder)})
