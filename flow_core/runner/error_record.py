"""Turns an exception into a record that travels as JSON, whatever the exception does when it is looked at.

Nothing here raises. Loaded only when a call has failed. Standard library only, Python 3.8+.
"""

from __future__ import annotations

import os
import sys

from . import stdlib
from .strict_json import short, to_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

_MAX_TEXT = 64_000
_MAX_ARGS_BYTES = 4_000
_MAX_CHAIN = 16
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def record_of(error: BaseException, task_folder: str) -> dict[str, Any]:
    """Return the record of `error`: type, module, qualname, message, args, traceback, notes, cause, context.

    The traceback is as Python would print it, without the runner's own frames. `args` is None unless JSON can carry
    it. A group has its members under `exceptions`, a SystemExit its `exit_code`.
    """
    return _Recorder(task_folder).record(error)


def exit_code_of(error: BaseException) -> int:
    """Return how the process is to end: never with 0, because no result was returned."""
    if isinstance(error, SystemExit):
        code = error.code
        return ((code & 0xFF) or 1) if isinstance(code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


class _Recorder:
    def __init__(self, task_folder: str) -> None:
        archive = os.path.join(task_folder, "cloudpickle.zip")
        self.ours = (_HERE, archive, "cloudpickle.zip", "<frozen importlib", _asyncio_folder())
        self.seen: set[int] = set()

    def record(self, error: BaseException) -> dict[str, Any]:
        self.seen.add(id(error))
        kind = type(error)
        record: dict[str, Any] = {
            "type": str(kind.__name__),
            "module": str(kind.__module__),
            "qualname": str(kind.__qualname__),
            "message": _cut(_message(error)),
            "args": _args(error),
            "traceback": _cut(self._traceback(error)),
            "notes": _notes(error),
            "cause": self._chained(error.__cause__),
            "context": None if error.__suppress_context__ else self._chained(error.__context__),
        }
        if isinstance(error, SystemExit):
            record["exit_code"] = exit_code_of(error)
        members = getattr(error, "exceptions", None)
        if isinstance(members, tuple):
            records = [self._chained(member) for member in members if isinstance(member, BaseException)]
            record["exceptions"] = [member for member in records if member is not None]
        return record

    def _chained(self, error: BaseException | None) -> dict[str, Any] | None:
        if error is None or id(error) in self.seen or len(self.seen) >= _MAX_CHAIN:
            return None
        return self.record(error)

    def _traceback(self, error: BaseException) -> str:
        try:
            with stdlib.Unshadowed():
                import traceback

                lines = traceback.format_exception(type(error), error, self._users_part(error.__traceback__))
            return "".join(lines)
        except Exception as trouble:  # noqa: BLE001 - an exception that cannot be shown is still an exception
            why = f"(no traceback: reading it raised {type(trouble).__name__})"
            return f"{type(error).__name__}: {_message(error)}\n{why}\n"

    def _users_part(self, trace: TracebackType | None) -> TracebackType | None:
        while trace is not None and trace.tb_frame.f_code.co_filename.startswith(self.ours):
            trace = trace.tb_next
        return trace


def _asyncio_folder() -> str:
    """The code that drives an async function; a name that no file has where there was none."""
    file = getattr(sys.modules.get("asyncio"), "__file__", None)
    return os.path.dirname(file) + os.sep if file else "\0"


def _message(error: BaseException) -> str:
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        code = "" if error.code is None else short(error.code)
        return f"sys.exit({code}) was called before the function returned a value"
    try:
        return str(error)
    except BaseException as trouble:  # noqa: BLE001 - the user's own __str__
        return f"<{type(error).__name__} whose __str__ raised {type(trouble).__name__}>"


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", None)
    return [_cut(note) for note in notes[:20] if isinstance(note, str)] if isinstance(notes, list) else []


def _args(error: BaseException) -> Any:
    try:
        to_json(error.args, "args", _MAX_ARGS_BYTES)
    except Exception:  # noqa: BLE001 - NotSerializable, or a value that breaks while it is read
        return None
    return list(error.args)


def _cut(text: str) -> str:
    if len(text) <= _MAX_TEXT:
        return text
    half = _MAX_TEXT // 2
    return f"{text[:half]}\n… {len(text) - _MAX_TEXT:,} characters left out …\n{text[-half:]}"
