"""A run's history as server-sent events, derived from its record and its metric rows.

    job         its state has changed       data: the Job
    metrics     a row that is whole         data: the row; ascending by step
    evaluation  one has arrived             data: its columns and `step`
    end         the run is over             data: {"phase": ...}; the last event

Nothing is stored for it: an event's id is a cursor, what a watcher knows once it has that event. So
any gateway can go on after any id, and leaves nothing out and tells no step twice. A step that a
new attempt did again comes again. Of the job's states, those that came and went while nobody
watched are not told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from fastapi.sse import format_sse_event

from keel.codec import xxh3
from keel.errors import InvalidField
from keel.record import RunRecord
from keel_gateway.schemas import Job
from keel_gateway.store import STEPS_PER_READ, Store

COLD_START_PARTS = 20
"""Times that a job event tells of progress in the cold start, which has no rows."""
_ID = re.compile(r"(\d{1,9}):(\d{1,9}):(-1|\d{1,9}):(-|[0-9a-f]{16})(:end)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a watcher knows.

    Example:
        str(Cursor(0, 120, 116, "9f3c2a11b0d4e5f6")) == "0:120:116:9f3c2a11b0d4e5f6"
    """

    attempt: int = 0
    """Of the rows; a newer attempt's come from its first step on."""
    step: int = 0
    """Last step whose row it has."""
    evaluated: int = -1
    """Last step whose evaluation it has."""
    job: str = ""
    """Fingerprint of the job's state as it was told."""
    ended: bool = False
    """It knows that the run is over."""

    def __str__(self) -> str:
        end = ":end" if self.ended else ""
        return f"{self.attempt}:{self.step}:{self.evaluated}:{self.job or '-'}{end}"

    @classmethod
    def parse(cls, text: str, record: RunRecord) -> Self:
        """The cursor of an id; InvalidField if no event of this run has that id."""
        found = _ID.fullmatch(text)
        if found is not None:
            attempt, step, evaluated = (int(part) for part in found.groups()[:3])
            if attempt <= record.attempt and max(step, evaluated) <= record.spec.recipe.steps:
                job = found[4].removeprefix("-")
                return cls(attempt, step, evaluated, job, ended=found[5] is not None)
        raise InvalidField("Last-Event-ID", text, "the id of an event of this job, or none")


@dataclass(frozen=True, slots=True)
class Event:
    """One event, ready to be sent."""

    cursor: Cursor
    """What its receiver knows then; its id."""
    wire: bytes
    """As it goes over the wire."""


async def events_after(
    store: Store, shown: Callable[[RunRecord], Job], run: str, cursor: Cursor
) -> list[Event]:
    """What has come since `cursor`, at most some hundred events; the rest follows the last of them.

    Args:
        shown: the job of a record.

    Errors: NotFound, Redis's own.
    """
    record = await store.get(run)  # first: once it is over, no row is missing below
    job = shown(record)
    first = await store.first_step(record)
    if first is not None and cursor.attempt < record.attempt:
        cursor = replace(
            cursor,
            attempt=record.attempt,
            step=min(cursor.step, first - 1),
            evaluated=min(cursor.evaluated, first - 1),
        )
    rows = await store.whole_rows(record, after=cursor.step, first=first)
    evaluations = await store.evaluations(record, after=cursor.evaluated, first=first)
    more = STEPS_PER_READ in (len(rows), len(evaluations))
    if len(rows) == STEPS_PER_READ:
        evaluations = [one for one in evaluations if one["step"] <= rows[-1]["step"]]

    events: list[Event] = []

    def tell(kind: str, data: dict[str, Any], **known: Any) -> None:
        nonlocal cursor
        cursor = replace(cursor, **known)
        text = json.dumps(data)  # ASCII: no character ends a line
        wire = format_sse_event(event=kind, data_str=text, id=str(cursor))
        events.append(Event(cursor, wire))

    fingerprint = _fingerprint(job)
    over = record.phase.final
    if not over and cursor.job != fingerprint:
        tell("job", job.model_dump(mode="json"), job=fingerprint)
    found = [("metrics", row) for row in rows] + [("evaluation", one) for one in evaluations]
    for kind, row in sorted(found, key=lambda one: (one[1]["step"], one[0] == "evaluation")):
        tell(kind, row, **{"step" if kind == "metrics" else "evaluated": row["step"]})
    if over and not more:
        if cursor.job != fingerprint:
            tell("job", job.model_dump(mode="json"), job=fingerprint)
        if not cursor.ended:
            tell("end", {"phase": str(job.phase)}, ended=True)
    return events


def _fingerprint(job: Job) -> str:
    """Of what makes a job event when it changes."""
    done = job.cold_start_step * COLD_START_PARTS // max(1, job.cold_start_steps)
    state = [job.phase, job.desired, job.paused, job.reason, job.error, job.attempt, job.trainer]
    state.append(job.dead_letters)
    return f"{xxh3(json.dumps([*state, job.engines, job.artifact, job.model, done]).encode()):016x}"
