"""The first process of a lab: when it ends, by whatever hand, the kernel ends every other process of the lab.

``python lab_init.py FOLDER`` runs as pid 1 of a process namespace. Its standard input is a pipe whose other end is held
by whoever started the lab, so that it also hears of a SIGKILL. The folder goes with the lab.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of the lab are reaped at once
    os.write(1, b"ready\n")
    while os.read(0, 4096):
        pass
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # nobody may write into the folder while it is removed
    shutil.rmtree(sys.argv[1], ignore_errors=True)
