"""Run the Prefect example with a Prefect server of its own.

python -m example_dags.hosts.run_prefect HOME PICTURE OUT
"""

from __future__ import annotations

import atexit
import contextlib
import os
import runpy
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from example_dags.hosts.outcome import DAGS, Order, Outcome, say

PATIENCE_S = 180.0


@contextlib.contextmanager
def running_server(home: Path) -> Iterator[str]:
    """The API address of a Prefect server with an empty database; gone at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prefect = str(Path(sys.executable).with_name("prefect"))
    command = [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}/api"
        deadline = time.monotonic() + PATIENCE_S
        while not answers(f"{address}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prefect's server does not start: see {home / 'server.log'}")
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
        server.kill()


def answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return bool(opener.open(url, timeout=5).status == 200)
    except OSError:
        return False


def main() -> None:
    order = Order.from_command_line()
    home = order.home / "prefect"
    home.mkdir(parents=True)
    os.environ |= {
        "DO_NOT_TRACK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    say("starting its server")
    server = contextlib.ExitStack()
    os.environ["PREFECT_API_URL"] = server.enter_context(running_server(home))
    # Prefect sends its last events when the interpreter ends, and waits a minute for a server that is gone: ours goes
    # after that, because what is registered first is called last.
    atexit.register(server.close)
    import prefect  # reads its settings when it is imported

    example: dict[str, Any] = runpy.run_path(str(DAGS / "prefect" / "digits_flow.py"))
    say("running the flow sweep_settings >> evaluate >> pick_best >> refit")
    started = time.time()
    answer = example["digits_flow"](picture=str(order.picture))
    ended = time.time()
    say("stopping it")
    Outcome(prefect.__version__, answer["results"], answer["report"], started, ended).write(order.out)


if __name__ == "__main__":
    main()
