"""Arguments and options that several commands of `keel` have, and how job ids complete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel.errors import KeelError
from keel_gateway.client import LATEST, GatewayClient, find_url

COMPLETION_S = 0.5
"""How long a gateway may take while somebody presses Tab."""


def complete_job(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Ids that begin so, with their phase; none, without a word, if no gateway answers in time."""
    try:
        with GatewayClient(find_url(ctx.params.get("url")), timeout_s=COMPLETION_S) as client:
            found = [(job.id, f"{job.phase} {job.step}/{job.steps}") for job in client.jobs()]
    except (KeelError, ValueError):
        return []
    newest = [(LATEST, f"{found[0][0]}")] if found else []
    return [item for item in [*newest, *found] if item[0].startswith(incomplete)]


File = Annotated[
    Path,
    typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="Job file (TOML)."),
]
JobName = Annotated[
    str,
    typer.Argument(
        metavar="JOB", autocompletion=complete_job, help=f"Id, its beginning, or '{LATEST}'."
    ),
]
JobOrRun = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        autocompletion=complete_job,
        help=f"Id, its beginning, '{LATEST}', or a folder left by keel run.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the job file, as if it stood there: --set recipe.steps=8, "
        "--set engine.kind=vllm. May be repeated.",
    ),
]
Url = Annotated[
    str | None,
    typer.Option("--url", help="Gateway. Else KEEL_URL, `keel up` in this folder, port 8080."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout; errors as JSON on stderr.")]
Device = Annotated[
    str, typer.Option(envvar="KEEL_DEVICE", help="Of engines and trainer: cpu, cuda or cuda:N.")
]
Threads = Annotated[
    int,
    typer.Option(
        min=1, envvar="KEEL_TORCH_THREADS", help="Of each engine and trainer; enters the rounding."
    ),
]
