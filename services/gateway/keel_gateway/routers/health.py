"""/healthz and /readyz: for whatever starts the gateway, and for load balancers."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter
from redis.exceptions import RedisError

from keel_gateway import redis_trouble
from keel_gateway.problems import NotReady, responses
from keel_gateway.registry import Peer
from keel_gateway.routers.dependencies import RegistryDep, StoreDep
from keel_gateway.schemas import Health, Readiness

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process up?")
async def healthz() -> Health:
    """Answers as long as the process does."""
    return Health()


@router.get("/readyz", summary="Could a job run now?", responses=responses(503))
async def readyz(registry: RegistryDep, store: StoreDep) -> Readiness:
    """Ready with a Redis that takes writes, a healthy trainer and engine; else 503 with all that is
    missing. `notes` says what its operator should know all the same.
    """
    missing = [_missing("engine", registry.engines), _missing("trainer", registry.trainers)]
    try:
        await store.probe()
    except RedisError as error:
        missing.insert(0, redis_trouble.describe(error))
    if any(missing):
        raise NotReady("; ".join(filter(None, missing)))
    return Readiness(notes=store.losses)


def _missing(noun: str, peers: Mapping[str, Peer]) -> str:
    if not peers:
        return f"no {noun} is configured (--{noun}s, KEEL_{noun.upper()}S)"
    if any(peer.healthy for peer in peers.values()):
        return ""
    why = ", ".join(f"{peer.address} {peer.problem}" for peer in peers.values())
    return f"no {noun} is healthy: {why}"
