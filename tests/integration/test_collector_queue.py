"""What the collector has in flight: large envelopes in the blob store, and when it holds back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from collector_peers import ScriptedEngine, make_spec, publish, write_run
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given
from hypothesis import settings as checked
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from rediskit import RedisServer

from keel.blobs import BlobStore
from keel.queue import (
    BLOB_FIELD,
    CONSUMER_GROUP,
    ENVELOPE_FIELD,
    SlotKey,
    bytes_key,
    data_key,
    demos_key,
    groups_key,
    metrics_key,
    run_key,
    slot_of,
    unpack,
)
from keel.record import RunRecord
from keel.spec import RunSpec
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.data import RunData
from keel_rollout.collector.follow import Follower
from keel_rollout.collector.holds import Holds
from keel_rollout.collector.main import connect
from keel_rollout.collector.plan import Plan, Slot
from keel_rollout.collector.record_write import set_fields, set_first, tell
from keel_rollout.collector.redis_memory import RedisMemory
from keel_rollout.collector.room import DEFAULT_QUEUE, Packed, QueueSettings, Room
from keel_rollout.collector.streams import SlotStream
from keel_rollout.collector.text import TextCodec
from keel_rollout.collector.verify import VerifierPool

GROUPS, BYTES = groups_key("r"), bytes_key(groups_key("r"))


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(str(tmp_path / "blobs"))


@contextlib.asynccontextmanager
async def collector(url: str, settings: QueueSettings) -> AsyncIterator[None]:
    """A collector in this process, from its start to its end."""
    connection, pool = connect(url), VerifierPool()
    following = asyncio.create_task(Follower(connection, pool, settings).follow())
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait({following})
        await pool.close()
        await connection.aclose()


@contextlib.asynccontextmanager
async def stream(url: str, settings: QueueSettings = DEFAULT_QUEUE) -> AsyncIterator[SlotStream]:
    """The stream of groups of run "r", and what keeps its record."""
    connection = connect(url)
    holds = Holds(connection, "r", "")
    room = Room(connection, "r", settings, RedisMemory(connection), holds)
    following = [asyncio.create_task(work) for work in (holds.follow(), room.flight.follow())]
    try:
        yield SlotStream(connection, "groups", "r", room)
    finally:
        for task in following:
            task.cancel()
        await asyncio.wait(following)
        await holds.end()
        await connection.aclose()


async def until(holds: Callable[[], object], seconds: float = 15) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.02)


def void(lap: int, slot: int = 0, size: int = 1000) -> Packed:
    """An envelope of about `size` bytes."""
    place = sequence_pb2.SlotId(run="r", lap=lap, slot=slot)
    return Packed.of(sequence_pb2.Envelope(id=place, void=sequence_pb2.VoidSlot(reason="x" * size)))


def queue_full(client: redis.Redis) -> str:
    return RunRecord.from_hash("r", client.hgetall(run_key("r"))).queue_full


def acknowledge(client: redis.Redis, lap: int) -> None:
    """What the trainer does once a checkpoint covers a lap."""
    mine = [(id, slot_of(f)) for id, f in client.xrange(GROUPS) if slot_of(f).lap == lap]
    with client.pipeline(transaction=True) as pipe:
        pipe.xack(GROUPS, CONSUMER_GROUP, *[id for id, _ in mine])
        pipe.xdel(GROUPS, *[id for id, _ in mine])
        pipe.hdel(BYTES, *[str(slot) for _, slot in mine])
        pipe.execute()


def in_flight(client: redis.Redis) -> dict[str, int]:
    return {slot.decode(): int(size) for slot, size in client.hgetall(BYTES).items()}


@pytest.mark.parametrize("inline", [1, 10**6])
async def test_large_envelopes_lie_in_the_blob_store_and_small_ones_in_redis(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    blobs: BlobStore,
    inline: int,
) -> None:
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url, QueueSettings(inline_bytes=inline, blobs=blobs)):
        await until(lambda: client.xlen(GROUPS) == 8)
    place = BLOB_FIELD if inline == 1 else ENVELOPE_FIELD
    sizes = {}
    for _, fields in client.xrange(GROUPS):
        assert place in fields
        envelope = unpack(fields, run="r", read=lambda ref: blobs.get(ref, run="r"))
        assert len(envelope.group.sequences) == 4
        sizes[str(SlotKey.of(envelope.id))] = envelope.ByteSize()
    assert in_flight(client) == sizes
    assert len(blobs.slots("r", "groups")) == (8 if inline == 1 else 0)


async def test_demonstrations_too(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    blobs: BlobStore,
) -> None:
    spec = make_spec(cold_start={"steps": 3, "batch_size": 3})
    write_run(client, spec, artifact, engine.address, phase="COLD_START")
    async with collector(server.url, QueueSettings(inline_bytes=1, blobs=blobs)):
        await until(lambda: client.xlen(demos_key("r")) == 3)
    found = [
        unpack(fields, run="r", read=lambda ref: blobs.get(ref, run="r"))
        for _, fields in client.xrange(demos_key("r"))
    ]
    assert [len(e.demonstrations.demonstrations) for e in found] == [3] * 3
    sizes = {str(SlotKey.of(e.id)).encode(): b"%d" % e.ByteSize() for e in found}
    assert client.hgetall(bytes_key(demos_key("r"))) == sizes


async def test_without_a_blob_store_it_says_once_that_large_groups_go_through_redis(
    server: RedisServer, client: redis.Redis, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(client, make_spec(), artifact, "")
    async with stream(server.url) as groups:
        for slot in range(3):
            await groups.add(void(0, slot, size=3 * 10**6))
    assert client.xlen(GROUPS) == 3
    assert caplog.text.count("groups of 3.00 MB go through Redis") == 1


async def test_another_lap_waits_for_the_acknowledgement_of_an_earlier_one(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A lap is 44 kB at worst and about 7 kB in truth; lap 0 has left 99 kB of 100."""
    write_run(client, make_spec(), artifact, engine.address, policy_version=1)
    place = sequence_pb2.SlotId(run="r", lap=0, slot=5)
    reason = sequence_pb2.VoidSlot(reason="x" * 98_900)
    held = REGISTRY.get_sample_value("keel_collector_held_seconds_total", {"cause": "queue"})
    async with stream(server.url) as groups:
        await groups.add(Packed.of(sequence_pb2.Envelope(id=place, void=reason)))
    with caplog.at_level(logging.INFO):
        async with collector(server.url, QueueSettings(queue_bytes=100_000)):
            await until(lambda: queue_full(client))
            await asyncio.sleep(0.5)
            there = client.xlen(GROUPS)
            assert 1 <= there < 9, "the limit was reached within the lap"
            assert sum(in_flight(client).values()) <= 100_000
            text = queue_full(client)
            assert text.startswith("100 kB in flight and 1.07 kB of slot 0/1/")
            assert "are more than --queue-bytes 100 kB; it waits for a checkpoint" in text
            assert "from attempt/lap 0/0 on" in text
            gauge = REGISTRY.get_sample_value("keel_collector_bytes_in_flight")
            assert gauge == pytest.approx(99_000, abs=1000)
            acknowledge(client, 0)
            await until(lambda: client.xlen(GROUPS) == 8)
            await until(lambda: not queue_full(client))
    assert caplog.text.count("is held back") == caplog.text.count("no longer held back") == 1
    now = REGISTRY.get_sample_value("keel_collector_held_seconds_total", {"cause": "queue"})
    assert now >= held + 0.5
    assert REGISTRY.get_sample_value("keel_collector_bytes_in_flight") == 0


