"""`keel engines`: list them; empty one, and give it back."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from keel.errors import StateError
from keel.fleet import EngineState
from keel_gateway.cli_group import out, show_json
from keel_gateway.cli_options import Json, Url
from keel_gateway.client import GatewayClient, find_url
from keel_gateway.fleet_view import DRAINED, FREE
from keel_gateway.schemas import Engine

POLL_S = 0.5

app = typer.Typer(
    invoke_without_command=True,
    help="List rollout engines; drain one, to stop or replace it while its job goes on.",
)
Address = Annotated[
    str, typer.Argument(metavar="ADDRESS", help="As keel engines lists it: HOST:PORT.")
]


@app.callback()
def engines(ctx: typer.Context, url: Url = None, as_json: Json = False) -> None:
    """List rollout engines; drain one, to stop or replace it while its job goes on."""
    if ctx.invoked_subcommand is not None:
        ctx.obj = url
        return None
    with GatewayClient(find_url(url)) as client:
        found = client.engines()
    if as_json:
        return show_json({"engines": [engine.model_dump(mode="json") for engine in found]})
    headers = ("Address", "Kind", "State", "Job", "In job", "Version", "Note")
    table = Table(*headers, box=None, header_style="dim")
    for engine in found:
        version = "" if engine.proved_version is None else str(engine.proved_version)
        table.add_row(
            *(engine.address, engine.kind or "?", engine.state or "?", engine.run),
            *(engine.run_state, version, escape(engine.problem or engine.stale)),
        )
    return out.print(table if found else "The gateway was told of no engine (KEEL_ENGINES)")


@app.command()
def drain(
    ctx: typer.Context,
    address: Address,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is empty.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Have an engine finish what it has, leave its job, and be given to none.

    The job goes on with its other engines and gets a free one that suits in its place.
    """
    with GatewayClient(find_url(url or ctx.obj)) as client:
        engine = client.drain(address)
        while wait and engine.run_state != DRAINED:
            time.sleep(POLL_S)
            engine = next(one for one in client.engines() if one.address == address)
            if engine.run_state in (EngineState.JOINING, EngineState.READY, FREE):
                raise StateError(f"{address} was undrained meanwhile: it is {engine.run_state}")
    _told(engine, as_json)


@app.command()
def undrain(ctx: typer.Context, address: Address, url: Url = None, as_json: Json = False) -> None:
    """Give a drained engine to jobs again; one that still drains goes on in its job."""
    with GatewayClient(find_url(url or ctx.obj)) as client:
        engine = client.undrain(address)
    _told(engine, as_json)


def _told(engine: Engine, as_json: bool) -> None:
    if as_json:
        return show_json(engine.model_dump(mode="json"))
    of = f" in {engine.run}" if engine.run else ""
    return out.print(f"{engine.address} is {engine.run_state}{of}", soft_wrap=True, markup=False)
