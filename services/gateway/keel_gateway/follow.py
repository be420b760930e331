"""A run followed through the gateway: the job and its rows, again and again until it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from keel.metrics import Row
from keel.record import Phase
from keel_gateway.client import GatewayClient, Unreachable
from keel_gateway.schemas import Job
from keel_gateway.summary import step_s, trained_rows

RECENT_STEPS = 40
"""Over which speed is taken."""


@dataclass(frozen=True, slots=True)
class View:
    """A run as seen at one moment."""

    job: Job
    rows: list[Row]
    """Ascending by step; the first may be version 0's evaluation alone."""
    left_s: float | None
    """Estimated seconds to the end of this phase; None: unknown."""
    lost: str = ""
    """Why the gateway has not answered since; else empty."""

    @property
    def recent(self) -> list[Row]:
        """Rows of the last optimizer steps."""
        return trained_rows(self.rows[-RECENT_STEPS:])

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done and in all, of the phase that the run is in."""
        if self.job.phase is Phase.COLD_START:
            return self.job.cold_start_step, self.job.cold_start_steps
        return self.job.step, self.job.steps


def follow(
    client: GatewayClient,
    run: str,
    *,
    every_s: float,
    patience_s: float = 60.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[View]:
    """Views of a run, the last one final. A gateway may be away for `patience_s`, then Unreachable.

    A row is read again until its lap and the next are over: the time of publishing comes late, and
    an evaluation later still.
    """
    rows: dict[int, Row] = {}
    pace = _ColdStartPace()
    view: View | None = None
    seen_s = time.monotonic()
    while True:
        try:
            job = client.job(run)  # first: once it is final, no row is missing below
            lap_steps = job.spec.recipe.off_policiness
            after = max(-1, max(rows, default=0) - 2 * lap_steps)
            metrics = client.metrics(run, after=after)
        except Unreachable as error:
            if view is None or time.monotonic() - seen_s > patience_s:
                raise
            yield View(view.job, view.rows, None, str(error))
        else:
            seen_s = time.monotonic()
            for row in [*metrics.rows, *([metrics.evaluation] if metrics.evaluation else [])]:
                rows.setdefault(int(row["step"] or 0), {}).update(row)
            ordered = [rows[step] for step in sorted(rows)]
            view = View(job, ordered, pace.left_s(job) or _left_s(job, ordered))
            yield view
            if job.phase.final:
                return
        sleep(every_s)


class _ColdStartPace:
    """Supervised steps have no metric rows, so their speed is what was seen from here."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def left_s(self, job: Job) -> float | None:
        if job.phase is not Phase.COLD_START:
            return None
        now = time.monotonic()
        if self._first is None:
            self._first = now, job.cold_start_step
        began_s, began = self._first
        done = job.cold_start_step - began
        left = job.cold_start_steps - job.cold_start_step
        return (now - began_s) / done * left if done else None


def _left_s(job: Job, rows: list[Row]) -> float | None:
    recent = [seconds for row in trained_rows(rows[-RECENT_STEPS:]) if (seconds := step_s(row))]
    if job.phase is not Phase.TRAINING or not recent:
        return None
    return sum(recent) / len(recent) * (job.steps - job.step)
