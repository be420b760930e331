"""/v1/jobs/{id}/events: a job's history as it is made."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse

from keel_gateway.events import Cursor
from keel_gateway.problems import responses
from keel_gateway.routers.dependencies import FeedsDep, RunId, StoreDep

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class EventStream(StreamingResponse):
    """Events that are written once for all who watch.

    FastAPI's own EventSourceResponse would encode each for each, and a fault in its generator comes
    as a broken answer; here, what can be refused is refused before the first byte.
    """

    media_type = "text/event-stream"


_EXAMPLE = """\
event: job
data: {"id": "first-abcdef", "phase": "TRAINING", "desired": "RUNNING", "step": 12, ...}
id: 0:0:-1:9f3c2a11b0d4e5f6

event: evaluation
data: {"step": 0, "accuracy/eval": 0.23}
id: 0:0:0:9f3c2a11b0d4e5f6

event: metrics
data: {"step": 1, "lap": 0, "reward/mean": 0.25, "mismatch/k3": 0.0012, ...}
id: 0:1:0:9f3c2a11b0d4e5f6

: ping

event: end
data: {"phase": "SUCCEEDED"}
id: 0:12:12:1b0d4e5f69f3c2a1:end

"""
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events, until the job is over.",
        "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EXAMPLE}},
    },
    204: {"description": "The id is that of the last event: there is no more."},
}


@router.get(
    "/{run}/events",
    summary="Watch a job",
    response_class=EventStream,
    responses=_STREAM | responses(404, 422, 503),
)
async def watch_job(
    run: RunId,
    store: StoreDep,
    feeds: FeedsDep,
    last_event_id: Annotated[
        str | None,
        Header(description="Id of the last event received: what came since then follows."),
    ] = None,
    last_event_id_query: Annotated[
        str | None,
        Query(alias="last_event_id", description="The same, for tools; the header wins."),
    ] = None,
) -> Response:
    """Server-sent events: the whole history first, then what happens, until `end`.

    - `job`: its state (phase, wish, reason, error, ...) has changed; the job as GET gives it. In
      the cold start about 20 tell of its progress.
    - `metrics`: a step's row, once it is whole; ascending by step.
    - `evaluation`: held-out accuracy after `step`; it comes later than that step's row.
    - `end`: the phase in which the job ended; the last event.

    A reader that comes back with the last id it saw (browsers do so by themselves, in the header
    Last-Event-ID) gets everything since, and no step twice, also from another gateway; of the job's
    states in between, the present one. A step that a new attempt did again comes again, and
    replaces what was. Comments keep the connection alive.
    """
    record = await store.get(run)
    cursor = Cursor()
    if given := last_event_id or last_event_id_query:
        cursor = Cursor.parse(given, record)
    if cursor.ended:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventStream(feeds.watch(run, cursor), headers=headers)
