"""What all of `keel` shares: errors as sentences with an exit status, commands from elsewhere."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup
from typer.main import get_command

from keel.errors import InvalidField, KeelError
from keel.spec import spec_errors
from keel_gateway.client import ProblemError, Unreachable

RUN_FAILED, BAD_INPUT, NO_GATEWAY = 1, 2, 3
"""Exit statuses."""
GROUP = "keel.commands"
"""Entry points of other distributions: a name, and a typer.Typer or a function for typer."""

out, err = Console(highlight=False), Console(stderr=True, highlight=False)


class KeelGroup(TyperGroup):
    """Commands by name. Those of other distributions are imported when named, or for help."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Own commands, then those that were added."""
        own = super().list_commands(ctx)
        return [*own, *sorted(entry.name for entry in _entries() if entry.name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or None. An added one that does not load is named in a warning."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in _entries():
            if entry.name == cmd_name:
                return _load(entry)
        return None

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; an error raised on purpose becomes sentences and an exit status."""
        try:
            return super().invoke(ctx)
        except KeelError as error:
            for text in sentences(error):
                err.print(text, style="red", markup=False, soft_wrap=True)
            raise typer.Exit(status(error)) from error
        except OSError as error:
            if error.filename is None:
                raise
            text = f"{error.filename}: {error.strerror}"  # a path of the user's, say of --out
            err.print(text, style="red", markup=False, soft_wrap=True)
            raise typer.Exit(BAD_INPUT) from error


def sentences(error: KeelError) -> list[str]:
    """What to tell of an error: each fault of a job file or a refused request on its own line."""
    if isinstance(error, ProblemError) and error.faults:
        return [
            f"{error.title}:",
            *(f"  {fault.field}: {fault.value!r}; valid: {fault.valid}" for fault in error.faults),
        ]
    if isinstance(error.__cause__, ValidationError):  # of a job file: parse_spec names the first
        return [str(fault) for fault in spec_errors(error.__cause__)]
    return [str(error)]


def status(error: KeelError) -> int:
    """The exit status of an error."""
    if isinstance(error, Unreachable):
        return NO_GATEWAY
    if isinstance(error, InvalidField) or (isinstance(error, ProblemError) and error.callers_fault):
        return BAD_INPUT
    return RUN_FAILED


def _entries() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))


def _load(entry: EntryPoint) -> Any:
    try:
        added = entry.load()
    except ImportError as error:  # one broken distribution must not take `keel` away
        err.print(f"keel {entry.name} cannot be loaded ({entry.value}): {error}", style="yellow")
        return None
    if isinstance(added, typer.Typer):
        command = get_command(added)
    else:
        single = typer.Typer(add_completion=False)
        single.command(entry.name)(added)
        command = get_command(single)
    command.name = entry.name
    return command
