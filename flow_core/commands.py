"""The commands of `flow`. Importing this needs typer; `cli` says so where it is missing."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from flow_core.flow import Flow

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def every() -> None:
    """Work with tasks on machines with GPUs."""


@app.command("ssh", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def ssh(
    task: Annotated[str, typer.Argument(help="The task's id.", show_default=False)],
    command: Annotated[
        list[str] | None, typer.Argument(help="What to run there; a shell without it.", show_default=False)
    ] = None,
    node: Annotated[int, typer.Option(help="The node, for a task with several.")] = 0,
    provider: Annotated[
        str | None, typer.Option(help="Another provider than the configured one.", show_default=False)
    ] = None,
) -> None:
    """Open a shell beside a running task, or run one command there and exit with its code.

    One word is a line for the shell there; several are an exact argument list. Options come before the task.
    """
    words = command or []
    line = None if not words else words[0] if len(words) == 1 else shlex.join(words)
    raise typer.Exit(Flow(provider).get_task(task).shell(line, node=node))
