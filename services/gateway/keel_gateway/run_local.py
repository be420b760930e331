"""`keel run`: one job from nothing to its report, on a stack that lives as long as it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from keel.errors import InvalidField
from keel.metrics import Row
from keel.record import Phase
from keel.samples import Sample
from keel.spec import RunSpec
from keel_gateway.client import GatewayClient
from keel_gateway.follow import View, follow
from keel_gateway.page import write_page
from keel_gateway.report import build_report
from keel_gateway.run_folder import JOB, LEDGER, METRICS, SAMPLES, RunData, write_run
from keel_gateway.schemas import Job
from keel_gateway.sinks.base import Open, logged, opened
from keel_gateway.stack import Stack
from keel_gateway.stack_folder import is_stack, lock_folder
from keel_gateway.summary import Summary, duration
from keel_gateway.watch import POLL_S

REPORT, MODEL, STACK = "report.html", "model", "stack"
"""What it leaves beside job, metrics and samples. The stack's folder has logs and checkpoints."""


def run_local(
    spec: RunSpec,
    out: Path,
    console: Console,
    show: Callable[[Iterable[View]], Job],
    *,
    engines: Sequence[str],
    device: str,
    threads: int,
    sinks: Sequence[Open] = (),
) -> Job:
    """Runs `spec` on a stack of its own and leaves what came of it in `out`.

    Job, metrics, samples, ledger, report and model; of a run that fails all but the
    model. Returns the job as it ended.

    Args:
        engines: the kind of each engine that is started, or the address of one that runs already.
        console: takes what is told before and after.
        show: shows the run until it is over, and returns its job.
        sinks: take its rows meanwhile.

    Raises:
        InvalidField: `out` has something else in it.
        StackError: the services do not come up.
    """
    began = time.monotonic()
    prepare(out)
    say(console, f"Starting Keel's services; logs in {out / STACK / 'logs'}")
    with Stack(out / STACK, engines=engines, device=device, threads=threads) as stack:
        with GatewayClient(stack.url) as client:
            job = client.submit(spec)
            say(console, f"Job {job.id} at {stack.url}/v1/jobs/{job.id}")
            try:
                with opened(sinks, job) as taking:
                    views = follow(client, job.id, every_s=POLL_S)
                    job = show(logged(client, views, taking))
            finally:
                rows, samples = client.metrics(job.id).rows, client.samples(job.id)
                job = client.job(job.id)
                leave(job, rows, samples, out)
        if job.model:
            shutil.copytree(job.model, out / MODEL)
    tell(job, rows, out, console, seconds=time.monotonic() - began)
    return job


def prepare(out: Path) -> None:
    """Empties `out` of an earlier run. InvalidField if anything else is in it, or a run goes on."""
    if out.exists() and not out.is_dir():
        raise InvalidField("--out", str(out), "a folder")
    out.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in out.iterdir()}
    stack = out / STACK
    if there and not is_stack(stack):
        raise InvalidField("--out", str(out), "a new or empty folder, or that of an earlier run")
    if there:
        lock_folder(stack, "--out").close()
    for name in {JOB, LEDGER, METRICS, SAMPLES, REPORT} & there:
        (out / name).unlink()
    for name in (MODEL, STACK):  # the mark that the folder is ours goes last
        if name in there:
            shutil.rmtree(out / name)


def leave(job: Job, rows: list[Row], samples: list[Sample], out: Path) -> None:
    """Writes job.json, metrics.jsonl, samples.jsonl, ledger.jsonl and report.html."""
    run = RunData(
        job.model_dump(mode="json"), rows, [sample.model_dump(mode="json") for sample in samples]
    )
    write_run(out, run)
    ledger = Path(job.folder) / LEDGER
    if job.folder and ledger.is_file():
        shutil.copyfile(ledger, out / LEDGER)
    write_page(out / REPORT, build_report(run))


def tell(job: Job, rows: list[Row], out: Path, console: Console, *, seconds: float) -> None:
    """Prints what came of the run, and where everything is."""
    found = Summary.of(rows)
    lines = [f"{job.id} {job.phase} after {duration(seconds)}, {found.steps} of {job.steps} steps"]
    if job.error:
        lines.append(f"Error: {job.error}")
    if found.reward_first is not None and found.reward_last is not None:
        lines.append(
            f"Mean reward, first tenth of the steps {found.reward_first:.3f}, "
            f"last tenth {found.reward_last:.3f} ({found.reward_last - found.reward_first:+.3f})"
        )
    if found.accuracy_first is not None and found.accuracy_last is not None:
        lines.append(f"Held-out accuracy {found.accuracy_first:.3f} -> {found.accuracy_last:.3f}")
    if found.steps:
        lines.append(found.replay)
    lines.append(f"Report  {out / REPORT}")
    if job.model:
        lines.append(f"Model   {out / MODEL}")
    if job.phase is not Phase.SUCCEEDED:
        lines.append(f"Logs    {out / STACK / 'logs'}")
    for text in lines:
        say(console, text)


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
