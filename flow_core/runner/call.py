"""Runs the function call of one task folder: ``python call.py``, in the work folder, with FLOW_TASK_DIR set.

Only the door: everything is in `execute`, which Python keeps compiled. This file is compiled at every start, and once
more in every process that the function spawns.
"""

import os
import sys


def _main() -> int:
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.abspath(sys.path[0]) == here:
        del sys.path[0]  # or the user's `import task` would find ours
    sys.path.insert(0, os.path.dirname(here))
    package = __import__(os.path.basename(here) + ".execute")
    del sys.path[0]
    code: int = package.execute.main()
    return code


if __name__ == "__main__":
    sys.exit(_main())
