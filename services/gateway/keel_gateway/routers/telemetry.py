"""/metrics: for Prometheus. Metrics of a job: /v1/jobs/{run}/metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from keel_gateway.routers.dependencies import RegistryDep, StoreDep
from keel_gateway.telemetry import HttpMetrics, exposition

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus's text format."}},
)
async def metrics(request: Request, store: StoreDep, registry: RegistryDep) -> Response:
    """Requests, jobs by phase, engines by state, the newest row of each unfinished job."""
    http: HttpMetrics = request.app.state.http_metrics
    text = await exposition(http, store, registry)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
