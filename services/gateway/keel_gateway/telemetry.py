"""What the gateway tells Prometheus: its requests, its peers, and the runs that go on.

Series of a run are there while it is unfinished and gone after, so that their number stays bounded
however many jobs there have been.
"""

from __future__ import annotations

import logging
import time
from collections import Counter as Count
from collections.abc import Collection, Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keel.fleet import EngineState
from keel.metrics import Row
from keel.record import Phase, RunRecord
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel_gateway.fleet_view import DRAINED, FREE, state_in_run
from keel_gateway.registry import Registry
from keel_gateway.store import Store

log = logging.getLogger(__name__)

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
NO_ROUTE = "none"
"""Route of requests for what does not exist: a path of the caller's is no label."""


class HttpMetrics:
    """Counts requests by route, method and status, and times them to the first byte.

    Each application has a registry of its own, with the process's CPU and memory.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = Counter(
            "keel_http_requests",
            "Requests answered",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "keel_http_request_seconds",
            "From the request to the first byte of its answer",
            ["method", "route"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """`app`, counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            began = time.perf_counter()
            answered = False

            async def tell(message: Message) -> None:
                nonlocal answered
                if message["type"] == "http.response.start" and not answered:
                    answered = True
                    self._count(scope, message["status"], time.perf_counter() - began)
                await send(message)

            try:
                await app(scope, receive, tell)
            except BaseException:
                if not answered:  # the server makes a 500 of it, outside of here
                    self._count(scope, 500, time.perf_counter() - began)
                raise

        return counted

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", NO_ROUTE)
        self._requests.labels(scope["method"], route, status).inc()
        self._seconds.labels(scope["method"], route).observe(seconds)


async def exposition(http: HttpMetrics, store: Store, registry: Registry) -> bytes:
    """Everything, in Prometheus's text format. Without Redis the runs are missing."""
    now = CollectorRegistry()
    now.register(_Given(_peers(registry)))
    try:
        records = await store.unfinished()
        rows = {record.run: await _newest_row(store, record) for record in records}
    except RedisError as error:
        log.warning("metrics without the runs, Redis does not answer: %s", error)
        now.register(_Given([_gauge("keel_redis_up", "Redis answers", 0)]))
    else:
        now.register(_Given([_gauge("keel_redis_up", "Redis answers", 1)]))
        phases = Count(store.ended_phases()) + Count(record.phase for record in records)
        dead = {record.run: store.dead_letter_count(record.run) for record in records}
        now.register(_Given(_runs(phases, records, rows, dead)))
        now.register(_Given([_leases(registry, records, await store.drained_engines())]))
    return generate_latest(http.registry) + generate_latest(now)


async def _newest_row(store: Store, record: RunRecord) -> Row:
    rows = await store.rows(record, after=record.step - 1, limit=1) if record.step else []
    evaluation = await store.newest_evaluation(record)
    return (evaluation or {}) | (rows[-1] if rows else {})


def _peers(registry: Registry) -> list[Metric]:
    engines = GaugeMetricFamily(
        "keel_engines", "Engines by state, as they last said; away: no answer now", labels=["state"]
    )
    states = Count[str]()
    for engine in registry.engines.values():
        said = engine.capabilities
        known = engine.healthy and said is not None
        states[_state(said.state) if known and said else "away"] += 1
    for state in [*map(_state, pb.EngineState.values()[1:]), "away"]:
        engines.add_metric([state], states[state])
    trainers = GaugeMetricFamily("keel_trainers", "Trainers by health", labels=["state"])
    healthy = sum(peer.healthy for peer in registry.trainers.values())
    trainers.add_metric(["healthy"], healthy)
    trainers.add_metric(["away"], len(registry.trainers) - healthy)
    return [engines, trainers]


def _leases(registry: Registry, records: list[RunRecord], drained: Collection[str]) -> Metric:
    held = {address: record for record in records if record.trainer for address in record.engines}
    states = Count(
        state_in_run(engine, held.get(address), drained)
        for address, engine in registry.engines.items()
    )
    leases = GaugeMetricFamily(
        "keel_leases",
        "Engines by what they are to their run; free and drained: to none",
        labels=["state"],
    )
    for state in (*EngineState, FREE, DRAINED):
        leases.add_metric([state.lower()], states[state])
    return leases


def _runs(
    phases: Count[Phase],
    records: list[RunRecord],
    rows: dict[str, Row],
    dead_letters: dict[str, int],
) -> list[Metric]:
    jobs = GaugeMetricFamily(
        "keel_jobs", "Jobs by phase, those that are over too", labels=["phase"]
    )
    for phase in Phase:
        jobs.add_metric([phase], phases[phase])
    step = GaugeMetricFamily("keel_run_step", "Optimizer steps done", labels=["run"])
    steps = GaugeMetricFamily("keel_run_steps", "Optimizer steps in all", labels=["run"])
    dead = GaugeMetricFamily(
        "keel_run_dead_letters",
        "Groups and demonstrations of an unfinished run that its trainer gave up",
        labels=["run"],
    )
    metric = GaugeMetricFamily(
        "keel_run_metric",
        "The newest row of an unfinished run: a column of docs/metrics.md",
        labels=["run", "metric"],
    )
    for record in records:
        step.add_metric([record.run], record.step)
        steps.add_metric([record.run], record.spec.recipe.steps)
        dead.add_metric([record.run], dead_letters[record.run])
        for name, value in rows[record.run].items():
            if value is not None:
                metric.add_metric([record.run, name], value)
    return [jobs, step, steps, dead, metric]


class _Given(Collector):
    """Metrics that are there already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)


def _gauge(name: str, says: str, value: float) -> Metric:
    return GaugeMetricFamily(name, says, value=value)


def _state(state: Any) -> str:
    return pb.EngineState.Name(state).removeprefix("ENGINE_STATE_").lower()
