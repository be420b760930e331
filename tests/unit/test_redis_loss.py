"""Redis that has lost its data, or takes no writes, below a gateway that goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from gateway_house import House, the_problem
from gateway_peers import SPEC, eventually
from redis.exceptions import ResponseError
from rediskit import RedisServer

from keel.queue import DEPLOYMENT_KEY, FENCING_KEY, run_key
from keel.record import RunRecord, pack_fields
from keel_gateway import redis_trouble, store


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    server = RedisServer(tmp_path)
    server.start()
    with redis.Redis.from_url(server.url) as client:
        yield House(server, client)
    server.stop()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


def token(house: House, run: str) -> int:
    raw: Any = house.redis.hgetall(run_key(run))
    return RunRecord.from_hash(run, raw).fencing_token


async def test_lost_jobs_are_named_and_new_ones_run(
    house: House,
    stack: AsyncExitStack,
    caplog: pytest.LogCaptureFixture,
) -> None:
    began_s = int(time.time())
    client = await house.open(stack)
    jobs = [(await client.post("/v1/jobs", json=SPEC)).json()["id"] for _ in range(3)]
    ended, training, queued = jobs
    house.write(ended, phase="SUCCEEDED", folder="/runs/ended")
    await eventually(lambda: house.trainer.started[-1:] == [(training, token(house, training))])
    house.write(training, phase="TRAINING", step=4, folder="/runs/training")
    seen = await eventually(lambda: token(house, training))
    assert seen > began_s, "a fresh counter begins above whatever engines have seen"
    await eventually(lambda: _step_is(client, training, 4))
    assert (await client.get("/readyz")).json() == {"status": "ok", "notes": []}
    marker = house.redis.get(DEPLOYMENT_KEY)

    with caplog.at_level(logging.ERROR):
        house.redis.flushall()
        house.write(training, phase="FAILED")  # a trainer that does not know yet: no record
        told = the_problem(await client.get(f"/v1/jobs/{training}"), 404)["detail"]
    assert f"run '{training}' is lost: Redis was restarted without its data" in told
    assert " UTC" in told
    assert "stopped after step 4" in told
    assert "checkpoints are still in /runs/training;" in told
    told = the_problem(await client.get(f"/v1/jobs/{ended}/metrics"), 404)["detail"]
    assert "It had ended (SUCCEEDED). Checkpoints and model are still in /runs/ended" in told
    told = the_problem(await client.post(f"/v1/jobs/{queued}/cancel"), 404)["detail"]
    assert "It had not begun: submit it again" in told
    told = the_problem(await client.get("/v1/jobs/never-was"), 404)["detail"]
    assert told.startswith("no run 'never-was'")
    (note,) = (await client.get("/readyz")).json()["notes"]
    assert f"3 jobs are lost, 2 of them unfinished ({training}, {queued})" in note
    assert [record.getMessage() for record in caplog.records] == [note], "logged once"
    assert house.redis.get(DEPLOYMENT_KEY) not in (None, marker)

    anew = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    await eventually(lambda: house.trainer.started[-1] == (anew, token(house, anew)))
    assert token(house, anew) > seen, "engines and trainer take the new lease"
    assert [one["id"] for one in (await client.get("/v1/jobs")).json()["jobs"]] == [anew]
    assert 'keel_jobs{phase="succeeded"} 0' in (await client.get("/metrics")).text.lower()
    assert len((await client.get("/readyz")).json()["notes"]) == 1


async def test_a_clock_that_is_set_back_gives_no_token_twice(
    house: House,
    stack: AsyncExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = await house.open(stack)
    first = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    before = await eventually(lambda: token(house, first))
    house.redis.flushall()
    # not of `time` itself: gRPC takes its deadlines from it
    monkeypatch.setattr(store, "time", SimpleNamespace(time=lambda: 1e9))
    second = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    assert await eventually(lambda: token(house, second)) > before


async def test_an_older_copy_of_the_data_gives_no_token_twice(
    house: House, stack: AsyncExitStack
) -> None:
    client = await house.open(stack)
    first = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    before = await eventually(lambda: token(house, first))
    house.redis.set(FENCING_KEY, before - 100)
    house.write(first, phase="SUCCEEDED")
    second = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    assert await eventually(lambda: token(house, second)) == before + 1
    assert house.redis.get(FENCING_KEY) == str(before + 1).encode()


async def test_at_its_memory_limit_writes_are_503_and_reads_go_on(
    house: House,
    stack: AsyncExitStack,
) -> None:
    client = await house.open(stack)
    job = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    await eventually(lambda: house.trainer.started)
    waits = (await client.post("/v1/jobs", json=SPEC)).json()["id"]
    house.redis.config_set("maxmemory", 1)
    told = the_problem(await client.post("/v1/jobs", json=SPEC), 503)["detail"]
    assert told.startswith("Redis is at its memory limit and takes no writes: raise its maxmemory")
    assert told == the_problem(await client.post(f"/v1/jobs/{job}/cancel"), 503)["detail"]
    assert told in the_problem(await client.get("/readyz"), 503)["detail"]
    assert (await client.get(f"/v1/jobs/{job}")).json()["id"] == job
    assert len((await client.get("/v1/jobs")).json()["jobs"]) == 2
    assert (await client.get(f"/v1/jobs/{job}/metrics")).json()["rows"] == []
    house.redis.config_set("maxmemory", 0)
    with house.redis.pipeline(
        transaction=True
    ) as pipe:  # a lease becomes free, and cannot be given
        pipe.hset(run_key(job), mapping=pack_fields(phase="SUCCEEDED"))
        pipe.config_set("maxmemory", 1)
        pipe.execute()
    await eventually(lambda: _reason_is(client, waits, told))
    house.redis.config_set("maxmemory", 0)
    await eventually(lambda: house.trainer.started[-1][0] == waits)
    assert (await client.get("/readyz")).status_code == 200


def test_a_disk_that_is_full_is_said() -> None:
    error = ResponseError("MISCONF Errors writing to the AOF file: No space left on device")
    told = redis_trouble.describe(error)
    assert told.startswith("Redis cannot write to its disk and takes no writes: make room there")
    assert "No space left on device" in told


async def _step_is(client: Any, run: str, step: int) -> bool:
    return bool((await client.get(f"/v1/jobs/{run}")).json()["step"] == step)


async def _reason_is(client: Any, run: str, reason: str) -> bool:
    return bool((await client.get(f"/v1/jobs/{run}")).json()["reason"] == reason)
