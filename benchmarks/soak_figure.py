"""Memory over time as an SVG that follows the reader's light or dark scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 16, 40
COLOURS = ("#3b6fd4", "#d4702b", "#2f9e5f", "#b03a8c", "#8a6d1f", "#1f93a5", "#c23b3b", "#6b6b6b")
MIB = 2**20

Points = tuple[Sequence[float], Sequence[float]]

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 }
.grid { stroke: #8884; stroke-width: 1 }
.warm { fill: #8882 }
.line { fill: none; stroke-width: 1.6 }
@media (prefers-color-scheme: dark) { text { fill: #ccc } }
"""


def figure(series: Mapping[str, Points], *, warm_up_s: float) -> str:
    """One line a process, in MiB over minutes.

    Args:
        series: seconds and bytes, by name.
        warm_up_s: the time that is not judged, shaded.
    """
    end_s = max(at[-1] for at, _ in series.values())
    top = _round_up(max(max(values) for _, values in series.values()) / MIB)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(at_s: float) -> float:
        return LEFT + width * at_s / end_s

    def y(mib: float) -> float:
        return TOP + height * (1 - mib / top)

    parts = [
        f'<rect class="warm" x="{LEFT}" y="{TOP}" width="{x(warm_up_s) - LEFT:.1f}" '
        f'height="{height}"/>',
        f'<text x="{LEFT + 6}" y="{TOP + 14}">warm-up</text>',
    ]
    for share in range(5):
        mib = top * share / 4
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mib):.1f}" '
            f'y2="{y(mib):.1f}"/><text x="{LEFT - 8}" y="{y(mib) + 4:.1f}" '
            f'text-anchor="end">{mib:g}</text>'
        )
    for minute in range(0, int(end_s // 60) + 1, max(1, round(end_s / 600))):
        parts.append(
            f'<text x="{x(60 * minute):.1f}" y="{HEIGHT - BOTTOM + 18}" '
            f'text-anchor="middle">{minute}</text>'
        )
    parts.append(f'<text x="{LEFT - 48}" y="{TOP - 4}">MiB</text>')
    parts.append(f'<text x="{WIDTH - RIGHT - 40}" y="{HEIGHT - 6}">minutes</text>')
    ends = sorted(series, key=lambda name: -series[name][1][-1])
    places = _apart([y(series[name][1][-1] / MIB) for name in ends], 15)
    for name, place in zip(ends, places, strict=True):
        colour = COLOURS[list(series).index(name) % len(COLOURS)]
        at, values = series[name]
        points = " ".join(f"{x(s):.1f},{y(v / MIB):.1f}" for s, v in zip(at, values, strict=True))
        parts.append(f'<polyline class="line" stroke="{colour}" points="{points}"/>')
        parts.append(
            f'<text x="{WIDTH - RIGHT + 8}" y="{place + 4:.1f}" style="fill:{colour}">'
            f"{escape(name)}</text>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>Memory of every process over the soak</title><style>{STYLE}</style>"
        + "\n".join(parts)
        + "</svg>\n"
    )


def _round_up(value: float) -> float:
    """To a number whose quarters are round."""
    size = 4.0
    while True:
        for step in (1, 2, 3, 5):
            if value <= size * step:
                return size * step
        size *= 10


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The same places, ascending, moved so that labels do not touch; the last ones move up."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + least if moved else place))
    excess = max(0.0, moved[-1] - (HEIGHT - BOTTOM)) if moved else 0.0
    for index in range(len(moved) - 1, -1, -1):
        limit = (HEIGHT - BOTTOM) if index == len(moved) - 1 else moved[index + 1] - least
        if excess:
            moved[index] = min(moved[index], limit)
    return moved
