"""`flow` on the command line. What it needs is in the extra `cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; errors of ours are told in words, without a traceback."""
    from flow_core.errors import FlowError

    try:
        from flow_core.commands import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("flow: the command line needs typer: pip install 'flow-gpu[cli]'")
    try:
        app()
    except FlowError as error:
        sys.exit(f"flow: {error}")


if __name__ == "__main__":
    main()
