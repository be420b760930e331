"""The HTTP application: parts put together, started and stopped."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI

from keel_gateway import problems
from keel_gateway.events import events_after
from keel_gateway.feeds import Feeds
from keel_gateway.registry import Registry
from keel_gateway.routers import engines, events, groups, health, jobs, telemetry
from keel_gateway.scheduler import Scheduler
from keel_gateway.settings import Settings
from keel_gateway.store import Store, connect
from keel_gateway.telemetry import HttpMetrics

DESCRIPTION = """\
Reinforcement learning for (Mixture-of-Experts) language models, kept stable: *Stabilizing
Reinforcement Learning with LLMs* (arXiv 2512.01374) as services.

Submit a **RunSpec** to `/v1/jobs`; the gateway leases it a trainer and rollout engines and tells
how it does. Every error is `application/problem+json` (RFC 9457) and names the field, the value and
what would be valid.
"""


def create_app(settings: Settings) -> FastAPI:
    """The gateway as an ASGI application. Its lifespan runs the registry and the scheduler.

    Redis, engines and trainers may all be away when it starts, and at any time afterwards.
    """
    redis = connect(settings.redis_url)
    store = Store(redis)
    registry = Registry(settings.engines, settings.trainers, poll_s=settings.poll_s)
    scheduler = Scheduler(store, registry, poll_s=settings.poll_s, lease_s=settings.lease_s)

    feeds = Feeds(partial(events_after, store, scheduler.job))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await registry.start()
        scheduler.start()
        try:
            yield
        finally:
            await feeds.stop()
            await scheduler.stop()
            await registry.stop()
            await redis.aclose()

    app = FastAPI(
        title="Keel gateway",
        version=version("keel-gateway"),
        description=DESCRIPTION,
        lifespan=lifespan,
        # one RunSpec in the schema: what is submitted is what is shown
        separate_input_output_schemas=False,
    )
    app.state.http_metrics = HttpMetrics()
    app.add_middleware(app.state.http_metrics.middleware)
    app.state.store, app.state.registry, app.state.scheduler = store, registry, scheduler
    app.state.feeds = feeds
    problems.install(app)
    for module in (jobs, events, groups, engines, health, telemetry):
        app.include_router(module.router)
    return app
