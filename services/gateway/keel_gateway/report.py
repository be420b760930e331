"""A run's report: one HTML file with every curve, which needs no network and asks for none.

Made of what the gateway answers, or of what `keel run` left in its folder, also of a job that
still runs. Whatever is missing there is missing in the report, and nothing else: zero rows, absent
columns and nulls are all fine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from keel.metrics import COLUMNS, Row
from keel.objectives import SWITCHES
from keel.record import Phase
from keel.spec import RecipeSpec
from keel_gateway.admission import R3_FROM
from keel_gateway.curves import SMOOTHING_SHARE
from keel_gateway.engine_view import FAMILY, engines_of, who_served
from keel_gateway.page import NONE, moment, number, render
from keel_gateway.panels import columns, of_run
from keel_gateway.run_folder import RunData
from keel_gateway.sample_view import sample_view
from keel_gateway.summary import (
    Summary,
    column,
    duration,
    first_tenth,
    last_tenth,
    mean,
    trained_rows,
)

Job = Mapping[str, Any]

READING = (
    f"Where a line is drawn over a faint one, it is the mean of the last {SMOOTHING_SHARE:.0%} of "
    "the steps. Drag to zoom, double-click to return."
)
_NOT_MEASURED = ("step", "lap", "policy_version")


def build_report(run: RunData, *, made: datetime | None = None) -> str:
    """The report as HTML, made now unless told otherwise. All that users wrote is escaped."""
    job, rows = run.job, sorted(run.rows, key=lambda row: row.get("step") or 0)
    found = Summary.of(rows)
    shown = of_run(rows) + who_served(rows, job)
    samples, metrics, spec = sample_view(run.samples), _metrics(rows), _toml(job.get("spec") or {})
    titles = [(part.id, part.title) for part in shown]
    titles += [
        (id_, title)
        for id_, title, there in (
            ("samples", "Samples", samples),
            ("numbers", "Numbers", metrics),
            ("job", "Job", spec),
        )
        if there
    ]
    return render(
        "report.html.jinja",
        name=str(job.get("name") or "run"),
        where=" · ".join(filter(None, (str(job.get("id") or ""), _phase(job), _created(job)))),
        made=_made(job, made or datetime.now(UTC)),
        running=not _over(job),
        error=str(job.get("error") or ""),
        recipe=_recipe(job.get("spec") or {}),
        numbers=_numbers(job, rows, found),
        replay=found.replay,
        obeyed=found.obeyed,
        titles=titles,
        sections=shown,
        reading=READING,
        samples=samples,
        left_out=_left_out(samples),
        metrics=metrics,
        spec=spec,
    )


def _phase(job: Job) -> str:
    return str(job.get("phase") or "")


def _over(job: Job) -> bool:
    """Nothing more will come. A folder without a job has no phase, and no gateway to ask."""
    return _phase(job) in ("", *(phase for phase in Phase if phase.final))


def _made(job: Job, now: datetime) -> str:
    when = f"Report made {moment(now)}"
    if _over(job):
        return f"{when}."
    kind = "cold_start_step" if _phase(job) == Phase.COLD_START else "step"
    return (
        f"{when}, while the job goes on: {_phase(job)}, at step {job.get(kind, 0):,} of "
        f"{number(job.get(f'{kind}s'), ',')}. For a newer one: keel report {job.get('id')}"
    )


def _numbers(job: Job, rows: Sequence[Row], found: Summary) -> list[tuple[str, str]]:
    trained = trained_rows(rows)
    return [
        ("reward, first → last tenth", _pair(found.reward_first, found.reward_last, ".3f")),
        ("held-out accuracy", _pair(found.accuracy_first, found.accuracy_last, ".3f")),
        ("steps", f"{job.get('step', found.steps):,} of {number(job.get('steps'), ',')}"),
        ("mean mismatch/k3", number(mean(column(trained, "mismatch/k3")), ".2e")),
        ("mean staleness/k3", number(mean(column(trained, "staleness/k3")), ".2e")),
        ("routes that differ", number(mean(column(trained, "routing/pair_disagree")), ".1%")),
        ("response tokens a second", number(found.tokens_per_s, ",.0f")),
        ("time", _took(job)),
    ]


def _recipe(spec: Job) -> str:
    """The spec in one sentence; empty where there is none, or one of another version of Keel."""
    try:
        recipe, engine, rollout = spec["recipe"], spec["engine"], spec["rollout"]
        replay, n = recipe["replay"], recipe["off_policiness"]
        if replay == "auto":
            meant = "none" if n == 1 else "R3" if n >= R3_FROM else "R2"
            replay = f"auto ({meant} at N = {n}, if the model has experts)"
        return (
            f"{spec['model']['path']} on {spec['task']['dataset']}, seed {spec['seed']}: "
            f"{_objective(recipe)}, replay {replay}, N = {n} mini-batches a lap of "
            f"{recipe['groups_per_minibatch']} groups of {rollout['group_size']} responses, "
            f"learning rate {recipe['learning_rate']:g}; {_engines(engine)} in "
            f"{engine['dtype']}, quantize {engine['quantize']}; cold start of "
            f"{spec['cold_start']['steps']} steps."
        )
    except (KeyError, ValueError):
        return ""


def _engines(engine: Mapping[str, Any]) -> str:
    kind, count = engine["kind"], engine.get("count")
    kinds = kind if isinstance(kind, str) else " and ".join(kind)
    return f"{count} engines {kinds}" if (count or 1) > 1 else f"engine {kinds}"


def _objective(recipe: Mapping[str, Any]) -> str:
    """The objective, and every switch that it would have set otherwise by itself."""
    objective = recipe["objective"]
    usual = RecipeSpec(steps=1, objective=objective)
    own = [
        f"{key} {json.dumps(recipe[key])}"
        for key in SWITCHES
        if key in recipe and recipe[key] != getattr(usual, key)
    ]
    return f"{objective} with {', '.join(own)}" if own else objective


def _metrics(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every column that has a value: its first and last tenth, least and largest."""
    lines, alone = [], len(engines_of(rows)) < 2  # one engine's columns say what the run's do
    for name in columns(rows):
        if alone and name.startswith(FAMILY):
            continue
        having = [row for row in rows if row.get(name) is not None]
        if name in _NOT_MEASURED or not having:
            continue
        values = column(having, name)
        ends = [mean(column(part(having), name)) for part in (first_tenth, last_tenth)]
        cells = [number(value, ".4g") for value in (*ends, min(values), max(values))]
        lines.append({"name": name, "meaning": COLUMNS.get(name, ""), "cells": cells})
    return lines


