"""The collector between a real Redis and several engines that come, go, fail and drain on cue."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
import redis
from collector_peers import (
    ScriptedEngine,
    envelopes,
    lease,
    make_spec,
    without_times,
    write_run,
)
from rediskit import RedisServer

from keel.queue import groups_key, metrics_key, run_key
from keel.record import RunRecord, pack_fields
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.spec import RunSpec
from keel_rollout.collector.follow import Follower
from keel_rollout.collector.main import connect
from keel_rollout.collector.verify import VerifierPool

Start = Callable[..., Awaitable[ScriptedEngine]]
PAIRS = make_spec(rollout={"group_size": 128})
"""Laps of four cohorts, two groups each."""


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts scripted engines; `held=True`: they answer once `go` is set."""
    engines: list[ScriptedEngine] = []

    async def start(*, held: bool = False, **options: bool) -> ScriptedEngine:
        engine = ScriptedEngine(**options)
        if held:
            engine.go.clear()
        engine.address = await engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        await engine.stop()


@contextlib.asynccontextmanager
async def collector(url: str) -> AsyncIterator[None]:
    connection, pool = connect(url), VerifierPool()
    following = asyncio.create_task(Follower(connection, pool).follow())
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait({following})
        await pool.close()
        await connection.aclose()


async def until(holds: Callable[[], object], seconds: float = 15) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.02)


def record(client: redis.Redis) -> RunRecord:
    return RunRecord.from_hash("r", client.hgetall(run_key("r")))


def write(client: redis.Redis, **fields: object) -> None:
    client.hset(run_key("r"), mapping=pack_fields(**fields))


def done(client: redis.Redis) -> bool:
    return client.xlen(groups_key("r")) == 8


def served(client: redis.Redis) -> Counter[str]:
    """Groups by the engine's address; each slot is there once."""
    found = envelopes(client)
    assert [envelope.id.slot for envelope in found] == list(range(8))
    return Counter(envelope.group.engine for envelope in found)


async def alone(
    server: RedisServer, client: redis.Redis, artifact: Path, spec: RunSpec, start: Start
) -> list[bytes]:
    """The lap as one engine makes it; leaves nothing in Redis."""
    engine = await start()
    write_run(client, spec, artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: done(client))
    found = [without_times(envelope) for envelope in envelopes(client)]
    client.flushall()
    return found


