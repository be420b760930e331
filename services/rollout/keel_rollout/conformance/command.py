"""`keel conformance`: added to the command `keel` by the entry point group `keel.commands`."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from keel.errors import InvalidField

FAILED = 1
NEEDED = ("torch", "transformers", "rich")


def conformance(
    engine: Annotated[
        str,
        typer.Argument(metavar="HOST:PORT", help="The engine's gRPC address.", show_default=False),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face folder of a model that the engine takes, or preset:NAME; small is "
            "best: the reference computes it in float32."
        ),
    ] = "preset:tiny-qwen3-moe",
    dtype: Annotated[
        str | None,
        typer.Option(help="What the engine is to compute in. Default: float32 if it can."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Rows to try, e.g. 'update/*' or '*/probe'; may be given again."),
    ] = None,
    list_rows: Annotated[bool, typer.Option("--list", help="List the rows, and end.")] = False,
    shared: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Storage shared with the engine, for weights by reference.",
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Name to take the engine under. Default: a new one.")
    ] = None,
    token: Annotated[
        int, typer.Option(min=1, help="Fencing token, at least the highest the engine has seen.")
    ] = 1,
    force: Annotated[
        bool, typer.Option("--force", help="Take the engine from the run that holds it.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a call may take.")] = 120.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout; errors as JSON on stderr.")
    ] = False,
) -> None:
    """Prove that an inference engine keeps the contract: docs/conformance.md.

    The engine loses the model that it has loaded. Exit status: 0, every row that was tried passed;
    1, a row failed; 2, the trial could not be made.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InvalidField(
            "this environment",
            f"without {', '.join(missing)}",
            "one with keel-rollout's extra: pip install 'keel-rollout[torch]'",
        )
    from keel_rollout.conformance.catalogue import chosen, names
    from keel_rollout.conformance.runner import RUN, Options

    wanted = chosen(only or [])
    if list_rows:
        rows = [{"row": n, "proves": r.proves, "contract": r.contract} for n, r in names()]
        if as_json:
            return _write({"rows": rows})
        for row in rows:
            typer.echo(f"{row['row']:<28}{row['proves']}")
        return None
    if not engine:
        raise InvalidField("HOST:PORT", engine, "the address of a running engine")
    options = Options(
        engine, run or f"{RUN}-{secrets.token_hex(4)}", token, dtype, shared, force, timeout
    )
    if not asyncio.run(_trial(options, model, wanted, as_json=as_json)):
        raise typer.Exit(FAILED)
    return None


async def _trial(options: Any, path: str, wanted: Any, *, as_json: bool) -> bool:
    from rich.console import Console

    from keel_rollout.conformance import runner, show
    from keel_rollout.conformance.reference import Model

    console = Console(highlight=False, stderr=as_json)
    with console.status("starting") as status:

        def before(_stage: Any, name: str) -> None:
            status.update(name)

        def after(stage: Any, outcomes: Any) -> None:
            if not as_json:
                console.print()
                console.print(show.stage_table(stage, outcomes))

        async with runner.kit_for(options, lambda dtype: Model(path, dtype)) as (kit, told):
            title = f"{told.can.kind} at {options.address}, {kit.model.a.dtype}, {path}"
            if not as_json:
                console.print(f"{title}\n{told.can.version}", markup=False)
            outcomes = await runner.trial(kit, wanted, before, after)
            found = runner.as_json(options, told, kit, outcomes)
    if as_json:
        _write(found)
    else:
        show.last_lines(console, title, outcomes)
    return bool(found["ok"])


def _write(data: object) -> None:
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    sys.stdout.flush()
