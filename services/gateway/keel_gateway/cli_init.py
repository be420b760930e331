"""`keel init`: a commented job file for the user's data and model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel.errors import InvalidField
from keel_gateway.cli_group import err, out, show_json
from keel_gateway.cli_options import Json
from keel_gateway.init import data as data_
from keel_gateway.init import model as model_
from keel_gateway.init.choose import choose
from keel_gateway.init.write import job_file, write


def init(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", exists=True, dir_okay=False, help="JSONL: docs/data.md."),
    ],
    model: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Model folder (Hugging Face) on the trainer's disk."),
    ] = None,
    verifier: Annotated[
        str | None,
        typer.Option(help="exact, math, or module:function; else math if answers look like it."),
    ] = None,
    file: Annotated[
        Path, typer.Option("--out", dir_okay=False, help="Job file to write; never over one.")
    ] = Path("job.toml"),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; else about an epoch.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a job file for your data, in which every choice has a reason."""
    if file.exists():
        raise InvalidField("--out", str(file), "a new file: this one exists")
    found = data_.look(data, verifier)
    if model is None:
        folder = model_.preset(found.longest)
    else:
        folder = model_.look(model, found.longest, chat=not found.chat)
    chosen = choose(found, folder, verifier, steps)
    spec = write(file, job_file(found, folder, chosen, file))
    if as_json:
        return show_json(
            {
                "out": str(file),
                "rows": found.rows,
                "warnings": chosen.warnings,
                "reasons": chosen.reasons,
                "spec": spec.model_dump(mode="json", exclude_unset=True),
            }
        )
    for warning in chosen.warnings:
        err.print(f"Note: {warning}", style="yellow", markup=False, soft_wrap=True)
    out.print(f"{file}: {found.rows:,} rows, verifier {chosen.verifier}, {chosen.steps} steps")
    return out.print(f"Next:  keel run {file} --out runs/{spec.name}", soft_wrap=True)
