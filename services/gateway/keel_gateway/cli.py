"""The command `keel`. Other distributions add to it through the entry point group `keel.commands`.

Exit statuses and --json: `cli_group`.
"""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from keel.spec import load_spec
from keel_gateway import cli_engines
from keel_gateway.cli_export import export
from keel_gateway.cli_group import EXIT_STATUSES, FAILED, KeelGroup, err, exit_for, out, show_json
from keel_gateway.cli_init import init
from keel_gateway.cli_ledger import dead_letters, ledger
from keel_gateway.cli_log import Offline, TensorBoardDir, WandbDir, WandbProject, chosen, log
from keel_gateway.cli_options import Device, File, JobName, Json, Set, Threads, Url
from keel_gateway.cli_report import compare_jobs, report
from keel_gateway.cli_samples import samples
from keel_gateway.client import DEFAULT_DIR, LATEST, GatewayClient, find_url
from keel_gateway.doctor import checks, say_check
from keel_gateway.engine_kinds import engines_of, parse_engines
from keel_gateway.follow import follow
from keel_gateway.run_local import run_local
from keel_gateway.schemas import Job
from keel_gateway.stack import Stack
from keel_gateway.summary import duration
from keel_gateway.watch import POLL_S, dead_letters_note, watch, write_events

app = typer.Typer(
    cls=KeelGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning for Mixture-of-Experts language models, kept stable.",
    epilog=f"JOB is an id, the beginning of one, or '{LATEST}'.\n\nExit status: "
    + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_STATUSES.items())
    + ".",
)


