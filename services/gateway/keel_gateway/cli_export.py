"""`keel export`: the final model of a job, or one of its checkpoints, as a Hugging Face folder.

Files are read where the trainer has written them, so it runs on the trainer's machine or on one
that shares its disk. What needs torch is done by `keel_trainer.export` in a process of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from keel.errors import InvalidField, KeelError, NotFound
from keel_gateway.cli_group import err, out, show_json
from keel_gateway.cli_options import JobOrRun, Json, Url
from keel_gateway.client import GatewayClient, find_url
from keel_gateway.run_folder import JOB
from keel_gateway.run_local import MODEL, STACK
from keel_gateway.schemas import Job


class ExportError(KeelError):
    """A model cannot be exported; the message is that of whoever tried."""


@dataclass(frozen=True, slots=True)
class Source:
    """A job's files on this machine."""

    job: Job
    model: Path | None
    """Folder of the final model; None: the job has none."""
    artifact: Path
    """Folder of the base model."""
    checkpoints: dict[int, Path]
    """Folder by optimizer step."""


def export(
    job: JobOrRun,
    folder: Annotated[
        Path, typer.Option("--out", file_okay=False, help="New or empty folder for the model.")
    ],
    step: Annotated[
        int | None, typer.Option(min=0, help="Of the checkpoint after this step; else the end.")
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Export a job's model: a folder that transformers loads, tokenizer and chat template too.

    The chat template is the job's, if it has one of its own, else the base model's.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InvalidField("--out", str(folder), "a new or empty folder")
    source = of_folder(Path(job)) if (Path(job) / JOB).is_file() else of_gateway(job, url)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    if step is None and source.model is not None:
        copy_model(source.model, temporary)
    else:
        step = checked_step(source, step)
        if not as_json:
            err.print("Loading the checkpoint ...", style="dim")
        convert(source, step, temporary)
    if folder.is_dir():
        folder.rmdir()
    temporary.rename(folder)
    if as_json:
        return show_json({"job": source.job.id, "step": step, "out": str(folder)})
    what = "the final model" if step is None else f"step {step}"
    return out.print(f"{folder}: {what} of {source.job.id}", soft_wrap=True)


def of_gateway(text: str, url: str | None) -> Source:
    """Where the gateway says that a job's files are."""
    with GatewayClient(find_url(url)) as client:
        job = client.find(text)
        checkpoints = client.checkpoints(job.id)
    return Source(
        job,
        Path(job.model) if job.model else None,
        Path(job.artifact),
        {found.step: Path(found.folder) for found in checkpoints},
    )


def of_folder(folder: Path) -> Source:
    """What `keel run --out folder` has left, wherever it lies now."""
    try:
        job = Job.model_validate_json((folder / JOB).read_text(encoding="utf-8"))
    except ValidationError as error:
        raise InvalidField("JOB", str(folder / JOB), "a job of keel run") from error
    run = folder / STACK / "jobs" / job.id
    preset = job.spec.model.path.startswith("preset:")
    return Source(
        job,
        folder / MODEL if (folder / MODEL).is_dir() else None,
        run / "base" if preset else Path(job.spec.model.path).expanduser(),
        {int(found.name.split("-")[1]): found for found in sorted(run.glob("checkpoints/step-*"))},
    )


def checked_step(source: Source, step: int | None) -> int:
    """The step, or InvalidField naming those that there are."""
    if step is not None and step in source.checkpoints:
        return step
    valid = f"one of {', '.join(map(str, sorted(source.checkpoints)))}"
    if not source.checkpoints:
        valid = "nothing yet: no checkpoint ([checkpoint] every writes some on the way)"
    if step is None:
        valid += f"; the job is {source.job.phase} and has no final model"
    raise InvalidField("--step", step, valid)


def copy_model(model: Path, folder: Path) -> None:
    """Copies a model folder."""
    if not model.is_dir():
        raise NotFound(f"{model} is not on this machine: run keel export where the trainer runs")
    shutil.copytree(model, folder)


def convert(source: Source, step: int, folder: Path) -> None:
    """Has the trainer's distribution turn a checkpoint into a model folder."""
    checkpoint = source.checkpoints[step]
    if not checkpoint.is_dir():
        raise NotFound(
            f"{checkpoint} is not on this machine: run keel export where the trainer runs"
        )
    template = source.job.spec.model.chat_template
    done = subprocess.run(
        [
            *(sys.executable, "-m", "keel_trainer.export"),
            *("--artifact", str(source.artifact), "--checkpoint", str(checkpoint)),
            *("--dtype", source.job.spec.model.dtype, "--out", str(folder)),
            *([] if template is None else ["--chat-template", template]),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ExportError((done.stderr.strip().splitlines() or ["no message"])[-1])
