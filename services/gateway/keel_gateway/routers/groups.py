"""/v1/jobs/{id}/ledger and /dead-letters: what became of every group."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Response

from keel.errors import NotFound
from keel_gateway import ledger_view
from keel_gateway.problems import responses
from keel_gateway.routers.dependencies import RunId, StoreDep
from keel_gateway.schemas import DeadLetterList, Ledger

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get("/{run}/ledger", summary="Audit a job", responses=responses(404, 409, 422, 503))
async def get_ledger(run: RunId, store: StoreDep) -> Ledger:
    """What each lap was made of, and whether every group was trained on once.

    Read from the file that the trainer writes beside its checkpoints. Where the gateway does not
    see that disk: 404, with the place and the command that looks there.
    """
    return await ledger_view.of_run(await store.get(run))


@router.get("/{run}/dead-letters", summary="List dead letters", responses=responses(404, 422, 503))
async def list_dead_letters(run: RunId, store: StoreDep) -> DeadLetterList:
    """Groups and demonstrations that the trainer could not read, three times over, and gave up.

    Each made its slot VOID: the lap went on without it.
    """
    record = await store.get(run)
    return DeadLetterList(dead_letters=await store.dead_letters(record.run))


@router.get(
    "/{run}/dead-letters/{stream}/{entry}",
    summary="Read a dead letter",
    response_class=Response,
    responses={
        200: {
            "content": {"application/octet-stream": {}},
            "description": "A serialized keel.types.v1.Envelope, or what came in its place.",
        },
        **responses(404, 422, 503),
    },
)
async def get_dead_letter(
    run: RunId,
    stream: Literal["demos", "groups"],
    entry: Annotated[str, Path(description="Its id.", max_length=64)],
    store: StoreDep,
) -> Response:
    """The bytes of its envelope. Only of one that came in the entry itself; else 404."""
    record = await store.get(run)
    data = await store.dead_envelope(record.run, f"{stream}/{entry}")
    if data is None:
        raise NotFound(
            f"no bytes of dead letter {stream}/{entry} of run {run!r}: it is none, or its envelope "
            "was in the blob store; GET .../dead-letters lists those that there are"
        )
    return Response(data, media_type="application/octet-stream")
