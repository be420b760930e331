"""Engines drained and given back over REST, over a real Redis and real gRPC peers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
import redis
from gateway_peers import SPEC, EnginePeer, TrainerPeer, abilities, eventually, serve
from prometheuskit import samples
from rediskit import RedisServer

from keel.queue import DRAINED_KEY, FENCING_KEY, run_key
from keel.record import RunRecord, pack_fields
from keel_gateway.app import create_app
from keel_gateway.settings import Settings

POLL_S = 0.05


class House:
    """A gateway with engines a, b, ... of the kinds given, and two trainers."""

    def __init__(self, url: str, *kinds: str) -> None:
        self.url, self.redis = url, redis.Redis.from_url(url)
        self.redis.flushall()
        self.redis.set(FENCING_KEY, 0)  # the first token is 1
        self.peers = [EnginePeer(abilities(kind=kind)) for kind in kinds]
        self.trainer = TrainerPeer()
        self.engines: list[str] = []
        self.serving: list[AsyncExitStack] = []
        self.client: Any = None

    async def open(self, stack: AsyncExitStack, gateway: AsyncExitStack | None = None) -> None:
        for peer in self.peers:
            serving = await stack.enter_async_context(AsyncExitStack())
            self.engines.append(await serving.enter_async_context(serve(peer)))
            self.serving.append(serving)
        trainers = [await stack.enter_async_context(serve(self.trainer)) for _ in range(2)]
        self.settings = Settings(
            "127.0.0.1", 0, self.url, tuple(self.engines), tuple(trainers), poll_s=POLL_S
        )
        await self.open_gateway(gateway or stack)

    async def open_gateway(self, stack: AsyncExitStack) -> None:
        app = create_app(self.settings)
        await stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://gateway")
        )

    async def submit(self, **engine: Any) -> str:
        reply = await self.client.post("/v1/jobs", json=SPEC | {"engine": engine})
        assert reply.status_code == 201, reply.text
        return str(reply.json()["id"])

    async def job(self, run: str) -> dict[str, Any]:
        return dict((await self.client.get(f"/v1/jobs/{run}")).json())

    async def drain(self, engine: str, verb: str = "drain") -> dict[str, Any]:
        reply = await self.client.post(f"/v1/engines/{engine}/{verb}")
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    async def states(self) -> list[str]:
        listed = (await self.client.get("/v1/engines")).json()["engines"]
        return [engine["run_state"] for engine in listed]

    def write(self, run: str, **fields: Any) -> None:
        """Writes as trainer and collector do."""
        self.redis.hset(run_key(run), mapping=pack_fields(**fields))

    def record(self, run: str) -> RunRecord:
        return RunRecord.from_hash(run, self.redis.hgetall(run_key(run)))  # type: ignore[arg-type]

    def train(self, run: str, version: int = 0) -> None:
        """The run trains, and all its engines serve its version."""
        proved = dict.fromkeys(self.record(run).engines, version)
        self.write(run, phase="TRAINING", policy_version=version, proved=proved)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Any:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


async def test_an_engine_leaves_when_the_collector_has_found_it_empty(
    url: str, stack: AsyncExitStack
) -> None:
    house = House(url, "torch", "torch")
    await house.open(stack)
    run = await house.submit(count=2)
    a, b = house.engines
    record = house.record(run)
    assert record.engines == (a, b)
    assert record.engine_token == record.fencing_token == 1
    house.train(run)
    assert await house.states() == ["READY", "READY"]
    assert (await house.job(run))["engine_states"] == {a: "READY", b: "READY"}

    for _ in range(2):  # may be repeated
        said = await house.drain(b)
        assert (said["run"], said["run_state"], said["proved_version"]) == (run, "DRAINING", 0)
    assert house.record(run).draining == (b,)
    job = await house.job(run)
    assert job["engine_states"] == {a: "READY", b: "DRAINING"}
    assert job["reason"] == f"1 of 2 engines READY: {b} is DRAINING"

    house.write(run, drained=(b,))
    await eventually(lambda: house.record(run).engines == (a,))
    record = house.record(run)
    assert (record.draining, record.drained, record.proved) == ((), (), {a: 0})
    assert await house.states() == ["READY", "DRAINED"]
    job = await house.job(run)
    assert job["reason"].startswith("1 of 2 engines READY: waits for 1 of 2 engines")
    assert f"{b} is drained (keel engines undrain {b})" in job["reason"]
    assert (await house.client.get(f"/v1/engines/{b}/drain")).status_code == 405

    said = await house.drain(b, "undrain")  # and it is leased again at once, as a new one
    assert (said["run"], said["run_state"]) == (run, "JOINING")
    record = house.record(run)
    assert (record.engines, record.engine_token, record.fencing_token) == ((a, b), 2, 1)
    assert record.proved == {a: 0}


async def test_a_drain_that_is_taken_back_changes_nothing(url: str, stack: AsyncExitStack) -> None:
    house = House(url, "torch", "torch")
    await house.open(stack)
    run = await house.submit(count=2)
    house.train(run)
    before = house.record(run)
    await house.drain(house.engines[1])
    said = await house.drain(house.engines[1], "undrain")
    assert (said["run"], said["run_state"]) == (run, "READY")
    assert house.record(run) == before
    assert house.redis.get(FENCING_KEY) == b"1"


async def test_another_engine_takes_its_place(url: str, stack: AsyncExitStack) -> None:
    """Of the kind that went, though another is free first."""
    house = House(url, "torch", "vllm", "torch", "vllm")
    await house.open(stack)
    a, b, _, d = house.engines
    run = await house.submit(kind=["torch", "vllm"])
    assert house.record(run).engines == (a, b)
    house.train(run)
    await house.drain(b)
    house.write(run, drained=(b,))
    await eventually(lambda: house.record(run).engines == (a, d))
    assert house.record(run).engine_token == 2
    assert await house.states() == ["READY", "DRAINED", "FREE", "JOINING"]
    await eventually(lambda: house.job(run))
    assert (await house.job(run))["reason"] == ""


async def test_a_run_whose_only_engine_is_drained_waits_for_another(
    url: str, stack: AsyncExitStack
) -> None:
    house = House(url, "torch")
    await house.open(stack)
    (a,) = house.engines
    run = await house.submit()
    house.train(run)
    await house.drain(a)
    house.write(run, drained=(a,))
    await eventually(lambda: house.record(run).engines == ())
    job = await house.job(run)
    assert (job["phase"], job["engines"], job["engine_states"]) == ("TRAINING", [], {})
    assert job["reason"] == (
        f"0 of 1 engines READY: waits for engine: {a} is drained (keel engines undrain {a})"
    )
    await house.drain(a, "undrain")
    assert house.record(run).engines == (a,)
    assert house.record(run).phase == "TRAINING"


async def test_before_the_first_version_nothing_holds_an_engine(
    url: str, stack: AsyncExitStack
) -> None:
    house = House(url, "torch", "torch")
    await house.open(stack)
    run = await house.submit()
    house.write(run, phase="COLD_START")
    said = await house.drain(house.engines[0])
    assert (said["run"], said["run_state"]) == (None, "DRAINED")
    assert house.record(run).engines == (house.engines[1],)


async def test_a_dead_engine_stays_leased_until_it_is_drained(
    url: str, stack: AsyncExitStack
) -> None:
    house = House(url, "torch", "torch", "torch")
    await house.open(stack)
    a, b, c = house.engines
    run = await house.submit(count=2)
    house.train(run)
    await house.serving[1].aclose()

    async def lost() -> bool:
        return (await house.states())[1] == "LOST"

    await eventually(lost)
    job = await house.job(run)
    assert job["engines"] == [a, b], "it may come back"
    assert f"{b} is LOST (does not answer (UNAVAILABLE" in job["reason"]
    said = await house.drain(b)
    assert (said["run"], said["run_state"]) == (None, "DRAINED")
    assert house.record(run).engines == (a, c)


async def test_a_drained_engine_stays_so_over_a_restart_of_the_gateway(
    url: str, stack: AsyncExitStack
) -> None:
    house = House(url, "torch", "torch")
    async with AsyncExitStack() as first:
        await house.open(stack, first)
        await house.drain(house.engines[0])
    assert house.redis.smembers(DRAINED_KEY) == {house.engines[0].encode()}
    await house.open_gateway(stack)
    assert await house.states() == ["DRAINED", "FREE"]
    run = await house.submit()
    assert house.record(run).engines == (house.engines[1],)


async def test_an_engine_that_nobody_knows_is_404(url: str, stack: AsyncExitStack) -> None:
    house = House(url, "torch")
    await house.open(stack)
    for verb in ("drain", "undrain"):
        reply = await house.client.post(f"/v1/engines/127.0.0.1:9/{verb}")
        assert reply.status_code == 404
        assert reply.headers["content-type"] == "application/problem+json"
        assert "127.0.0.1:9" in reply.json()["detail"]
    assert not house.redis.exists(DRAINED_KEY)


async def test_an_address_may_be_percent_encoded(url: str, stack: AsyncExitStack) -> None:
    house = House(url, "torch")
    await house.open(stack)
    encoded = house.engines[0].replace(":", "%3A")
    assert (await house.drain(encoded))["run_state"] == "DRAINED"


async def test_prometheus_counts_engines_by_what_they_are_to_their_run(
    url: str, stack: AsyncExitStack
) -> None:
    house = House(url, *["torch"] * 4)
    await house.open(stack)
    run = await house.submit(count=2)
    a, b, c, _ = house.engines
    house.write(run, policy_version=1, phase="TRAINING", proved={a: 1}, stale={b: "gap 0.3"})
    await house.drain(c)
    now = samples((await house.client.get("/metrics")).text)
    counts = {key[1][0]: n for key, n in now.items() if key[0] == "keel_leases"}
    assert {state: n for state, n in counts.items() if n} == {
        **{"ready": 1, "stale": 1, "drained": 1, "free": 1},
    }
    assert {"joining", "draining", "lost"} <= counts.keys()
    listed = (await house.client.get("/v1/engines")).json()["engines"]
    assert [engine["stale"] for engine in listed] == ["", "gap 0.3", "", ""]
