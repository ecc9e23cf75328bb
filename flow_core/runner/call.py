"""The door. ``python call.py`` runs the function call of a task folder, ``python call.py <folder> …`` is its runner.

A call runs in the work folder, with FLOW_TASK_DIR set. Everything is in `execute` and in `main`, which Python keeps
compiled. This file is compiled at every start, and once more in every process that the function spawns.
"""

import os
import sys


def _main() -> int:
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.abspath(sys.path[0]) == here:
        del sys.path[0]  # or the user's `import task` would find ours
    sys.path.insert(0, os.path.dirname(here))
    package = os.path.basename(here)
    begin = None
    if len(sys.argv) > 1:
        ours = __import__(package + ".main")
        if not sys.flags.no_site:
            # The copy of this process that is to be the call finds it loaded.
            __import__(package + ".execute")
        try:
            ours.main.run(sys.argv)
        except ours.spawn.Reborn as reborn:  # we are a copy of the runner, and to be the call's process
            begin = reborn.begin
    execute = __import__(package + ".execute").execute
    del sys.path[0]
    if begin:
        begin()
    code: int = execute.main()
    return code


if __name__ == "__main__":
    sys.exit(_main())
