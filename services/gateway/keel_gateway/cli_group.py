"""What all of `keel` shares: errors with an exit status, as sentences or JSON; added commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from keel.errors import InvalidField, KeelError
from keel.record import Phase
from keel.spec import spec_errors
from keel_gateway.client import Fault, ProblemError, Unreachable
from keel_gateway.schemas import Job

FAILED, BAD_INPUT, NO_GATEWAY, CANCELLED, INTERRUPTED = 1, 2, 3, 4, 130
"""Exit statuses; 0: done."""
EXIT_STATUSES = {
    0: "done",
    FAILED: "the run failed, or what was asked for did not work",
    BAD_INPUT: "bad input: the same command fails again",
    NO_GATEWAY: "no gateway answers, or it cannot work now",
    CANCELLED: "the run was cancelled",
    INTERRUPTED: "interrupted (Ctrl-C, SIGTERM); a job on a gateway goes on",
}
"""For the help page and docs/cli.md."""
GROUP = "keel.commands"
"""Entry points of other distributions: a name, and a typer.Typer or a function for typer."""

out, err = Console(highlight=False), Console(stderr=True, highlight=False)


def show_json(data: object) -> None:
    """Writes one line of JSON to stdout: with --json nothing else goes there."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def exit_for(job: Job) -> None:
    """Returns if the job SUCCEEDED, else ends the command with the status of its phase."""
    if job.phase is not Phase.SUCCEEDED:
        raise typer.Exit(CANCELLED if job.phase is Phase.CANCELLED else FAILED)


class KeelGroup(TyperGroup):
    """Commands by name. Those of other distributions are imported when named, or for help."""

    _as_json = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Own commands, then those that were added."""
        own = super().list_commands(ctx)
        return [*own, *sorted(entry.name for entry in added() if entry.name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or None. An added one that does not load is named in a warning."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in added():
            if entry.name == cmd_name:
                return _load(entry)
        return None

    def make_context(self, info_name: Any, args: Any, *rest: Any, **extra: Any) -> Any:
        """As typer's; remembers whether errors are wanted as JSON."""
        self._as_json = "--json" in args
        return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; an error raised on purpose is told and becomes an exit status."""
        try:
            return super().invoke(ctx)
        except KeelError as error:
            self._tell(error, sentences(error), status(error))
            raise typer.Exit(status(error)) from error
        except TyperException as error:  # a flag or argument that typer has refused
            if not self._as_json:
                raise
            self._tell(error, [error.format_message()], error.exit_code)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if error.filename is None:
                raise
            # a path of the user's, say of --out
            self._tell(error, [f"{error.filename}: {error.strerror}"], BAD_INPUT)
            raise typer.Exit(BAD_INPUT) from error

    def _tell(self, error: Exception, lines: Sequence[str], code: int) -> None:
        if self._as_json:
            sys.stderr.write(json.dumps(problem(error, lines, code), ensure_ascii=False) + "\n")
            return
        for text in lines:
            err.print(text, style="red", markup=False, soft_wrap=True)


def problem(error: Exception, lines: Sequence[str], code: int) -> dict[str, Any]:
    """An error as a machine reads it, in the shape of the gateway's problems (RFC 9457).

    `exit_status` is added; `status`, an HTTP status, is there if the gateway has refused.
    """
    kinds = {
        FAILED: ("failed", "What was asked for did not work"),
        BAD_INPUT: ("invalid", "The input is not valid"),
        NO_GATEWAY: ("unavailable", "No gateway answers"),
    }
    kind, title = kinds.get(code, kinds[FAILED])
    found: dict[str, Any] = {"type": f"urn:keel:problem:{kind}", "title": title}
    if isinstance(error, ProblemError):
        found |= {"title": error.title, "status": error.status_code, "detail": error.detail}
    else:
        found |= {"detail": "\n".join(lines)}
    return found | {
        "errors": [
            {"field": f.field, "value": _plain(f.value), "valid": f.valid} for f in faults(error)
        ],
        "exit_status": code,
    }


def faults(error: Exception) -> Sequence[Fault]:
    """Each fault of a job file, a flag or a refused request."""
    if isinstance(error, ProblemError):
        return error.faults
    if isinstance(error.__cause__, ValidationError):  # of a job file: parse_spec names the first
        named: Sequence[InvalidField] = spec_errors(error.__cause__)
    else:
        named = [error] if isinstance(error, InvalidField) else []
    return [Fault(item.field, item.value, item.valid) for item in named]


def sentences(error: KeelError) -> list[str]:
    """What to tell of an error: each fault of a job file or a refused request on its own line."""
    if isinstance(error, ProblemError) and error.faults:
        return [
            f"{error.title}:",
            *(f"  {fault.field}: {fault.value!r}; valid: {fault.valid}" for fault in error.faults),
        ]
    if isinstance(error.__cause__, ValidationError):
        return [str(InvalidField(f.field, f.value, f.valid)) for f in faults(error)]
    return [str(error)]


def status(error: KeelError) -> int:
    """The exit status of an error."""
    if isinstance(error, Unreachable):
        return NO_GATEWAY
    if isinstance(error, InvalidField) or (isinstance(error, ProblemError) and error.callers_fault):
        return BAD_INPUT
    return FAILED


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)


def added() -> list[EntryPoint]:
    """Commands that installed distributions add."""
    return list(entry_points(group=GROUP))


def _load(entry: EntryPoint) -> Any:
    try:
        found = entry.load()
    except ImportError as error:  # one broken distribution must not take `keel` away
        err.print(f"keel {entry.name} cannot be loaded ({entry.value}): {error}", style="yellow")
        return None
    if isinstance(found, typer.Typer):
        command = get_command(found)
    else:
        single = typer.Typer(add_completion=False)
        single.command(entry.name)(found)
        command = get_command(single)
    command.name = entry.name
    return command
