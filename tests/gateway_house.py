"""A gateway in the test's process, over a real Redis and real gRPC peers."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import redis
from fastapi import FastAPI
from gateway_peers import EnginePeer, TrainerPeer, abilities, serve
from rediskit import RedisServer

from keel.queue import run_key
from keel.record import pack_fields
from keel_gateway.app import create_app
from keel_gateway.settings import Settings

POLL_S = 0.05


@dataclass
class House:
    """A gateway, its Redis and its peers."""

    server: RedisServer
    redis: redis.Redis
    trainer: TrainerPeer = field(default_factory=TrainerPeer)
    engine: EnginePeer = field(default_factory=lambda: EnginePeer(abilities()))
    app: FastAPI | None = None
    client: httpx.AsyncClient | None = None

    async def open(self, stack: AsyncExitStack, *, peers: bool = True) -> httpx.AsyncClient:
        """Starts peers and gateway; `peers=False` configures addresses where nobody listens."""
        engine, trainer = "127.0.0.1:1", "127.0.0.1:2"
        if peers:
            engine = await stack.enter_async_context(serve(self.engine))
            trainer = await stack.enter_async_context(serve(self.trainer))
        self.app = create_app(
            Settings("127.0.0.1", 0, self.server.url, (engine,), (trainer,), poll_s=POLL_S)
        )
        await stack.enter_async_context(self.app.router.lifespan_context(self.app))
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://gateway")
        )
        return self.client

    def write(self, run: str, **fields: Any) -> None:
        """Writes as the trainer does."""
        self.redis.hset(run_key(run), mapping=pack_fields(**fields))


def the_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert {"type", "title", "detail", "instance"} <= body.keys()
    return body