def _left_out(samples: Mapping[str, Any] | None) -> str:
    if not samples or not samples["left_out"]:
        return ""
    shown = len(samples["groups"])
    return f"Of {samples['left_out'] + shown:,} groups that were kept, {shown:,} are here."


def _toml(spec: Job) -> str:
    """The job file, every default written out."""
    plain = {name: value for name, value in spec.items() if not isinstance(value, Mapping)}
    tables = {name: value for name, value in spec.items() if isinstance(value, Mapping)}
    return "\n\n".join(
        "\n".join(lines)
        for lines in (
            _assign(plain),
            *([f"[{name}]", *_assign(values)] for name, values in tables.items()),
        )
        if lines
    )


def _assign(values: Mapping[str, Any]) -> list[str]:
    return [
        f"# {name}: none" if value is None else f"{name} = {_value(value)}"
        for name, value in values.items()
    ]


def _value(value: Any) -> str:
    """A value as TOML: JSON's way, but for tables, which have no null either."""
    if isinstance(value, Mapping):
        inside = (f"{key} = {_value(one)}" for key, one in value.items() if one is not None)
        return f"{{ {', '.join(inside)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _pair(first: float | None, last: float | None, form: str) -> str:
    return f"{number(first, form)} → {number(last, form)}" if first is not None else NONE


def _created(job: Job) -> str:
    created = _time(job.get("created_at"))
    return f"submitted {moment(created)}" if created else ""


def _took(job: Job) -> str:
    started, finished = _time(job.get("started_at")), _time(job.get("finished_at"))
    return duration((finished - started).total_seconds()) if started and finished else NONE


def _time(text: object) -> datetime | None:
    return datetime.fromisoformat(str(text)) if text else None
