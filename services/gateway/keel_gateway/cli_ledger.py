"""`keel ledger` and `keel dead-letters`: whether every group was trained on once, and which were
given up.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from keel.dead_letters import DeadLetter
from keel.ledger import FILE
from keel_gateway import ledger_view
from keel_gateway.cli_group import FAILED, out, show_json
from keel_gateway.cli_options import JobName, JobOrRun, Json, Url
from keel_gateway.client import LATEST, GatewayClient, find_url
from keel_gateway.run_folder import is_run_path
from keel_gateway.schemas import Ledger

MOST_PROBLEMS = 20


def ledger(
    job: JobOrRun = LATEST,
    limit: Annotated[int, typer.Option(min=1, help="Most laps, the newest.")] = 20,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Audit a job: what each lap was trained on; is anything lost, or trained on twice?

    JOB may also be a run's folder or its ledger.jsonl: that needs no gateway. Exit status 1 if
    anything is wrong.
    """
    if is_run_path(job):
        found = ledger_view.of_file(_file(Path(job)))
    else:
        with GatewayClient(find_url(url)) as client:
            found = client.ledger(client.find(job).id)
    if as_json:
        show_json(found.model_dump(mode="json"))
    else:
        _print(found, limit)
    if found.problems:
        raise typer.Exit(FAILED)


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _print(found: Ledger, limit: int) -> None:
    table = Table("Lap", "Steps", "Groups", "Void", "Dead", "Again", "", box=None)
    table.header_style = "dim"
    if len(found.laps) > limit:
        out.print(f"({len(found.laps) - limit} earlier ones left out; --limit)", style="dim")
    for lap in found.laps[-limit:]:
        notes = ["checkpoint"] if lap.checkpoint else []
        if lap.takeovers:
            times = f" {lap.takeovers} times" if lap.takeovers > 1 else ""
            notes.insert(0, f"resumed{times}")
        steps = "" if lap.first_step is None else f"{lap.first_step}-{lap.last_step}"
        name = "cold start" if lap.lap is None else str(lap.lap)
        counts = [str(n) if n else "" for n in (lap.void, lap.dead, lap.again)]
        table.add_row(name, steps, str(lap.trained), *counts, ", ".join(notes))
    out.print(table if found.laps else "Nothing was trained on yet")
    for problem in found.problems[:MOST_PROBLEMS]:
        out.print(problem, style="red", markup=False, soft_wrap=True)
    if (more := len(found.problems) - MOST_PROBLEMS) > 0:
        out.print(f"... and {more} more", style="red")
    style = "bold red" if found.problems else "bold green"
    out.print(found.verdict, style=style, markup=False, soft_wrap=True)


def dead_letters(
    job: JobName = LATEST,
    save: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Write the bytes of each into this folder."),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List what a job's trainer could not read, three times over, and gave up.

    With --save each is left as STREAM-ENTRY.envelope, a serialized keel.types.v1.Envelope or what
    came in its place.
    """
    with GatewayClient(find_url(url)) as client:
        run = client.find(job).id
        found = client.dead_letters(run)
        saved = _save(client, run, found, save) if save else None
    if as_json:
        told = [letter.model_dump(mode="json") for letter in found]
        files = {} if saved is None else {"saved": [str(path) for path in saved]}
        return show_json({"job": run, "dead_letters": told} | files)
    if not found:
        return out.print(f"{run} has no dead letters", markup=False)
    table = Table("Entry", "Slot", "Tries", "When", "Bytes", "Reason", box=None)
    table.header_style = "dim"
    for letter in found:
        when = f"{letter.died_at:%F %T}"
        size = f"{letter.size_bytes:,}"
        table.add_row(
            letter.field, _slot(letter), str(letter.tries), when, size, escape(letter.reason)
        )
    out.print(table)
    if saved is not None:
        out.print(f"{len(saved)} of {len(found)} saved in {save}", markup=False, soft_wrap=True)
    return None


def _slot(letter: DeadLetter) -> str:
    if letter.lap is None or letter.slot is None:
        return "?"
    if letter.stream == "demos":
        return f"supervised step {letter.lap}"
    return f"lap {letter.lap}, slot {letter.slot}"


def _save(client: GatewayClient, run: str, found: list[DeadLetter], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for letter in found:
        data = client.dead_letter_bytes(run, letter)
        if data is not None:
            name = re.sub(r"[^0-9A-Za-z-]", "_", f"{letter.stream}-{letter.entry}")
            saved.append(folder / f"{name}.envelope")
            saved[-1].write_bytes(data)
    return saved