@app.command()
def up(
    folder: Annotated[
        Path, typer.Option("--dir", file_okay=False, help="Data, logs and models.")
    ] = DEFAULT_DIR,
    port: Annotated[
        int, typer.Option(min=1, max=65535, envvar="KEEL_PORT", help="The gateway's.")
    ] = 8080,
    engines: Annotated[
        str,
        typer.Option(
            metavar="N|KIND=N|HOST:PORT,...",
            help="Rollout engines: 2, or torch=1,vllm=1; HOST:PORT is one that runs already.",
        ),
    ] = "1",
    device: Device = "cpu",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Start everything on this machine and keep it running, until Ctrl-C."""
    say = err if as_json else out
    say.print(f"Starting Keel's services; logs in {folder / 'logs'}")
    kinds = parse_engines(engines)
    with Stack(folder, port=port, engines=kinds, device=device, threads=threads) as stack:
        if as_json:
            show_json({"url": stack.url, "dir": str(stack.dir), "metrics": stack.metrics})
        say.print(f"Keel is up at [bold]{stack.url}[/] (API pages: {stack.url}/docs)")
        say.print("Submit a job:  keel submit examples/multiplication.toml --watch")
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            say.print("Stopping; jobs go on from their last checkpoint when Keel is up again")


@app.command()
def submit(
    file: File,
    settings: Set = None,
    url: Url = None,
    follow_it: Annotated[bool, typer.Option("--watch", help="Then watch it.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a job file."""
    spec = load_spec(file, settings or ())
    with GatewayClient(find_url(url)) as client:
        job = client.submit(spec)
        if follow_it:
            if not as_json:  # the first event names it
                out.print(f"Submitted {job.id}")
            _watch(client, job, as_json=as_json)
        elif as_json:
            show_json(job.model_dump(mode="json"))
        else:
            out.print(job.id)
            if job.reason:
                out.print(job.reason, style="dim", markup=False, soft_wrap=True)


@app.command()
def jobs(
    url: Url = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most jobs.")] = 20,
    as_json: Json = False,
) -> None:
    """List jobs, the last submitted first."""
    with GatewayClient(find_url(url)) as client:
        found = client.jobs(limit)
    if as_json:
        return show_json({"jobs": [job.model_dump(mode="json") for job in found]})
    table = Table("Job", "Phase", "Step", "Age", "Note", box=None, header_style="dim")
    for job in found:
        age = duration((datetime.now(UTC) - job.created_at).total_seconds())
        note = "; ".join(filter(None, [job.error or job.reason, dead_letters_note(job)]))
        table.add_row(job.id, str(job.phase), f"{job.step}/{job.steps}", age, escape(note))
    return out.print(table if found else "No jobs yet: keel submit FILE")


@app.command("watch")
def watch_job(job: JobName = LATEST, url: Url = None, as_json: Json = False) -> None:
    """Watch a job until it is over: rewards, both KLs, clipping, routing, speed.

    With --json a line for each change: {"event": "job", "job": ...}, {"event": "row", "row": ...}
    (a row comes again when it has grown), {"event": "lost", "detail": ...}.
    """
    with GatewayClient(find_url(url)) as client:
        _watch(client, client.find(job), as_json=as_json)


@app.command()
def cancel(job: JobName, url: Url = None, as_json: Json = False) -> None:
    """Cancel a job; its last checkpoint stays."""
    with GatewayClient(find_url(url)) as client:
        done = client.cancel(client.find(job).id)
    if as_json:
        return show_json(done.model_dump(mode="json"))
    return out.print(f"{done.id} {done.phase if done.phase.final else 'is stopping'}")


@app.command()
def pause(job: JobName, url: Url = None, as_json: Json = False) -> None:
    """Stop a job before its next lap; it keeps its engine, and goes on with the same bits."""
    with GatewayClient(find_url(url)) as client:
        done = client.pause(client.find(job).id)
    if as_json:
        return show_json(done.model_dump(mode="json"))
    return out.print(f"{done.id} {'is paused' if done.paused else 'pauses before its next lap'}")


@app.command()
def resume(job: JobName, url: Url = None, as_json: Json = False) -> None:
    """Have a paused job go on."""
    with GatewayClient(find_url(url)) as client:
        done = client.resume(client.find(job).id)
    if as_json:
        return show_json(done.model_dump(mode="json"))
    return out.print(f"{done.id} goes on")


@app.command()
def checkpoints(job: JobName = LATEST, url: Url = None, as_json: Json = False) -> None:
    """List a job's checkpoints, the oldest first: steps for keel export."""
    with GatewayClient(find_url(url)) as client:
        found = client.checkpoints(client.find(job).id)
    if as_json:
        return show_json({"checkpoints": [one.model_dump(mode="json") for one in found]})
    table = Table("Step", "Version", "Age", "Size", "Folder", box=None, header_style="dim")
    for one in found:
        age = duration((datetime.now(UTC) - one.created_at).total_seconds())
        version = "cold start" if one.policy_version is None else str(one.policy_version)
        size = f"{one.size_bytes / 1e6:,.1f} MB"
        table.add_row(str(one.step), version, age, size, escape(one.folder))
    return out.print(table if found else "No checkpoint yet")


app.add_typer(cli_engines.app, name="engines")
app.command()(report)
app.command("compare")(compare_jobs)


@app.command()
def run(
    file: File,
    folder: Annotated[
        Path, typer.Option("--out", file_okay=False, help="Job, metrics, report and model.")
    ],
    settings: Set = None,
    engines: Annotated[
        str | None,
        typer.Option(
            metavar="N|KIND=N|HOST:PORT,...",
            help="Engines: 2, or torch=1,vllm=1; HOST:PORT is one that runs already. Left out: "
            "those that the job asks for are started.",
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = 1,
    tensorboard: TensorBoardDir = None,
    wandb: WandbProject = None,
    wandb_dir: WandbDir = Path(),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Run one job from nothing, on services of its own, and leave its report and model.

    With --json the lines of `keel watch --json`, the last one {"event": "done", ...}.
    """
    show = write_events if as_json else partial(watch, console=out)
    console = err if as_json else out
    sinks = chosen(tensorboard, wandb, wandb_dir, offline=offline)
    spec = load_spec(file, settings or ())
    kinds = parse_engines(engines, spec.engine.kinds) if engines else engines_of(spec.engine)
    job = run_local(
        *(spec, folder, console, show),
        engines=kinds,
        device=device,
        threads=threads,
        sinks=sinks,
    )
    if as_json:
        show_json({"event": "done", "job": job.model_dump(mode="json"), "out": str(folder)})
    exit_for(job)


app.command()(ledger)
app.command("dead-letters")(dead_letters)
app.command()(log)
app.command()(samples)
app.command()(init)
app.command()(export)


@app.command()
def doctor(
    url: Url = None,
    folder: Annotated[
        Path, typer.Option("--dir", file_okay=False, help="Of keel up, or keel run --out.")
    ] = DEFAULT_DIR,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Look for what a run would lack on this machine, and say how to mend it."""
    found = []
    for check in checks(find_url(url), folder, device):
        found.append(check)
        if not as_json:
            say_check(check, out)
    healthy = all(check.state != "fail" for check in found)
    if as_json:
        show_json({"ok": healthy, "checks": [asdict(check) for check in found]})
    else:
        out.print("A run can work here." if healthy else "No run can work here yet.")
    if not healthy:
        raise typer.Exit(FAILED)


def _watch(client: GatewayClient, job: Job, *, as_json: bool) -> None:
    show = write_events if as_json else partial(watch, console=out)
    try:
        job = show(follow(client, job.id, every_s=POLL_S))
    except KeyboardInterrupt:
        say = err if as_json else out
        say.print(f"The job goes on; keel watch {job.id}, or keel cancel {job.id}")
        raise
    exit_for(job)


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