async def test_bytes_of_the_own_lap_never_hold_back(
    server: RedisServer, client: redis.Redis, artifact: Path
) -> None:
    """A lap must be whole before any of it can be acknowledged."""
    write_run(client, make_spec(), artifact, "")
    async with stream(server.url, QueueSettings(queue_bytes=1500)) as groups:
        for slot in range(4):
            await asyncio.wait_for(groups.add(void(0, slot)), 5)
        assert queue_full(client) == ""
        waiting = [asyncio.create_task(groups.add(void(1, slot))) for slot in range(12)]
        await until(lambda: queue_full(client))
        assert client.xlen(GROUPS) == 4
        acknowledge(client, 0)
        await asyncio.gather(*waiting)
        await until(lambda: not queue_full(client))
    assert [slot_of(f).lap for _, f in client.xrange(GROUPS)] == [1] * 12


async def test_several_at_once_do_not_pass_the_limit_together(
    server: RedisServer, client: redis.Redis, artifact: Path
) -> None:
    """Eight of 1 kB come at once where three fit."""
    write_run(client, make_spec(), artifact, "")
    async with stream(server.url, QueueSettings(queue_bytes=4500)) as groups:
        await groups.add(void(0))
        waiting = [asyncio.create_task(groups.add(void(1, slot))) for slot in range(8)]
        await until(lambda: queue_full(client))
        await asyncio.sleep(0.3)
        assert client.xlen(GROUPS) == 4
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await until(lambda: not queue_full(client))


