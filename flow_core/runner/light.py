"""Standard modules without what takes long to load: a runner starts for every task, and would spend its time on that.

`signal` loads `enum` to give numbers names, `ctypes` makes dozens of classes. Standard library only, Python 3.8+.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import Any
else:
    try:
        import _signal as signal  # the same functions and numbers
    except ImportError:
        import signal

__all__ = ["libc", "signal", "signal_name"]


def libc(name: str, *args: int | bytes) -> int:
    """Call a function of the C library that returns an int. Raises OSError where it has none of this name."""
    try:
        from _ctypes import call_cdeclfunction, dlopen, dlsym
    except ImportError:
        import ctypes

        try:
            function = getattr(ctypes.CDLL(None), name)
        except AttributeError as error:
            raise OSError(f"the C library has no {name}") from error
        return int(function(*args))
    everything: Any = None
    return int(call_cdeclfunction(dlsym(dlopen(everything, 0), name), args))


def signal_name(number: int) -> str:
    """Return "SIGKILL" for 9; the number itself where it has no name."""
    from signal import Signals

    return Signals(number).name if number in Signals.__members__.values() else str(number)
