"""Pictures made of metric rows: lines over steps, of one run or of several.

A figure is data for the page's script (assets/charts.js), which puts in the colours of the
reader's light or dark scheme: colours are numbers here. Which pictures a report has is in
`keel_gateway.panels`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from keel.metrics import COLUMNS, Row
from keel_gateway.curves import Points, averaged, every_kth, rounded, smooth, thinned
from keel_gateway.summary import lap_maximum

COLOURS = 8
"""Colours that the page has; the ninth line is the first one's colour, dashed."""
DIGITS = 5
"""Significant digits of a point."""
_HOVER_CHARACTERS = 44


@dataclass(frozen=True, slots=True)
class Card:
    """A picture as a page shows it."""

    title: str
    says: str
    """How to read it."""
    described: str
    """The picture in words, for those who cannot see it."""
    legend: Sequence[Line]
    figure: dict[str, Any]


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
    called: str = ""
    """What legend and hover call it; empty: the column, and what it means."""

    @property
    def label(self) -> str:
        """How legend and hover call it."""
        return self.called or (f"{self.name}, {self.made_of}" if self.made_of else self.name)

    @property
    def meaning(self) -> str:
        """What it says, in words; empty where the chart's own text says it."""
        if self.called:
            return ""
        match self.made_of:
            case "lap maximum":
                return "largest of the lap's steps: in-step staleness"
            case "complement":
                return f"1 - ({COLUMNS[self.name]})"
        return COLUMNS.get(self.name, "")

    @property
    def colour_class(self) -> str:
        """CSS class of its colour."""
        return f"k{self.colour % COLOURS}"

    @property
    def dash(self) -> str:
        """As plotly calls it."""
        return "dot" if self.dotted else "dash" if self.colour >= COLOURS else "solid"

    def values(self, rows: Sequence[Row]) -> Sequence[float | None]:
        """One a row; None where it is missing."""
        if self.made_of == "lap maximum":
            return lap_maximum(rows, self.name)
        values = [row.get(self.name) for row in rows]
        if self.made_of == "complement":
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

    def cards(self, rows: Sequence[Row]) -> list[Card]:
        """The picture of one run; none if its rows have none of the lines."""
        drawn = [(line, points) for line in self.lines if (points := self._points(line, rows))]
        return [self._card(self.title, self.says, drawn)] if drawn else []

    def overlays(self, runs: Sequence[tuple[str, Sequence[Row]]]) -> list[Card]:
        """A picture for each of its lines, with that line of every run: (name, rows)."""
        lines = [line for line in self.lines if not line.faint]
        cards = []
        for line in lines:
            drawn = [
                (replace(line, colour=place, stacked=False, dotted=False, called=name), points)
                for place, (name, rows) in enumerate(runs)
                if (points := self._points(line, rows))
            ]
            if not drawn:
                continue
            if len(lines) == 1:
                cards.append(self._card(self.title, self.says, drawn))
            else:
                cards.append(self._card(f"{self.title}: {line.label}", line.meaning, drawn))
        return cards

    def _card(self, title: str, says: str, drawn: Sequence[tuple[Line, Points]]) -> Card:
        return Card(
            title,
            says,
            f"{title}, over steps: " + "; ".join(self._told(*one) for one in drawn),
            [line for line, _ in drawn],
            {
                "kind": "lines",
                "log": self.log,
                "share": self.share,
                "unit": self.unit,
                "traces": [trace for one in drawn for trace in self._traces(*one)],
            },
        )

    def _traces(self, line: Line, points: Points) -> list[dict[str, Any]]:
        stacked = any(other.stacked for other in self.lines)
        trace = _trace(line, averaged(points) if stacked else thinned(points)) | {
            "mode": "lines+markers" if line.points or len(points) == 1 else "lines",
            "hovertemplate": self._hover(line),
            **({"stackgroup": "all"} if line.stacked else {}),
        }
        if not self.smoothed or line.points or len(points) == 1:
            return [trace]
        over = _trace(line, every_kth(smooth(points))) | {
            "name": f"{line.label}, smooth",
            "mode": "lines",
            "hoverinfo": "skip",
        }
        return [trace | {"faint": True}, over]

    def _points(self, line: Line, rows: Sequence[Row]) -> Points:
        # a logarithm has no place for exact zeros, such as the staleness of a lap's first step
        return [
            (row.get("step"), value)
            for row, value in zip(rows, line.values(rows), strict=True)
            if value is not None and not (self.log and value <= 0)
        ]

    def _hover(self, line: Line) -> str:
        places = ".2%" if self.share else ".4~g"
        meaning = "<br>".join(textwrap.wrap(line.meaning, _HOVER_CHARACTERS))
        words = f"<br><i>{meaning}</i>" if meaning else ""
        return f"<b>%{{y:{places}}}</b> {_plain(line.label)}{words}<extra></extra>"

    def _told(self, line: Line, points: Points) -> str:
        ends = [
            f"{f'{value:.1%}' if self.share else f'{value:.3g} {self.unit}'.strip()} at step {step}"
            for step, value in (points[0], points[-1])
        ]
        return f"{line.label} {', '.join(ends)}"


def _trace(line: Line, points: Points) -> dict[str, Any]:
    return {
        "x": [step for step, _ in points],
        "y": [rounded(value, DIGITS) for _, value in points],
        "name": line.label,
        "colour": line.colour % COLOURS,
        "faint": line.faint,
        "line": {"dash": line.dash},
    }


def _plain(text: str) -> str:
    """A user's text for plotly, which draws some tags and fills %{...} in."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")
