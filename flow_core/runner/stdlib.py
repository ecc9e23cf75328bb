"""Standard modules on demand, also where the user's folder holds files of the same names.

Loading them late keeps a call's start short; by then the user's folders are first on the path.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_path: list[str] = list(sys.path)
_user_folders: tuple[str, ...] = ()


def put_first(folders: list[str]) -> None:
    """Put the user's folders at the beginning of the path."""
    global _user_folders  # noqa: PLW0603 - there is one sys.path as well
    _path[:] = sys.path
    _user_folders = tuple(folder + "/" for folder in folders)
    sys.path[:0] = folders


class Unshadowed:
    """While this lasts, the user's folders are off the path and their modules out of sight."""

    def __enter__(self) -> None:
        self.path = list(sys.path)
        self.hidden = {key: module for key, module in list(sys.modules.items()) if _is_users(module)}
        sys.path[:] = _path
        for key in self.hidden:
            del sys.modules[key]

    def __exit__(self, *_: object) -> None:
        sys.path[:] = self.path
        sys.modules.update(self.hidden)


def standard(name: str) -> Any:
    """Return the standard module `name`. What it imports later, when it is used, may need `Unshadowed` again."""
    with Unshadowed():
        __import__(name)
        return sys.modules[name]


def _is_users(module: object) -> bool:
    file = getattr(module, "__dict__", {}).get("__file__")
    return isinstance(file, str) and file.startswith(_user_folders)
