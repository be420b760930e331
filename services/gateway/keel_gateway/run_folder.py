"""What `keel run` leaves in its folder, written and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel import ledger
from keel.errors import InvalidField
from keel.metrics import Row

JOB, METRICS, SAMPLES = "job.json", "metrics.jsonl", "samples.jsonl"
LEDGER = ledger.FILE


@dataclass(frozen=True, slots=True)
class RunData:
    """All that is known of a run, as the gateway answers it. Anything may be missing."""

    job: Mapping[str, Any]
    rows: Sequence[Row]
    """Ascending by step."""
    samples: Sequence[Mapping[str, Any]] = ()
    """As `keel.samples` has them."""

    @property
    def label(self) -> str:
        """Its id."""
        return str(self.job.get("id") or self.job.get("name") or "run")


def is_run_path(text: str) -> bool:
    """Whether `text` is a folder or a file of metric rows, rather than the id of a job."""
    path = Path(text)
    return (
        "/" in text
        or path.suffix == ".jsonl"
        or any((path / name).is_file() for name in (JOB, METRICS, LEDGER))
    )


def write_run(folder: Path, run: RunData) -> None:
    """Writes job, metrics and samples, over those of an earlier run."""
    (folder / JOB).write_text(json.dumps(dict(run.job), indent=2) + "\n")
    (folder / METRICS).write_text(_lines(run.rows))
    (folder / SAMPLES).write_text(_lines(run.samples))


def read_run(path: Path) -> RunData:
    """The run of a folder, or of a file of metric rows alone.

    Raises:
        InvalidField: the path is not there, or a file of it is not what `keel run` writes.
    """
    if not path.exists():
        raise InvalidField("JOB", str(path), "a job, a folder left by `keel run`, or its metrics")
    if path.is_file():
        rows = _objects(path)
        return RunData({"name": path.stem, "id": str(path)}, _by_step(rows, path))
    job_file, metrics, samples = (path / name for name in (JOB, METRICS, SAMPLES))
    jobs = _objects(job_file, whole=True) if job_file.is_file() else [{"name": path.name}]
    return RunData(
        {"id": str(path)} | jobs[0],
        _by_step(_objects(metrics), metrics) if metrics.is_file() else [],
        _objects(samples) if samples.is_file() else [],
    )


def _lines(values: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(dict(value)) + "\n" for value in values)


def _by_step(rows: list[dict[str, Any]], path: Path) -> list[Row]:
    for line, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise InvalidField(f"{path}, row {line}", row.get("step"), "a number in 'step'")
    return sorted(rows, key=lambda row: row["step"])


def _objects(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """JSON objects: one a line, or the whole file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidField(str(path), str(error), "UTF-8 text") from error
    found = []
    # not splitlines: text of samples may hold characters that it takes for the end of a line
    for number, line in enumerate([text] if whole else text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InvalidField(f"{path}, line {number}", line[:80], "JSON") from error
        if not isinstance(value, dict):
            raise InvalidField(f"{path}, line {number}", line[:80], "a JSON object")
        found.append(value)
    return found
