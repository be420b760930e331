"""/v1/engines: what the gateway knows of the engines it was told of."""

from __future__ import annotations

from fastapi import APIRouter

from keel_gateway.leases import holders
from keel_gateway.problems import responses
from keel_gateway.routers.dependencies import RegistryDep, StoreDep
from keel_gateway.schemas import Engine, EngineList

router = APIRouter(prefix="/v1/engines", tags=["engines"])


@router.get("", summary="List engines", responses=responses(503))
async def list_engines(registry: RegistryDep, store: StoreDep) -> EngineList:
    """Each engine's health, abilities, state and holder."""
    held = holders(await store.unfinished())
    return EngineList(
        engines=[
            Engine.from_state(engine, held.get(engine.address))
            for engine in registry.engines.values()
        ]
    )
