"""A run's report: one HTML file with every curve, which needs no network and asks for none.

Made of the job, as the gateway answers it, and of its metric rows. Whatever is missing there is
missing in the report, and nothing else: zero rows, absent columns and nulls are all fine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from keel.metrics import COLUMNS, Row
from keel_gateway.admission import R3_FROM
from keel_gateway.charts import CHARTS, SMOOTHING_SHARE, Chart, with_lap_maxima
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

MOST_POINTS = 4000
"""Steps drawn; of a longer run every k-th, and those with an evaluation."""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
"""The browser itself keeps the page off the network."""
_INTRODUCTION = (
    f'<p class="soft lead">Where a line is drawn over a faint one, it is the mean of the last '
    f"{SMOOTHING_SHARE:.0%} of the steps. Drag to zoom, double-click to return.</p>"
    '<section class="charts">'
)
NONE = "-"
"""Stands for a number that there is not."""
_NOT_MEASURED = ("step", "lap", "policy_version")


def write_report(path: Path, job: Job, rows: Sequence[Row]) -> None:
    """Writes the report, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(build_report(job, rows), encoding="utf-8")


def build_report(job: Job, rows: Sequence[Row]) -> str:
    """The report as HTML. All that users wrote is escaped."""
    rows = sorted(rows, key=lambda row: row.get("step") or 0)
    drawn = thinned(with_lap_maxima(rows))
    charts = [chart for chart in CHARTS if chart.shown(drawn)]
    # "<" would let a name end the script element that holds the data
    data = json.dumps([chart.figure(drawn) for chart in charts]).replace("<", "\\u003c")
    name = escape(str(job.get("name", "run")))
    body = "".join(
        [
            _header(job, rows),
            _INTRODUCTION if charts else "<p>No step has been taken yet.</p>",
            *(_card(number, chart, drawn) for number, chart in enumerate(charts)),
            "</section>" if charts else "",
            _table(rows),
            _spec(job),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: Keel run report</title><style>{_asset('report.css')}</style></head>"
        f"<body><main>{body}</main>"
        f'<script type="application/json" id="charts">{data}</script>'
        f"<script>{get_plotlyjs()}</script><script>{_asset('report.js')}</script></body></html>\n"
    )


def thinned(rows: Sequence[Row]) -> list[Row]:
    """At most about MOST_POINTS rows, every evaluation among them."""
    stride = -(-len(rows) // MOST_POINTS) or 1
    return [
        row
        for number, row in enumerate(rows)
        if number % stride == 0 or row.get("accuracy/eval") is not None
    ]


def _header(job: Job, rows: Sequence[Row]) -> str:
    found, phase = Summary.of(rows), str(job.get("phase", ""))
    error = f'<p class="bad">{escape(str(job["error"]))}</p>' if job.get("error") else ""
    replay = f'<p class="{"" if found.obeyed else "bad"}">{escape(found.replay)}</p>'
    numbers = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in _numbers(job, rows, found)
    )
    return (
        f"<header><h1>{escape(str(job.get('name', 'run')))}</h1>"
        f'<p class="soft lead">{escape(str(job.get("id", "")))} · {escape(phase)}'
        f" · {escape(_when(job))}</p>{error}"
        f'<p class="lead">{escape(_recipe(job))}</p></header>'
        f'<dl class="numbers">{numbers}</dl>{replay}'
    )


def _numbers(job: Job, rows: Sequence[Row], found: Summary) -> list[tuple[str, str]]:
    trained = trained_rows(rows)
    return [
        ("reward, first → last tenth", _pair(found.reward_first, found.reward_last, ".3f")),
        ("held-out accuracy", _pair(found.accuracy_first, found.accuracy_last, ".3f")),
        ("steps", f"{job.get('step', found.steps):,} of {_number(job.get('steps'), ',')}"),
        ("mean mismatch/k3", _number(mean(column(trained, "mismatch/k3")), ".2e")),
        ("mean staleness/k3", _number(mean(column(trained, "staleness/k3")), ".2e")),
        (
            "routes that differ",
            _number(mean(column(trained, "routing/pair_disagree")), ".1%"),
        ),
        ("response tokens a second", _number(found.tokens_per_s, ",.0f")),
        ("time", _took(job)),
    ]


def _recipe(job: Job) -> str:
    """The spec in one sentence; empty where there is none."""
    spec = job.get("spec")
    if not spec:
        return ""
    recipe, engine, rollout = spec["recipe"], spec["engine"], spec["rollout"]
    replay, n = recipe["replay"], recipe["off_policiness"]
    if replay == "auto":
        meant = "none" if n == 1 else "R3" if n >= R3_FROM else "R2"
        replay = f"auto ({meant} at N = {n}, if the model has experts)"
    return (
        f"{spec['model']['path']} on {spec['task']['dataset']}, seed {spec['seed']}: "
        f"{recipe['objective']}, replay {replay}, N = {n} mini-batches a lap of "
        f"{recipe['groups_per_minibatch']} groups of {rollout['group_size']} responses, learning "
        f"rate {recipe['learning_rate']:g}; engine {engine['kind']} in {engine['dtype']}, "
        f"quantize {engine['quantize']}; cold start of {spec['cold_start']['steps']} steps."
    )


def _card(number: int, chart: Chart, rows: Sequence[Row]) -> str:
    legend = "".join(
        f'<li><i class="k{line.colour}{" faint" if line.faint else ""}"></i>'
        f'{escape(line.label)} <span class="meaning">{escape(line.meaning)}</span></li>'
        for line in chart.shown(rows)
    )
    return (
        f'<article class="card"><h2>{escape(chart.title)}</h2>'
        f'<p class="says">{escape(chart.says)}</p>'
        f'<div class="plot" id="plot-{number}" role="img" aria-label="{escape(chart.title)}"></div>'
        f'<ul class="legend">{legend}</ul></article>'
    )


def _table(rows: Sequence[Row]) -> str:
    """Every column that has a value: its first and last tenth, least and largest."""
    measured = [name for name in COLUMNS if name not in _NOT_MEASURED and column(rows, name)]
    if not measured:
        return ""
    lines = []
    for name in measured:
        having = [row for row in rows if row.get(name) is not None]
        values = column(having, name)
        ends = [mean(column(part(having), name)) for part in (first_tenth, last_tenth)]
        cells = "".join(f"<td>{_number(v, '.4g')}</td>" for v in (*ends, min(values), max(values)))
        lines.append(
            f'<tr><td>{escape(name)}<br><span class="meaning">{escape(COLUMNS[name])}</span></td>'
            f"{cells}</tr>"
        )
    heads = "".join(f"<th>{t}</th>" for t in ("metric", "first tenth", "last tenth", "min", "max"))
    return (
        '<details><summary>Every metric in numbers</summary><div class="wide"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _spec(job: Job) -> str:
    """The job file, every default written out."""
    if not job.get("spec"):
        return ""
    plain = {k: v for k, v in job["spec"].items() if not isinstance(v, Mapping)}
    sections = {k: v for k, v in job["spec"].items() if isinstance(v, Mapping)}
    text = "\n\n".join(
        ["\n".join(_assign(plain))]
        + ["\n".join([f"[{name}]", *_assign(values)]) for name, values in sections.items()]
    )
    return f"<details><summary>Job file, whole</summary><pre>{escape(text)}</pre></details>"


def _assign(values: Mapping[str, Any]) -> list[str]:
    """TOML lines. JSON writes these values as TOML does, but for null, which TOML has not."""
    return [
        f"# {name}: none" if value is None else f"{name} = {json.dumps(value)}"
        for name, value in values.items()
    ]


def _pair(first: float | None, last: float | None, form: str) -> str:
    return f"{_number(first, form)} → {_number(last, form)}" if first is not None else NONE


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _when(job: Job) -> str:
    created = _time(job.get("created_at"))
    return created.strftime("%Y-%m-%d %H:%M UTC") if created else ""


def _took(job: Job) -> str:
    started, finished = _time(job.get("started_at")), _time(job.get("finished_at"))
    return duration((finished - started).total_seconds()) if started and finished else NONE


def _time(text: object) -> datetime | None:
    return datetime.fromisoformat(str(text)) if text else None


def _asset(name: str) -> str:
    return files("keel_gateway").joinpath("assets", name).read_text(encoding="utf-8")
