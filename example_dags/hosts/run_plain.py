"""Run the example without any host: four calls of ours in a row.

python -m example_dags.hosts.run_plain HOME PICTURE OUT
"""

from __future__ import annotations

import platform
import time

from example_dags.hosts.outcome import DAGS, Order, Outcome, say
from flow_core import Flow

DIGITS = DAGS / "digits.py"


def main() -> None:
    order = Order.from_command_line()
    flow = Flow()
    say("calling the functions, with nothing around them")
    started = time.time()
    settings = flow.invoke(DIGITS, "sweep_settings", gpu="cpu")
    tasks = [flow.invoke_async(DIGITS, "evaluate", [setting], gpu="a100") for setting in settings]
    results = [task.get_result() for task in tasks]
    best = flow.invoke(DIGITS, "pick_best", [results], gpu="cpu")
    report = flow.invoke(DIGITS, "refit", [best, str(order.picture)], gpu="a100")
    ended = time.time()
    Outcome(platform.python_version(), results, report, started, ended).write(order.out)


if __name__ == "__main__":
    main()
