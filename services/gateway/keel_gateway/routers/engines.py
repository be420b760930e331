"""/v1/engines: what the gateway knows of the engines it was told of; emptying one, and back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from keel.errors import NotFound
from keel.record import RunRecord
from keel_gateway import registry as peers
from keel_gateway.fleet_view import state_in_run
from keel_gateway.leases import holders
from keel_gateway.problems import responses
from keel_gateway.registry import Registry
from keel_gateway.routers.dependencies import RegistryDep, SchedulerDep, StoreDep
from keel_gateway.scheduler import Scheduler
from keel_gateway.schemas import Engine, EngineList
from keel_gateway.store import Store

router = APIRouter(prefix="/v1/engines", tags=["engines"])

Address = Annotated[
    str,
    Path(
        description="The engine's address as GET /v1/engines lists it: HOST:PORT.", max_length=300
    ),
]


@router.get("", summary="List engines", responses=responses(503))
async def list_engines(registry: RegistryDep, store: StoreDep) -> EngineList:
    """Each engine's health, abilities, state and holder."""
    leased, drained = await _leased(store), await store.drained_engines()
    return EngineList(
        engines=[
            _shown(engine, leased.get(engine.address), drained)
            for engine in registry.engines.values()
        ]
    )


@router.post("/{address}/drain", summary="Empty an engine", responses=responses(404, 422, 503))
async def drain_engine(
    address: Address, registry: RegistryDep, store: StoreDep, scheduler: SchedulerDep
) -> Engine:
    """Lets an engine finish what it has, takes it out of its job and gives it to none.

    Its job loses no group: it goes on with its other engines, and gets another in its place as soon
    as one that suits is free; if it was the only one, the job waits for that. `run_state` is
    DRAINING, and DRAINED when it may be stopped, replaced or updated. What an engine had that does
    not answer any more is generated elsewhere, and it leaves at once. It stays drained, also when
    it or the gateway starts again, until it is undrained. May be repeated.
    """
    return await _drain(address, True, registry, store, scheduler)


@router.post("/{address}/undrain", summary="Give it back", responses=responses(404, 422, 503))
async def undrain_engine(
    address: Address, registry: RegistryDep, store: StoreDep, scheduler: SchedulerDep
) -> Engine:
    """Takes a drain back: jobs are given the engine again.

    One that is still DRAINING goes on in its job. May be repeated.
    """
    return await _drain(address, False, registry, store, scheduler)


async def _drain(
    address: str, wanted: bool, registry: Registry, store: Store, scheduler: Scheduler
) -> Engine:
    known = {*registry.engines, *await _leased(store), *await store.drained_engines()}
    if address not in known:
        raise NotFound(f"no engine {address!r}; GET /v1/engines lists them")
    await scheduler.drain(address, wanted=wanted)
    unknown = peers.Engine(address, problem="is none that the gateway was told of (KEEL_ENGINES)")
    engine = registry.engines.get(address, unknown)
    return _shown(engine, (await _leased(store)).get(address), await store.drained_engines())


async def _leased(store: Store) -> dict[str, RunRecord]:
    """By address of a trainer or an engine: the record of the run that it is leased to."""
    records = {record.run: record for record in await store.unfinished()}
    return {address: records[run] for address, run in holders(records.values()).items()}


def _shown(engine: peers.Engine, record: RunRecord | None, drained: frozenset[str]) -> Engine:
    return Engine.from_peer(engine, record, state_in_run(engine, record, drained))
