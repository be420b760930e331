"""A clock that is set forward or back changes no order, no lease and no number."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis
import redis.asyncio
from gateway_house import House
from gateway_peers import SPEC, EnginePeer, abilities, eventually, serve
from rediskit import RedisServer

from keel.spec import parse_spec
from keel_gateway import continuity, registry, scheduler, store
from keel_gateway.registry import Registry
from keel_gateway.store import Store, connect
from keel_gateway.summary import duration
from keel_rollout.collector import sender
from keel_rollout.collector.sender import next_try

DAY_S = 86_400.0


class Clock:
    """The module `time` as Keel's modules see it; gRPC's own would take its deadlines from it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        for module in (continuity, registry, scheduler, store, sender):
            if hasattr(module, "time"):
                monkeypatch.setattr(module, "time", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        """What is set forward and back."""
        return time.time() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("restarted", [False, True])
async def test_jobs_keep_the_order_of_their_submission(
    server: RedisServer, clock: Clock, restarted: bool
) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    runs, submitted = Store(connect(server.url)), []
    for ahead_s in (0.0, DAY_S, -DAY_S, -DAY_S, 0.0, 2 * DAY_S, 1.0):
        clock.ahead_s = ahead_s
        if restarted:
            runs = Store(connect(server.url))
        submitted.append((await runs.create(parse_spec(SPEC))).run)
    assert [record.run for record in await runs.unfinished()] == submitted
    assert [record.run for record in await runs.newest(2)] == submitted[:-3:-1]


async def test_tries_of_a_cohort_grow_across_collectors(server: RedisServer, clock: Clock) -> None:
    """An engine refuses a try below one that it has seen: it would, for as long as the jump was."""
    numbers = []
    for ahead_s in (0.0, DAY_S, -DAY_S, 0.0):
        clock.ahead_s = ahead_s
        async with redis.asyncio.Redis.from_url(server.url) as client:  # a collector that restarts
            numbers += [await next_try(client, "r"), await next_try(client, "r")]
    assert numbers == sorted(set(numbers))
    assert 0 < numbers[0] <= numbers[-1] < 2**32, "it goes as uint32"


class HangingPeer(EnginePeer):
    """Answers while it may."""

    answers = True

    async def GetCapabilities(self, request: Any, context: Any) -> Any:
        while not self.answers:
            await asyncio.sleep(0.01)
        return await super().GetCapabilities(request, context)


@pytest.mark.parametrize("ahead_s", [DAY_S, -DAY_S])
async def test_an_engine_that_misses_a_question_as_the_clock_jumps_is_not_lost(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    monkeypatch.setattr(registry, "DEADLINE_S", 0.2)
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(serve(peer := HangingPeer(abilities())))
        peers = Registry((at,), (), poll_s=0.05)
        await peers.start()
        stack.push_async_callback(peers.stop)
        engine = peers.engines[at]
        assert engine.healthy
        peer.answers, clock.ahead_s = False, ahead_s
        await eventually(lambda: not engine.healthy)
        assert not engine.silent
        assert 0 < engine.quiet_s < 2
        assert peers.lapsed(5.0) == frozenset()
        peer.answers = True
        await eventually(lambda: engine.healthy)
        assert engine.quiet_s == 0


async def test_a_run_that_is_ahead_of_the_clock_is_shown(clock: Clock, server: RedisServer) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        house = House(server, client)
        async with AsyncExitStack() as stack:
            gateway = await house.open(stack)
            clock.ahead_s = DAY_S
            first: dict[str, Any] = (await gateway.post("/v1/jobs", json=SPEC)).json()
            clock.ahead_s = 0.0
            await eventually(lambda: house.trainer.started)
            house.write(first["id"], phase="TRAINING", started_s=time.time())
            shown = (await gateway.get(f"/v1/jobs/{first['id']}")).json()
            assert shown["started_at"] < shown["created_at"]
    assert duration(-DAY_S) == "0 s"