async def test_an_envelope_added_twice_counts_once(
    server: RedisServer, client: redis.Redis, artifact: Path
) -> None:
    """Two collectors add the same slot, as where a lost reply makes one do so."""
    write_run(client, make_spec(), artifact, "")
    for _ in range(2):
        async with stream(server.url) as groups:
            groups.added = _nothing  # type: ignore[method-assign]
            await groups.add(void(0))
    assert client.xlen(GROUPS) == 2
    assert in_flight(client) == {"0/0/0": void(0).size}


async def _nothing() -> set[SlotKey]:
    return set()


async def test_what_a_killed_collector_left_in_the_record_is_cleared(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    client.hset(run_key("r"), "queue_full", "of another life")
    async with collector(server.url, DEFAULT_QUEUE):
        await until(lambda: client.xlen(GROUPS) == 8)
        await until(lambda: not queue_full(client))


async def test_a_run_that_ends_while_it_is_held_back_is_left_without_the_word(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    write_run(client, make_spec(), artifact, engine.address, policy_version=1)
    client.hset(BYTES, "0/0/0", 10**6)
    async with collector(server.url, QueueSettings(queue_bytes=100_000)):
        await until(lambda: queue_full(client))
        client.hset(run_key("r"), "desired", "CANCELLED")
        await until(lambda: not queue_full(client))


async def test_an_addition_to_a_stream_that_is_gone_leaves_no_bytes_behind(
    server: RedisServer, client: redis.Redis, artifact: Path
) -> None:
    write_run(client, make_spec(), artifact, "")
    client.delete(GROUPS)
    async with stream(server.url) as groups:
        adding = asyncio.create_task(groups.add(void(0)))
        await until(lambda: client.info("commandstats").get("cmdstat_hdel"))
        adding.cancel()
        await asyncio.wait({adding})
    assert not client.exists(GROUPS, BYTES)


async def test_a_lap_that_could_be_too_large_fails_the_run_before_anything_is_sampled(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """8 x 4 sequences of at most 6 + 24 tokens, 12 bytes each and 1024: 44 kB."""
    spec = make_spec(evaluation={"every": 2, "samples": 4})
    write_run(client, spec, artifact, engine.address, policy_version=0)
    async with collector(server.url, QueueSettings(queue_bytes=30_000)):
        await until(lambda: client.hget(run_key("r"), "collector_error"))
    error = client.hget(run_key("r"), "collector_error").decode()
    assert error.startswith("rollout.max_tokens: 24 is not valid; valid: a --queue-bytes of 44")
    assert "8 groups of group_size 4 sequences of up to 30 tokens is 44.3 kB at worst" in error
    assert "--queue-bytes of the collector is 30.0 kB" in error
    assert not engine.requests


@pytest.mark.parametrize(("limit", "refused"), [(100_000, True), (200_000, False)])
async def test_the_longest_prompt_counts_in_whatever_lap_it_comes(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    tmp_path: Path,
    limit: int,
    refused: bool,
) -> None:
    """8 x 4 sequences: at most 5 + 24 tokens in lap 0, 300 + 24 in a later one; 600 are too long
    for the model, and its slot VOID."""
    path = tmp_path / "d.jsonl"
    spec = make_spec(
        task={"dataset": str(path), "verifier": "exact"},
        recipe={"steps": 20},
        evaluation={"every": 0},
    )
    rows = [{"prompt": f"{i + 10}*2=", "answer": "1"} for i in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = {int(slot.problem.prompt.split("*")[0]) - 10 for slot in lap_slots(spec, artifact)}
    long, void = [row for row in range(80) if row not in first][:2]
    rows[long]["prompt"], rows[void]["prompt"] = "12*2=" * 60, "12*2=" * 120
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert max(len(slot.prompt_ids_P) for slot in lap_slots(spec, artifact)) == 5

    write_run(client, spec, artifact, engine.address, policy_version=0)
    async with collector(server.url, QueueSettings(queue_bytes=limit)):
        await until(lambda: client.hget(run_key("r"), "collector_error") or client.xlen(GROUPS))
    error = (client.hget(run_key("r"), "collector_error") or b"").decode()
    assert ("sequences of up to 324 tokens is 157 kB at worst" in error) == refused, error
    assert bool(engine.requests) != refused


def lap_slots(spec: RunSpec, artifact: Path) -> list[Slot]:
    """The prompts of lap 0."""
    data = RunData(spec)
    try:
        return Plan("r", spec, data, TextCodec.from_artifact(artifact)).lap_slots(0, 0)
    finally:
        data.close()


async def test_a_record_that_redis_has_lost_does_not_come_back_as_half_a_record(
    server: RedisServer, client: redis.Redis, artifact: Path
) -> None:
    write_run(client, make_spec(), artifact, "")
    connection = connect(server.url)
    holds = Holds(connection, "r", "")
    following = asyncio.create_task(holds.follow())
    try:
        with holds.because("blobs", "first"):
            await until(lambda: queue_full(client) == "first")
            assert await set_first(connection, "r", data_key("r"), "f", "a")
            assert await set_first(connection, "r", data_key("r"), "f", "b")
            assert client.hgetall(data_key("r")) == {b"f": b"a"}, "the first stays"
            client.flushall()
            with holds.because("redis", "second"):
                await until(lambda: client.info("commandstats")["cmdstat_eval"]["calls"] == 4)
                assert not await set_first(connection, "r", data_key("r"), "f", "a")
                assert not await set_fields(connection, "r", metrics_key("r"), {"0": "{}"})
                assert not await tell(connection, "r", collector_error="x")
    finally:
        following.cancel()
        await asyncio.wait({following})
        await holds.end()
        await connection.aclose()
    assert client.keys() == []


async def test_a_run_that_redis_loses_in_the_middle_leaves_nothing_behind(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """It is held back as the record goes, and lets go of it a moment later."""
    write_run(client, make_spec(), artifact, engine.address, policy_version=1)
    client.hset(BYTES, "0/0/0", 10**6)
    async with collector(server.url, QueueSettings(queue_bytes=100_000)):
        await until(lambda: queue_full(client))
        client.flushall()
        await asyncio.sleep(1.5)
    assert client.keys() == []


async def test_a_record_that_comes_back_as_it_was_earlier_is_told_again(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """Why the run is held back, without which the trainer would not checkpoint; then its end."""
    write_run(client, make_spec(), artifact, engine.address, policy_version=1)
    client.hset(BYTES, "0/0/0", 10**6)
    kept = server.kept()
    async with collector(server.url, QueueSettings(queue_bytes=100_000)):
        await until(lambda: queue_full(client))
        held = server.kept()
        server.restart_with(kept)
        assert not queue_full(client)
        await until(lambda: queue_full(client))
        client.hdel(BYTES, "0/0/0")
        await until(lambda: client.xlen(GROUPS) == 8 and not queue_full(client))
        server.restart_with(held)
        assert queue_full(client)
        client.hdel(BYTES, "0/0/0")
        await until(lambda: client.xlen(GROUPS) == 8 and not queue_full(client))


async def test_a_full_redis_is_waited_for_also_within_a_script(
    server: RedisServer, client: redis.Redis, artifact: Path
) -> None:
    write_run(client, make_spec(), artifact, "")
    client.config_set("maxmemory", 1)
    connection = connect(server.url)
    writing = asyncio.create_task(tell(connection, "r", collector_error="x"))
    await asyncio.sleep(0.3)
    assert not writing.done()
    client.config_set("maxmemory", 0)
    await asyncio.wait_for(writing, 10)
    await connection.aclose()
    assert client.hget(run_key("r"), "collector_error") == b"x"


async def fill_redis(client: redis.Redis, share: float) -> int:
    """Sets maxmemory so that `share` of it is used, and lets the collector see it; returns it."""
    await asyncio.sleep(0.3)  # buffers of the last addition are free again
    limit = int(client.info("memory")["used_memory"] / share)
    client.config_set("maxmemory", limit)
    await asyncio.sleep(0.3)
    return limit


async def test_a_redis_near_its_limit_waits_for_the_acknowledgement_of_an_earlier_lap(
    server: RedisServer, client: redis.Redis, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Small writes, the record's among them, still go through: 3 MB in flight of 5."""
    write_run(client, make_spec(), artifact, "")
    async with stream(server.url) as groups:
        await groups.add(void(0, size=3 * 10**6))
        await fill_redis(client, 0.8)
        adding = asyncio.create_task(groups.add(void(1, size=10**6)))
        await until(lambda: queue_full(client))
        await asyncio.sleep(0.5)
        assert not adding.done()
        text = queue_full(client)
        assert text.startswith("Redis uses ")
        assert "and 1.00 MB more would fill it above 85%; it waits for a checkpoint" in text
        acknowledge(client, 0)
        await adding
        await until(lambda: not queue_full(client))
    assert caplog.text.count("is held back") == 1


async def test_a_redis_full_of_other_things_says_what_to_do(
    server: RedisServer, client: redis.Redis, artifact: Path
) -> None:
    write_run(client, make_spec(), artifact, "")
    async with stream(server.url) as groups:
        limit = await fill_redis(client, 0.8)
        adding = asyncio.create_task(groups.add(void(0, size=10**6)))
        remedy = "raise maxmemory, or give collector and trainer a folder for --blobs"
        await until(lambda: remedy in queue_full(client))
        await asyncio.sleep(0.3)
        assert not adding.done()
        client.config_set("maxmemory", 4 * limit + 10**7)
        await adding
        await until(lambda: not queue_full(client))


async def test_near_the_limit_of_redis_small_envelopes_go_to_the_blob_store_too(
    server: RedisServer, client: redis.Redis, artifact: Path, blobs: BlobStore
) -> None:
    write_run(client, make_spec(), artifact, "")
    async with stream(server.url, QueueSettings(blobs=blobs)) as groups:
        await groups.add(void(0, 0, size=5000))
        await fill_redis(client, 0.9)
        await asyncio.wait_for(groups.add(void(0, 1, size=5000)), 5)
    places = [BLOB_FIELD in fields for _, fields in client.xrange(GROUPS)]
    assert places == [False, True]
    assert not queue_full(client)


async def test_a_disk_that_takes_no_more_is_waited_for_and_nothing_is_lost(
    server: RedisServer,
    client: redis.Redis,
    artifact: Path,
    blobs: BlobStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The disk's limit is the process's: no file above 64 kB, until it is lifted."""
    write_run(client, make_spec(), artifact, "")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with stream(server.url, QueueSettings(inline_bytes=100, blobs=blobs)) as groups:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
        try:
            adding = asyncio.create_task(groups.add(void(0, size=200_000)))
            await until(lambda: queue_full(client))
            await asyncio.sleep(0.5)
            assert client.xlen(GROUPS) == 0
            text = queue_full(client)
            assert text.startswith("the blob store cannot take 200 kB of slot 0/0/0: [Errno 27]")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await adding
        await until(lambda: not queue_full(client))
    ((_, fields),) = client.xrange(GROUPS)
    envelope = unpack(fields, run="r", read=lambda ref: blobs.get(ref, run="r"))
    assert envelope.void.reason == "x" * 200_000
    assert list(blobs.slots("r", "groups")) == [SlotKey(0, 0, 0)]
    assert caplog.text.count("is held back") == 1


async def test_a_store_behind_a_network_may_fail_in_its_own_way(
    server: RedisServer, client: redis.Redis, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package that speaks to it has errors of its own."""
    blobs = BlobStore("memory://blobs")
    write, tries = MemoryFileSystem.pipe_file, []

    def slow_down(*arguments: Any, **options: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("503 slow down")
        write(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", slow_down)
    write_run(client, make_spec(), artifact, "")
    async with stream(server.url, QueueSettings(inline_bytes=100, blobs=blobs)) as groups:
        adding = asyncio.create_task(groups.add(void(0)))
        await until(lambda: "503 slow down" in queue_full(client))
        await adding
        await until(lambda: not queue_full(client))
    ((_, fields),) = client.xrange(GROUPS)
    assert unpack(fields, run="r", read=lambda ref: blobs.get(ref, run="r")).void.reason


async def test_a_void_slot_is_added_though_redis_is_near_its_limit(
    server: RedisServer, client: redis.Redis, artifact: Path
) -> None:
    """It is as small as the entry of a blob, and a lap needs it."""
    write_run(client, make_spec(), artifact, "")
    await fill_redis(client, 0.9)
    async with stream(server.url) as groups:
        await asyncio.wait_for(groups.add(void(0, size=300)), 5)
    assert client.xlen(GROUPS) == 1


@checked(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    laps=st.lists(st.lists(st.integers(600, 5000), min_size=1, max_size=6), min_size=2, max_size=5),
    limit=st.integers(1000, 30_000),
)
def test_whatever_the_sizes_it_neither_stands_still_nor_exceeds_the_limit(
    server: RedisServer, laps: list[list[int]], limit: int
) -> None:
    """A trainer that acknowledges whole laps, and only when it sees that the collector holds back.
    Above the limit is only what one lap alone has, and all that was held back comes in the end."""

    async def trained(client: redis.Redis) -> None:
        async with stream(server.url, QueueSettings(queue_bytes=limit)) as groups:
            acknowledged = 0
            for lap, sizes in enumerate(laps):
                adds = [groups.add(void(lap, slot, size)) for slot, size in enumerate(sizes)]
                adding = asyncio.gather(*adds)
                while not adding.done():
                    flight = in_flight(client)
                    there = {slot.split("/")[1] for slot in flight}
                    assert sum(flight.values()) <= limit or len(there) == 1
                    if queue_full(client):
                        for covered in range(acknowledged, lap):
                            acknowledge(client, covered)
                        acknowledged = lap
                    await asyncio.sleep(0.01)
                assert sum(slot_of(f).lap == lap for _, f in client.xrange(GROUPS)) == len(sizes)
        assert not queue_full(client)

    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        write_run(client, make_spec(), Path("/nowhere"), "")
        asyncio.run(asyncio.wait_for(trained(client), 30))


async def test_lap_after_lap_under_a_limit_of_one_lap_and_a_half(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """A trainer that acknowledges only when it is asked to: nothing is lost, nothing comes twice,
    and what is in flight never exceeds the limit."""
    spec = make_spec(recipe={"off_policiness": 2, "groups_per_minibatch": 4, "steps": 40})
    write_run(client, spec, artifact, engine.address, policy_version=0)
    seen: list[SlotKey] = []
    asked = 0
    async with collector(server.url, QueueSettings(queue_bytes=45_000)):
        acknowledged = 0
        for lap in range(20):
            if lap:
                publish(client, lap)
            while sum(slot_of(f).lap == lap for _, f in client.xrange(GROUPS)) < 8:
                assert sum(in_flight(client).values()) <= 45_000
                if queue_full(client) and acknowledged < lap:
                    asked += 1
                    for covered in range(acknowledged, lap):
                        acknowledge(client, covered)
                    acknowledged = lap
                await asyncio.sleep(0.01)
            seen += [slot_of(f) for _, f in client.xrange(GROUPS) if slot_of(f).lap == lap]
    assert sorted(seen) == [SlotKey(0, lap, slot) for lap in range(20) for slot in range(8)]
    assert asked > 0
