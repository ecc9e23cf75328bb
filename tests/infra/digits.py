"""The example in one of the hosts, with its tasks somewhere else: only the word behind `provider:` differs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from example_dags import demo

HOSTS = demo.HOSTS
GPU_PYTHON = demo.VENVS / "demo" / "bin" / "python"

#: Everything about every back end, as a user would have it; which of them is used is one word.
CONFIG = f"""\
provider: {{provider}}
local:
  python: {GPU_PYTHON}
  gpus: 2
ssh:
  hosts: [root@h1, root@h2, root@h3]
  python: /srv/demo/bin/python
slurm:
  home: {{folder}}/shared
  python: {GPU_PYTHON}
"""


def run(host: str, provider: str, folder: Path) -> str:
    """Run the example with a provider; return what the demo printed. Raises AssertionError with its log."""
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(provider=provider, folder=folder))
    where = [
        "--folder",
        str(folder / "demo"),
        "--pictures",
        str(folder / "pictures"),
        "--config",
        str(config),
    ]
    process = subprocess.run(
        [sys.executable, demo.__file__, "--host", host, *where],
        env={**os.environ, "PYTHONPATH": str(demo.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
