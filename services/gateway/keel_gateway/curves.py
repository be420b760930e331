"""Points of a curve: smoothed, and no more of them than a chart has pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

Points = list[tuple[Any, float]]
"""(step, value), by step."""

SMOOTHING_SHARE = 0.05
"""Of the steps: width of the mean that smooths the reward."""
MOST_POINTS = 1200
"""Of one line: more than a chart has pixels."""


def thinned(points: Points) -> Points:
    """At most MOST_POINTS: of each bin the smallest and the largest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    return _binned(
        points,
        MOST_POINTS // 2,
        lambda part: sorted({min(part, key=_value), max(part, key=_value)}),
    )


def averaged(points: Points) -> Points:
    """At most MOST_POINTS: means of bins, since what is stacked has to add up."""
    return _binned(
        points, MOST_POINTS, lambda part: [(part[-1][0], sum(map(_value, part)) / len(part))]
    )


def every_kth(points: Points) -> Points:
    """At most MOST_POINTS, the last of each bin: for what is smooth already."""
    return _binned(points, MOST_POINTS, lambda part: part[-1:])


def smooth(points: Points) -> Points:
    """Each value's mean with those before it, over SMOOTHING_SHARE of them."""
    width = max(1, math.ceil(len(points) * SMOOTHING_SHARE))
    sums = list(accumulate(map(_value, points), initial=0.0))
    return [
        (step, (sums[end] - sums[max(0, end - width)]) / min(end, width))
        for end, (step, _) in enumerate(points, start=1)
    ]


def rounded(value: float, digits: int) -> float:
    """To that many significant digits."""
    return float(f"{value:.{digits}g}")


def _binned(points: Points, bins: int, of: Callable[[Points], Points]) -> Points:
    width = max(1, math.ceil(len(points) / bins))
    parts = (points[start : start + width] for start in range(0, len(points), width))
    return [point for part in parts for point in of(part)]


def _value(point: tuple[Any, float]) -> float:
    return point[1]
