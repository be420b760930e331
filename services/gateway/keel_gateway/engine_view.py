"""Who served what: the groups of a run by the engine that sampled them.

Only of a run that several engines have served, at once or one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keel.metrics import Row
from keel_gateway.charts import Chart, Line
from keel_gateway.page import NONE, number
from keel_gateway.panels import Shown
from keel_gateway.summary import column, mean, trained_rows

FAMILY = "engine/"
_GROUPS, _K3 = "engine/groups/", "engine/k3/"
HEADS = ("engine", "kind", "steps", "groups", "share", "mean mismatch/k3", "state")


def engines_of(rows: Sequence[Row]) -> list[str]:
    """Addresses of the engines that a run's groups came from, the first that served first."""
    first: dict[str, None] = {}
    for row in rows:
        for name in sorted(row):
            if name.startswith(_GROUPS) and row[name]:
                first.setdefault(name.removeprefix(_GROUPS))
    return list(first)


def who_served(rows: Sequence[Row], job: Mapping[str, Any]) -> list[Shown]:
    """A section of the report; none where one engine served all."""
    engines, trained = engines_of(rows), trained_rows(rows)
    if len(engines) < 2:
        return []
    charts = (
        (
            Chart(
                "Groups by engine",
                "Groups trained on a step, mean over its lap, by the engine that sampled them.",
                [
                    Line(f"{_GROUPS}{one}", place, stacked=True, called=one)
                    for place, one in enumerate(engines)
                ],
                unit="groups",
            ),
            _over_laps(trained, engines),
        ),
        (
            Chart(
                "Discrepancy by engine, k3",
                "mismatch/k3 of the tokens that each engine sampled: which one is off.",
                [Line(f"{_K3}{one}", place, called=one) for place, one in enumerate(engines)],
                log=True,
                smoothed=True,
                unit="nats",
            ),
            trained,
        ),
    )
    return [
        Shown(
            "engines",
            "Who served what",
            "This run's groups came from several engines.",
            [card for chart, drawn in charts for card in chart.cards(drawn)],
            HEADS,
            [_line(one, trained, job) for one in engines],
        )
    ]


def _over_laps(trained: Sequence[Row], engines: Sequence[str]) -> list[Row]:
    """Groups a step, by engine: means over laps, since a cohort is often some whole steps."""
    laps: dict[Any, list[Row]] = {}
    for row in trained:
        laps.setdefault(row["lap"], []).append(row)
    means = {
        lap: {
            name: sum(row.get(name) or 0 for row in rows) / len(rows)
            for name in (f"{_GROUPS}{one}" for one in engines)
        }
        for lap, rows in laps.items()
    }
    return [{"step": row["step"]} | means[row["lap"]] for row in trained]


def _line(engine: str, trained: Sequence[Row], job: Mapping[str, Any]) -> dict[str, Any]:
    served = [row for row in trained if row.get(f"{_GROUPS}{engine}")]
    counts = column(served, f"{_GROUPS}{engine}")
    every = sum(
        value
        for row in trained
        for name, value in row.items()
        if value and name.startswith(_GROUPS)
    )
    cells = [
        (job.get("engine_kinds") or {}).get(engine, NONE),
        f"{served[0]['step']:,} to {served[-1]['step']:,}",
        f"{sum(counts):,.0f}",
        f"{sum(counts) / every:.1%}",
        number(mean(column(served, f"{_K3}{engine}")), ".2e"),
        _state(engine, job),
    ]
    return {"name": engine, "meaning": "", "cells": cells}


def _state(engine: str, job: Mapping[str, Any]) -> str:
    if "engines" not in job:
        return NONE
    if engine not in job["engines"]:
        return "has left"
    return str((job.get("engine_states") or {}).get(engine, "there to the end"))
