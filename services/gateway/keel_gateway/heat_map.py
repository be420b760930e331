"""A family of columns, named by numbers, as rows of colours over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from keel.metrics import Row
from keel_gateway.charts import Card
from keel_gateway.curves import rounded
from keel_gateway.summary import column, mean

MOST_BINS = 200
"""Of the steps: a run of 10,000 steps and 48 layers stays below 100 kB."""
_DIGITS = 3


@dataclass(frozen=True, slots=True)
class HeatMap:
    """The columns FAMILY + N as shares, one row of colours for each N."""

    title: str
    says: str
    family: str

    def cards(self, rows: Sequence[Row]) -> list[Card]:
        """The picture of one run, means over bins of steps; none without such columns."""
        names = {name for row in rows for name in row if name.startswith(self.family)}
        layers = {int(name.removeprefix(self.family)): name for name in names if column(rows, name)}
        if not layers:
            return []
        having = [row for row in rows if any(row.get(name) is not None for name in names)]
        width = max(1, math.ceil(len(having) / MOST_BINS))
        bins = [having[start : start + width] for start in range(0, len(having), width)]
        ends = [(part[0]["step"], part[-1]["step"]) for part in bins]
        numbers = sorted(layers)
        told = [f"layer {n} {mean(column(having, layers[n])) or 0:.1%}" for n in numbers]
        z = [[_mean(part, layers[n]) for part in bins] for n in numbers]
        figure = {
            "kind": "heat",
            "x": [(first + last) / 2 for first, last in ends],
            "y": [str(n) for n in numbers],
            "z": z,
            "most": max(value for line in z for value in line if value is not None),
            "steps": [f"step {a}" if a == b else f"steps {a} to {b}" for a, b in ends],
        }
        described = f"{self.title}, means over all steps: {', '.join(told)}"
        return [Card(self.title, self.says, described, (), figure)]

    def overlays(self, runs: Sequence[tuple[str, Sequence[Row]]]) -> list[Card]:
        """A picture for each run, since colours cannot lie over one another; all on one scale."""
        cards = [(name, card) for name, rows in runs for card in self.cards(rows)]
        most = max((card.figure["most"] for _, card in cards), default=0)
        return [
            replace(card, title=f"{card.title}: {name}", figure=card.figure | {"most": most})
            for name, card in cards
        ]


def _mean(rows: Sequence[Row], name: str) -> float | None:
    value = mean(column(rows, name))
    return None if value is None else rounded(value, _DIGITS)