async def test_a_lap_is_spread_over_the_engines_and_is_the_same(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    expected = await alone(server, client, artifact, PAIRS, start)
    first, second = await start(held=True), await start(held=True)
    write_run(client, PAIRS, artifact, first.address, second.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: len(first.requests) == len(second.requests) == 4)
        for engine in (first, second):
            engine.go.set()
        await until(lambda: done(client))
    assert served(client) == {first.address: 4, second.address: 4}
    assert [without_times(envelope) for envelope in envelopes(client)] == expected
    cohorts = [{r.cohort.id for r in engine.requests} for engine in (first, second)]
    assert sorted(map(len, cohorts)) == [2, 2]
    assert not cohorts[0] & cohorts[1], "a cohort is one batch of one engine"


async def test_where_each_engine_can_have_a_cohort_none_gets_two(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    """The second proves the version a moment after the first."""
    first, second = await start(held=True), await start(held=True)
    spec = make_spec(rollout={"group_size": 64})  # two cohorts
    engines, proved = (first.address, second.address), {first.address: 0}
    write_run(client, spec, artifact, *engines, policy_version=0, proved=proved)
    async with collector(server.url):
        await until(lambda: len(first.requests) == 4)
        await asyncio.sleep(0.2)
        assert len(first.requests) == 4
        write(client, proved=dict.fromkeys(engines, 0))
        await until(lambda: len(second.requests) == 4)


async def test_an_engine_that_dies_mid_lap_and_stays_dead_costs_nothing(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    expected = await alone(server, client, artifact, PAIRS, start)
    first, second = await start(held=True), await start()
    write_run(client, PAIRS, artifact, first.address, second.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: len(first.requests) >= 2)
        await first.stop()
        await until(lambda: done(client))
    assert served(client) == {second.address: 8}
    assert [without_times(envelope) for envelope in envelopes(client)] == expected


@pytest.mark.parametrize("deterministic", [True, False])
async def test_what_one_engine_refuses_another_is_given(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start, deterministic: bool
) -> None:
    """It stands first in the lease; only what every engine refuses ends the run."""
    first, second = [await start(deterministic=deterministic) for _ in range(2)]
    first.abort = lambda request: grpc.StatusCode.RESOURCE_EXHAUSTED
    write_run(client, PAIRS, artifact, first.address, second.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: done(client))
        assert first.requests
        assert served(client) == {second.address: 8}
        assert record(client).collector_error == ""
        second.abort = first.abort
        write(client, policy_version=1, proved=dict.fromkeys((first.address, second.address), 1))
        await until(lambda: "RESOURCE_EXHAUSTED" in record(client).collector_error)


async def test_a_dead_engine_is_not_chosen(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    """It stands first in the lease, and is least loaded for ever."""
    engine = await start()
    write_run(client, PAIRS, artifact, "127.0.0.1:1", engine.address, policy_version=0)
    began = time.monotonic()
    async with collector(server.url):
        await until(lambda: done(client))
    assert time.monotonic() - began < 10
    tries = Counter(request.cohort.id for request in engine.requests)
    assert set(tries.values()) == {2}, "no cohort was tried elsewhere before"


async def test_only_engines_that_proved_the_version_and_are_not_stale_are_given_cohorts(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    ready, joining, stale = [await start(held=True) for _ in range(3)]
    engines = [engine.address for engine in (ready, joining, stale)]
    proved = {ready.address: 0, stale.address: 0}
    why = {stale.address: "median gap 3 nats, valid: at most 0.02"}
    write_run(client, PAIRS, artifact, *engines, policy_version=0, proved=proved, stale=why)
    async with collector(server.url):
        await until(lambda: len(ready.requests) == 4)
        await asyncio.sleep(0.3)
        assert joining.requests == stale.requests == []
        write(client, proved=proved | {joining.address: 0})  # it joins in mid-lap
        await until(lambda: len(joining.requests) == 4)
        ready.go.set()
        joining.go.set()
        await until(lambda: done(client))
    assert served(client) == {ready.address: 4, joining.address: 4}
    assert stale.requests == []


async def test_drained_is_written_when_nothing_is_in_flight(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    """What it has, it finishes; what it would have had goes elsewhere; no group twice."""
    first, second = await start(held=True), await start(held=True)
    spec = make_spec(rollout={"group_size": 256})  # eight cohorts
    write_run(client, spec, artifact, first.address, second.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: len(first.requests) == len(second.requests) == 2)
        write(client, draining=(first.address,))
        await asyncio.sleep(0.3)
        assert record(client).drained == ()
        second.go.set()
        await until(lambda: len(second.requests) == 6)
        assert (len(first.requests), record(client).drained) == (2, ())
        first.go.set()
        await until(lambda: record(client).drained == (first.address,))
        assert done(client), "told only when its last group is in the stream"
        assert served(client) == {first.address: 2, second.address: 6}
        write(client, engines=(second.address,), draining=())  # the gateway gives it back
        await until(lambda: record(client).drained == ())


async def test_an_engine_that_leaves_hurts_no_other(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    first, second = await start(held=True), await start(held=True)
    write_run(client, PAIRS, artifact, first.address, second.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: len(first.requests) == len(second.requests) == 4)
        lease(client, second.address)
        await until(lambda: first.cancelled == 4)
        second.go.set()
        await until(lambda: done(client))
    assert second.cancelled == 0
    assert served(client) == {second.address: 8}
    assert len(second.requests) == 8


async def test_of_an_engine_that_repeats_no_bits_only_missing_groups_are_sent_again(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    engine = await start(deterministic=False)
    troubles = iter([grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
    engine.abort = lambda request: next(troubles, None) if request.id.slot == 5 else None
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: done(client))
    asked = Counter(request.id.slot for request in engine.requests)
    assert asked == dict.fromkeys(range(8), 1) | {5: 3}
    assert not any(request.HasField("cohort") for request in engine.requests)


async def test_routes_are_asked_of_those_that_report_them(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    routed, plain = await start(held=True), await start(held=True, routes=False)
    write_run(client, PAIRS, artifact, routed.address, plain.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: len(routed.requests) == len(plain.requests) == 4)
        routed.go.set()
        plain.go.set()
        await until(lambda: done(client))
    for envelope in envelopes(client):
        has = {sequence.HasField("routes") for sequence in envelope.group.sequences}
        assert has == {envelope.group.engine == routed.address}


async def test_evaluation_is_spread_too(
    server: RedisServer, client: redis.Redis, artifact: Path, start: Start
) -> None:
    first, second = await start(), await start()
    spec = make_spec(evaluation={"every": 2, "samples": 1000})
    write_run(client, spec, artifact, first.address, second.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.hexists(metrics_key("r"), "0:0:evaluation"))
    evaluated = [
        {r.cohort.id for r in engine.requests if r.purpose == pb.PURPOSE_EVALUATION}
        for engine in (first, second)
    ]
    assert all(evaluated)
    assert evaluated[0] | evaluated[1] == {f"0/0/evaluation/{number}" for number in range(4)}
