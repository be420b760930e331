"""`keel report` and `keel compare`: pages of runs, on a gateway or in the folders of `keel run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from keel.errors import InvalidField
from keel_gateway.cli_group import out, show_json
from keel_gateway.cli_options import JobOrRun, Json, Url, complete_job
from keel_gateway.client import LATEST, GatewayClient, find_url
from keel_gateway.compare import Compared, build_comparison, compare
from keel_gateway.page import write_page
from keel_gateway.report import build_report
from keel_gateway.run_folder import RunData, is_run_path, read_run

_WHICH = f"Id, its beginning, '{LATEST}', or a folder left by keel run."


def report(
    job: JobOrRun = LATEST,
    file: Annotated[Path, typer.Option("--out", dir_okay=False, help="Where to write it.")] = Path(
        "report.html"
    ),
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Write a job's report: one HTML file that needs no network. Also of a job that still runs."""
    run = load(job, url)
    write_page(file, build_report(run))
    found = {"out": str(file), "job": run.label, "rows": len(run.rows), "samples": len(run.samples)}
    if as_json:
        return show_json(found)
    return out.print(f"{file}: {run.label}, {len(run.rows)} rows", markup=False, soft_wrap=True)


def compare_jobs(
    jobs: Annotated[
        list[str], typer.Argument(metavar="JOB JOB...", autocompletion=complete_job, help=_WHICH)
    ],
    file: Annotated[Path, typer.Option("--out", dir_okay=False, help="Where to write it.")] = Path(
        "compare.html"
    ),
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Compare jobs: curves over one another (one HTML file), key numbers, keys that differ."""
    if len(jobs) < 2:
        raise InvalidField("JOB", " ".join(jobs), "two jobs or more")
    runs = [load(job, url) for job in jobs]
    found = compare(runs)
    write_page(file, build_comparison(runs))
    if as_json:
        return show_json(
            {
                "out": str(file),
                "jobs": found.labels,
                "last_step": found.last_step,
                "numbers": {one.name: one.values for one in found.numbers},
                "differences": {one.name: one.values for one in found.differences},
            }
        )
    out.print(found.over, markup=False, soft_wrap=True)
    out.print(_table("number", found.labels, found.numbers))
    if found.differences:
        out.print(_table("key", found.labels, found.differences))
    else:
        out.print("No key of the job files differs")
    return out.print(f"{file}: the curves over one another", markup=False, soft_wrap=True)


def load(job: str, url: str | None) -> RunData:
    """A run by path, or from the gateway."""
    if is_run_path(job):
        return read_run(Path(job))
    with GatewayClient(find_url(url)) as client:
        return fetch(client, client.find(job).id)


def fetch(client: GatewayClient, job: str) -> RunData:
    """All that a gateway knows of a run."""
    rows, samples = client.metrics(job).rows, client.samples(job)
    return RunData(
        client.job(job).model_dump(mode="json"),
        rows,
        [sample.model_dump(mode="json") for sample in samples],
    )


def _table(head: str, labels: Sequence[str], lines: Sequence[Compared]) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column(head)
    for label in labels:
        table.add_column(escape(label), justify="right", overflow="fold")
    for line in lines:
        table.add_row(escape(line.name), *map(escape, line.cells))
    return table
