"""/v1/jobs: submit, look, cancel, pause, resume; metrics, samples, checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from redis.exceptions import RedisError

from keel.record import RunRecord
from keel_gateway import transitions
from keel_gateway.admission import engines_lack, model_lacks
from keel_gateway.data_checks import data_lacks
from keel_gateway.problems import Refused, responses
from keel_gateway.routers.dependencies import (
    RegistryDep,
    RunId,
    SchedulerDep,
    SpecBody,
    StoreDep,
)
from keel_gateway.scheduler import Scheduler
from keel_gateway.schemas import CheckpointList, Job, JobList, Metrics, Samples
from keel_gateway.store import Store

log = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_EXAMPLE = {
    "name": "multiplication",
    "seed": 1,
    "model": {"path": "preset:tiny-qwen3-moe"},
    "cold_start": {"steps": 400},
    "engine": {"quantize": "fp8"},
    "rollout": {"group_size": 8},
    "recipe": {
        "replay": "R3",
        "off_policiness": 4,
        "groups_per_minibatch": 16,
        "steps": 240,
        "learning_rate": 5e-4,
    },
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/RunSpec"},
                "examples": {"a small run": {"value": _EXAMPLE}},
            },
            "application/toml": {"schema": {"type": "string"}},
        },
    }
}


@router.post(
    "",
    status_code=201,
    summary="Submit a job",
    openapi_extra=_BODY,
    responses=responses(400, 413, 415, 422, 503),
)
async def submit(
    spec: SpecBody,
    store: StoreDep,
    registry: RegistryDep,
    scheduler: SchedulerDep,
    response: Response,
) -> Job:
    """Takes a RunSpec, as JSON or TOML, and queues it.

    A spec that the known engines cannot do is refused (422), naming for each what it lacks; so is
    one whose data files, where they can be seen from here, have a fault in their first lines. While
    no engine is known, every valid spec is taken, and `reason` says what it waits for.
    """
    known = {
        engine.address: engine.capabilities
        for engine in registry.engines.values()
        if engine.capabilities is not None
    }
    unknown = len(registry.engines) - len(known)
    lacks = model_lacks(spec) + engines_lack(spec, known, unknown) + await data_lacks(spec)
    if lacks:
        raise Refused(lacks)
    record = await store.create(spec)
    try:
        await scheduler.grant_leases()
        record = await store.get(record.run)
    except RedisError as error:  # the job is taken; the loop goes on with it
        log.warning("%s: %s", record.run, error)
    response.headers["Location"] = f"/v1/jobs/{record.run}"
    return scheduler.job(record)


@router.get("", summary="List jobs", responses=responses(422, 503))
async def list_jobs(
    store: StoreDep,
    scheduler: SchedulerDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most jobs.")] = 100,
) -> JobList:
    """The last submitted first."""
    records = await store.newest(limit)
    return JobList(jobs=[scheduler.job(record) for record in records])


@router.get("/{run}", summary="Look at a job", responses=responses(404, 422, 503))
async def get_job(run: RunId, store: StoreDep, scheduler: SchedulerDep) -> Job:
    """The job as its record says."""
    record = await store.get(run)
    return scheduler.job(record)


@router.post("/{run}/cancel", summary="Cancel a job", responses=responses(404, 409, 422, 503))
async def cancel_job(run: RunId, store: StoreDep, scheduler: SchedulerDep) -> Job:
    """Ends the job; its last checkpoint stays.

    May be repeated. Where a trainer has the job, `desired` is CANCELLED at once, and `phase` when
    the trainer has stopped. A job that has succeeded or failed cannot be cancelled (409).
    """
    cancel = partial(transitions.cancel, now_s=time.time())
    return await _changed(run, cancel, store, scheduler)


@router.post("/{run}/pause", summary="Pause a job", responses=responses(404, 409, 422, 503))
async def pause_job(run: RunId, store: StoreDep, scheduler: SchedulerDep) -> Job:
    """Stops the job before its next lap; resumed, it goes on with the same bits.

    May be repeated. `desired` is PAUSED at once, and `paused` true when the trainer has stopped.
    The job keeps its trainer and engines; one that still waits for them gets none. One that has
    only its last evaluation left ends all the same. A job that has ended or was cancelled: 409.
    """
    return await _changed(run, transitions.pause, store, scheduler)


@router.post("/{run}/resume", summary="Resume a job", responses=responses(404, 409, 422, 503))
async def resume_job(run: RunId, store: StoreDep, scheduler: SchedulerDep) -> Job:
    """Has a paused job go on. May be repeated. A job that has ended or was cancelled: 409."""
    return await _changed(run, transitions.resume, store, scheduler)


@router.get("/{run}/checkpoints", summary="List checkpoints", responses=responses(404, 422, 503))
async def list_checkpoints(run: RunId, store: StoreDep) -> CheckpointList:
    """What the job's trainer has on its disk, the oldest first."""
    record = await store.get(run)
    return CheckpointList(checkpoints=await store.checkpoints(record.run))


@router.get("/{run}/metrics", summary="Read metrics", responses=responses(404, 422, 503))
async def get_metrics(
    run: RunId,
    store: StoreDep,
    after: Annotated[
        int, Query(ge=-1, description="Only steps after this one; -1 includes step 0.")
    ] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Most rows.")] = 1000,
) -> Metrics:
    """Rows in the order of steps. To go on, ask again with `after` = the last row's step."""
    record = await store.get(run)
    return Metrics(
        rows=list(await store.rows(record, after=after, limit=limit)),
        evaluation=await store.newest_evaluation(record),
    )


@router.get("/{run}/samples", summary="Read samples", responses=responses(404, 422, 503))
async def get_samples(
    run: RunId,
    store: StoreDep,
    after: Annotated[int, Query(ge=-1, description="Only steps after this one.")] = -1,
    limit: Annotated[
        int, Query(ge=1, le=1000, description="Most samples; but one step's always come together.")
    ] = 40,
) -> Samples:
    """Single responses: text, reward, and token by token the gap of engine and trainer.

    Of about 50 laps, evenly spaced over the run, at most four responses to one prompt, right and
    wrong ones if there are both. To go on, ask again with `after` = the last sample's step.
    """
    record = await store.get(run)
    return Samples(samples=await store.samples(record, after=after, limit=limit))


async def _changed(
    run: str,
    transition: Callable[[RunRecord], RunRecord],
    store: Store,
    scheduler: Scheduler,
) -> Job:
    record = await store.change(run, transition)
    scheduler.wake(run)
    return scheduler.job(record)
