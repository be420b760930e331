"""Several runs over one another: their curves in one picture each, key numbers, differing keys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from keel.metrics import Row
from keel_gateway.charts import Line
from keel_gateway.page import moment, number, render
from keel_gateway.panels import columns, of_runs
from keel_gateway.report import READING
from keel_gateway.run_folder import RunData
from keel_gateway.summary import KeyNumber, key_numbers

ABSENT = "(no such key)"


@dataclass(frozen=True, slots=True)
class Compared:
    """A number of each run, or a key of each job."""

    name: str
    cells: Sequence[str]
    """One a run; numbers with their difference from the first run's."""
    values: Sequence[Any]
    """The same for machines; null where a run has none."""
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What there is to say of some runs beside their curves."""

    labels: Sequence[str]
    last_step: int
    """Of those that all runs have; the numbers are of no later ones."""
    over: str
    """Which steps the numbers are of."""
    numbers: Sequence[Compared]
    differences: Sequence[Compared]
    """Keys of the job files, `section.key`, that are not the same in all."""


def compare(runs: Sequence[RunData]) -> Comparison:
    """Key numbers over the steps that all runs have, and the keys in which their jobs differ."""
    last = [_last_step(run.rows) for run in runs]
    common = min((step for step in last if step), default=0)
    rows = [[row for row in run.rows if (row.get("step") or 0) <= common] for run in runs]
    held_out = [n for n in columns([row for part in rows for row in part]) if n.startswith("eval/")]
    if not common:
        over = "No run has taken a step yet."
    else:
        over = f"Over steps 1 to {common:,}"
        if set(last) != {common}:
            over += ", which all runs that have begun have; the curves show all of each run"
        over += ". In brackets: the difference from the first run."
    return Comparison(
        _labels(runs),
        common,
        over,
        _numbers([key_numbers(part, held_out) for part in rows]),
        _differences([_flat(run.job.get("spec") or {}) for run in runs]),
    )


def build_comparison(runs: Sequence[RunData], *, made: datetime | None = None) -> str:
    """The comparison as HTML. All that users wrote is escaped."""
    found = compare(runs)
    shown = of_runs([(label, run.rows) for label, run in zip(found.labels, runs, strict=True)])
    return render(
        "compare.html.jinja",
        title=" against ".join(found.labels),
        made=f"Comparison made {moment(made or datetime.now(UTC))}.",
        runs=[
            {"line": Line("", place, called=label), "says": _says(run)}
            for place, (label, run) in enumerate(zip(found.labels, runs, strict=True))
        ],
        titles=[
            ("numbers", "Key numbers"),
            ("spec", "What differs"),
            *((part.id, part.title) for part in shown),
        ],
        labels=found.labels,
        over=found.over,
        numbers=found.numbers,
        differences=found.differences,
        sections=shown,
        reading=READING,
    )


def _says(run: RunData) -> str:
    job = run.job
    steps = f"step {_last_step(run.rows):,} of {number(job.get('steps'), ',')}"
    return " · ".join(filter(None, (str(job.get("phase") or ""), steps)))


def _labels(runs: Sequence[RunData]) -> list[str]:
    """Ids, numbered where one comes again."""
    labels: list[str] = []
    for run in runs:
        seen = sum(other.label == run.label for other in runs[: len(labels)])
        labels.append(f"{run.label} ({seen + 1})" if seen else run.label)
    return labels


def _last_step(rows: Sequence[Row]) -> int:
    return max((row.get("step") or 0 for row in rows), default=0)


def _numbers(runs: Sequence[Sequence[KeyNumber]]) -> list[Compared]:
    compared = []
    for same in zip(*runs, strict=True):
        first = same[0]
        cells = [number(first.value, first.form)]
        for other in same[1:]:
            both = first.value is not None and other.value is not None
            change = f" ({other.value - first.value:+{first.form}})" if both else ""
            cells.append(number(other.value, first.form) + change)
        if any(one.value is not None for one in same):
            compared.append(Compared(first.name, cells, [one.value for one in same]))
    return compared


def _differences(jobs: Sequence[Mapping[str, Any]]) -> list[Compared]:
    compared = []
    for key in sorted({key for job in jobs for key in job}):
        cells = [_text(job[key]) if key in job else ABSENT for job in jobs]
        if len(set(cells)) > 1:
            compared.append(Compared(key, cells, [job.get(key) for job in jobs]))
    return compared


def _flat(spec: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys as `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in spec.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
