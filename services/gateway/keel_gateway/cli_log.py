"""`keel log`: a job's rows into TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from keel.errors import InvalidField
from keel_gateway.cli_group import out, show_json
from keel_gateway.cli_options import JobName, Json, Url
from keel_gateway.client import LATEST, GatewayClient, find_url
from keel_gateway.follow import follow
from keel_gateway.sinks.base import Open, logged, opened, require
from keel_gateway.sinks.tensorboard import TensorBoard
from keel_gateway.sinks.wandb import WeightsAndBiases
from keel_gateway.watch import POLL_S

TensorBoardDir = Annotated[
    Path | None,
    typer.Option("--tensorboard", metavar="DIR", file_okay=False, help="Event files: DIR/JOB/."),
]
WandbProject = Annotated[
    str | None, typer.Option("--wandb", metavar="PROJECT", help="Weights & Biases: a run JOB.")
]
WandbDir = Annotated[
    Path, typer.Option(file_okay=False, help="W&B keeps its files in DIR/wandb.", metavar="DIR")
]
Offline = Annotated[
    bool, typer.Option("--offline", help="W&B without its server; later: wandb sync.")
]


def log(
    job: JobName = LATEST,
    tensorboard: TensorBoardDir = None,
    wandb: WandbProject = None,
    wandb_dir: WandbDir = Path(),
    offline: Offline = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Log a job into TensorBoard or Weights & Biases until it is over, also one that is.

    Run again, it adds what is missing. Needs keel-gateway[tensorboard] or keel-gateway[wandb].
    """
    opens = chosen(tensorboard, wandb, wandb_dir, offline=offline)
    if not opens:
        raise InvalidField("--tensorboard", None, "a folder; or --wandb PROJECT; or both")
    with GatewayClient(find_url(url)) as client:
        found = client.find(job)
        with opened(opens, found) as sinks:
            begun = [sink.last_step for sink in sinks]
            for view in logged(client, follow(client, found.id, every_s=POLL_S), sinks):
                found = view.job
        places = [sink.place for sink in sinks]
    if as_json:
        told = [
            {"place": place, "first_step": before + 1, "last_step": sink.last_step}
            for place, before, sink in zip(places, begun, sinks, strict=True)
        ]
        show_json({"job": found.model_dump(mode="json"), "sinks": told})
        return
    for place, before, sink in zip(places, begun, sinks, strict=True):
        rows = f"steps {before + 1} to {sink.last_step}"
        out.print(f"{rows if sink.last_step > before else 'nothing new'}: {place}", soft_wrap=True)


def chosen(
    tensorboard: Path | None, wandb: str | None, wandb_dir: Path, *, offline: bool
) -> Sequence[Open]:
    """How to open the sinks that were asked for."""
    opens: list[Open] = []
    if tensorboard is not None:
        require("tensorboard", "tensorboard")  # before anything is started
        opens.append(partial(TensorBoard, tensorboard))
    if wandb is not None:
        require("wandb", "wandb")
        opens.append(partial(WeightsAndBiases, wandb, wandb_dir, offline=offline))
    return opens
