"""The report's charts as data: which columns share a picture, and how plotly is to draw them.

Colours are numbers here; the page's script puts in those of the reader's light or dark scheme.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keel.metrics import COLUMNS, Row
from keel_gateway.summary import TRAINER_TIMES, lap_maximum

SMOOTHING_SHARE = 0.05
"""Of the steps: width of the mean that smooths the reward."""
DIGITS = 5
"""Significant digits of a point."""
_HOVER_CHARACTERS = 44


@dataclass(frozen=True, slots=True)
class Line:
    """One column (or what is made of it) in a chart."""

    name: str
    """The column; with `made_of`, what is drawn instead."""
    colour: int
    made_of: str = ""
    """"lap maximum" or "complement" of the column; empty: the column itself."""
    faint: bool = False
    points: bool = False
    dotted: bool = False
    stacked: bool = False

    @property
    def label(self) -> str:
        """How legend and hover call it."""
        return f"{self.name}, {self.made_of}" if self.made_of else self.name

    @property
    def meaning(self) -> str:
        """What it says, in words."""
        match self.made_of:
            case "lap maximum":
                return "largest of the lap's steps: in-step staleness"
            case "complement":
                return f"1 - ({COLUMNS[self.name]})"
        return COLUMNS[self.name]

    def values(self, rows: Sequence[Row]) -> list[float | None]:
        """One a row; None where it is missing."""
        values = [row.get(self.name) for row in rows]
        match self.made_of:
            case "lap maximum":
                return [row.get(self.label) for row in rows]
            case "complement":
                return [None if value is None else 1 - value for value in values]
        return values


@dataclass(frozen=True, slots=True)
class Chart:
    """Some lines over the steps."""

    title: str
    says: str
    """How to read it."""
    lines: Sequence[Line]
    log: bool = False
    share: bool = False
    """Values are shares, shown in percent."""
    unit: str = ""
    smoothed: bool = False
    """Each step is drawn faint, and a smoothed line over them."""

    def shown(self, rows: Sequence[Row]) -> list[Line]:
        """Lines that have a point in these rows."""
        return [line for line in self.lines if _any(self._ys(line, rows))]

    def figure(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Traces and layout for the page's script."""
        steps = [row.get("step") for row in rows]
        return {
            "title": self.title,
            "log": self.log,
            "share": self.share,
            "unit": self.unit,
            "traces": [
                trace for line in self.shown(rows) for trace in self._traces(line, steps, rows)
            ],
        }

    def _traces(self, line: Line, steps: list[Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
        values = self._ys(line, rows)
        points = [(x, y) for x, y in zip(steps, values, strict=True) if y is not None]
        trace = {
            "x": [x for x, _ in points],
            "y": [_rounded(y) for _, y in points],
            "mode": "lines+markers" if line.points or len(points) == 1 else "lines",
            "colour": line.colour,
            "faint": line.faint,
            "line": {"dash": "dot" if line.dotted else "solid"},
            **({"stackgroup": "all"} if line.stacked else {}),
            "name": line.label,
            "hovertemplate": self._hover(line),
        }
        if not self.smoothed or line.points:
            return [trace]
        smoothed = {
            "y": [_rounded(y) for y in smooth([y for _, y in points])],
            "mode": "lines",
            "name": f"{line.label}, smooth",
            "hoverinfo": "skip",
            "hovertemplate": None,
        }
        return [trace | {"faint": True}, trace | smoothed]

    def _hover(self, line: Line) -> str:
        places = ".2%" if self.share else ".4~g"
        meaning = "<br>".join(textwrap.wrap(line.meaning, _HOVER_CHARACTERS))
        return f"<b>%{{y:{places}}}</b> {line.label}<br><i>{meaning}</i><extra></extra>"

    def _ys(self, line: Line, rows: Sequence[Row]) -> list[float | None]:
        values = line.values(rows)
        if not self.log:
            return values
        # a logarithm has no place for exact zeros, such as the staleness of a lap's first step
        return [value if value is not None and value > 0 else None for value in values]


def _staleness(kind: str) -> tuple[Line, Line]:
    return (
        Line(f"staleness/{kind}", 1, faint=True),
        Line(f"staleness/{kind}", 1, made_of="lap maximum"),
    )


CHARTS: Sequence[Chart] = (
    Chart(
        "Reward and held-out accuracy",
        "Sampled reward of each mini-batch, and greedy accuracy on prompts never trained on.",
        (
            Line("reward/mean", 0),
            Line("accuracy/eval", 1, points=True),
        ),
        share=True,
        smoothed=True,
    ),
    Chart(
        "Both factors of the ratio, k3",
        "Train-inference discrepancy (mismatch) and staleness, never negative. Lower is nearer to "
        "the first-order approximation that the objective rests on.",
        (Line("mismatch/k3", 0), *_staleness("k3")),
        log=True,
        unit="nats",
    ),
    Chart(
        "Both factors of the ratio, k1",
        "The same two as signed means; over the same tokens they add up to the whole ratio's.",
        (Line("mismatch/k1", 0), *_staleness("k1")),
        unit="nats",
    ),
    Chart(
        "Routing disagreement",
        "Where the trainer's router, left alone, chooses other experts than the engine did. "
        "Under R3 later layers see the replayed layers below them.",
        (
            Line("routing/pair_disagree", 0),
            Line("routing/token_disagree", 1),
            Line("routing/overlap", 2, made_of="complement", dotted=True),
        ),
        share=True,
        smoothed=True,
    ),
    Chart(
        "Entropy",
        "Of the policy over the full vocabulary, on sampled tokens.",
        (Line("entropy", 0),),
        unit="nats",
    ),
    Chart(
        "Clip fraction",
        "Tokens that the mask takes out of the gradient, by the sign of their advantage.",
        (Line("clip/high", 0), Line("clip/low", 1)),
        share=True,
        smoothed=True,
    ),
    Chart(
        "Importance weights",
        "How much of the batch still counts under its weights.",
        (Line("is/ess", 0), Line("is/truncated", 1), Line("mismatch/f2", 2)),
        share=True,
        smoothed=True,
    ),
    Chart(
        "Largest weights and ratios",
        "The tails: the weight before truncation, and the trainer's own ratio.",
        (Line("is/max", 0), Line("staleness/ratio_max", 1), Line("is/mean", 2, dotted=True)),
        log=True,
    ),
    Chart(
        "Log-prob gap between engine and trainer",
        "Absolute differences on sampled tokens.",
        (Line("mismatch/logprob_abs_mean", 0), Line("mismatch/logprob_abs_max", 1)),
        log=True,
        smoothed=True,
        unit="nats",
    ),
    Chart("Gradient norm", "Before clipping.", (Line("grad_norm", 0),), smoothed=True),
    Chart(
        "Response length",
        "All responses.",
        (Line("response/length_mean", 0),),
        unit="tokens",
        smoothed=True,
    ),
    Chart(
        "Responses and groups without signal",
        "Truncated responses, and groups whose advantages are all zero.",
        (Line("response/truncated", 0), Line("groups/zero_advantage", 1)),
        share=True,
        smoothed=True,
    ),
    Chart(
        "Where a step's time went",
        "The trainer's time, stacked. Generation goes on beside it and shows as waiting.",
        (
            *(Line(name, colour, stacked=True) for colour, name in enumerate(TRAINER_TIMES)),
            Line("time/generate_s", 4, dotted=True),
        ),
        unit="seconds",
    ),
)


def with_lap_maxima(rows: Sequence[Row]) -> list[Row]:
    """Rows with the columns that "lap maximum" lines draw, made while every row is still there:
    of a thinned lap, the steps that are left say nothing of the largest.
    """
    lines = {line for chart in CHARTS for line in chart.lines if line.made_of == "lap maximum"}
    maxima = [(line.label, lap_maximum(rows, line.name)) for line in lines]
    return [
        dict(row) | {label: values[number] for label, values in maxima}
        for number, row in enumerate(rows)
    ]


def smooth(values: Sequence[float]) -> list[float]:
    """Each value's mean with those before it, over SMOOTHING_SHARE of them."""
    width = max(1, math.ceil(len(values) * SMOOTHING_SHARE))
    return [
        sum(window) / len(window)
        for end in range(1, len(values) + 1)
        if (window := values[max(0, end - width) : end])
    ]


def _any(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
