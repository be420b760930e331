"""The command `keel`. Other distributions add to it through the entry point group `keel.commands`.

Exit status: 0 done; 1 the run failed; 2 bad input; 3 no gateway answers; 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from keel.record import Phase
from keel.spec import load_spec
from keel_gateway.cli_group import RUN_FAILED, KeelGroup, out
from keel_gateway.client import DEFAULT_DIR, LATEST, GatewayClient, find_url
from keel_gateway.follow import follow
from keel_gateway.report import write_report
from keel_gateway.run_local import run_local
from keel_gateway.schemas import Job
from keel_gateway.stack import Stack
from keel_gateway.summary import duration
from keel_gateway.watch import POLL_S, watch

app = typer.Typer(
    cls=KeelGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning for Mixture-of-Experts language models, kept stable.",
    epilog=f"JOB is an id, the beginning of one, or '{LATEST}'.",
)

File = Annotated[
    Path,
    typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="Job file (TOML)."),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help=f"Id, its beginning, or '{LATEST}'.")]
Url = Annotated[
    str | None,
    typer.Option("--url", help="Gateway. Else KEEL_URL, `keel up` in this folder, port 8080."),
]
Device = Annotated[
    str, typer.Option(envvar="KEEL_DEVICE", help="Of engines and trainer: cpu, cuda or cuda:N.")
]
Threads = Annotated[
    int,
    typer.Option(
        min=1, envvar="KEEL_TORCH_THREADS", help="Of each engine and trainer; enters the rounding."
    ),
]


@app.command()
def up(
    folder: Annotated[
        Path, typer.Option("--dir", file_okay=False, help="Data, logs and models.")
    ] = DEFAULT_DIR,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The gateway's.")] = 8080,
    engines: Annotated[int, typer.Option(min=1, help="Rollout engines.")] = 1,
    device: Device = "cpu",
    threads: Threads = 1,
) -> None:
    """Start everything on this machine and keep it running, until Ctrl-C."""
    out.print(f"Starting Keel's services; logs in {folder / 'logs'}")
    with Stack(folder, port=port, engines=engines, device=device, threads=threads) as stack:
        out.print(f"Keel is up at [bold]{stack.url}[/] (API pages: {stack.url}/docs)")
        out.print("Submit a job:  keel submit examples/multiplication.toml --watch")
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            out.print("Stopping; jobs go on from their last checkpoint when Keel is up again")


@app.command()
def submit(
    file: File,
    url: Url = None,
    follow_it: Annotated[bool, typer.Option("--watch", help="Then watch it.")] = False,
) -> None:
    """Submit a job file."""
    spec = load_spec(file)
    with GatewayClient(find_url(url)) as client:
        job = client.submit(spec)
        if follow_it:
            out.print(f"Submitted {job.id}")
            _watch(client, job)
        else:
            out.print(job.id)
            if job.reason:
                out.print(job.reason, style="dim", markup=False, soft_wrap=True)


@app.command()
def jobs(
    url: Url = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most jobs.")] = 20,
) -> None:
    """List jobs, the last submitted first."""
    with GatewayClient(find_url(url)) as client:
        found = client.jobs(limit)
    table = Table("Job", "Phase", "Step", "Age", "Note", box=None, header_style="dim")
    for job in found:
        age = duration((datetime.now(UTC) - job.created_at).total_seconds())
        note = job.error or job.reason
        table.add_row(job.id, str(job.phase), f"{job.step}/{job.steps}", age, escape(note))
    out.print(table if found else "No jobs yet: keel submit FILE")


@app.command("watch")
def watch_job(job: JobName = LATEST, url: Url = None) -> None:
    """Watch a job until it is over: rewards, both KLs, clipping, routing, speed."""
    with GatewayClient(find_url(url)) as client:
        _watch(client, client.find(job))


@app.command()
def cancel(job: JobName, url: Url = None) -> None:
    """Cancel a job; its last checkpoint stays."""
    with GatewayClient(find_url(url)) as client:
        done = client.cancel(client.find(job).id)
    out.print(f"{done.id} {done.phase if done.phase.final else 'is stopping'}")


@app.command()
def engines(url: Url = None) -> None:
    """List rollout engines."""
    with GatewayClient(find_url(url)) as client:
        found = client.engines()
    table = Table("Address", "Kind", "State", "Job", "Note", box=None, header_style="dim")
    for engine in found:
        note = escape(engine.problem)
        table.add_row(engine.address, engine.kind or "?", engine.state or "?", engine.run, note)
    out.print(table if found else "The gateway was told of no engine (KEEL_ENGINES)")


@app.command()
def report(
    job: JobName = LATEST,
    file: Annotated[Path, typer.Option("--out", dir_okay=False, help="Where to write it.")] = Path(
        "report.html"
    ),
    url: Url = None,
) -> None:
    """Write a job's report: one HTML file that needs no network."""
    with GatewayClient(find_url(url)) as client:
        found = client.find(job)
        rows = client.metrics(found.id).rows
    write_report(file, found.model_dump(mode="json"), rows)
    out.print(f"{file}: {found.id}, {len(rows)} rows")


@app.command()
def run(
    file: File,
    folder: Annotated[
        Path, typer.Option("--out", file_okay=False, help="Job, metrics, report and model.")
    ],
    device: Device = "cpu",
    threads: Threads = 1,
) -> None:
    """Run one job from nothing, on services of its own, and leave its report and model."""
    if not run_local(load_spec(file), folder, out, device=device, threads=threads):
        raise typer.Exit(RUN_FAILED)


def _watch(client: GatewayClient, job: Job) -> None:
    try:
        job = watch(follow(client, job.id, every_s=POLL_S), out)
    except KeyboardInterrupt:
        out.print(f"The job goes on; keel watch {job.id}, or keel cancel {job.id}")
        raise
    if job.phase is not Phase.SUCCEEDED:
        raise typer.Exit(RUN_FAILED)


def main() -> None:
    """Console script."""
    # what Ctrl-C does, SIGTERM and a closed terminal do too: leave in order
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    logging.basicConfig(
        level=os.environ.get("KEEL_LOG_LEVEL", "WARNING").upper(),
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )
    app()
