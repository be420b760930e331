"""The collector between a real Redis and an engine that misbehaves on cue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from unittest.mock import AsyncMock

import grpc
import numpy as np
import pytest
import redis
import redis.asyncio
from collector_peers import (
    ScriptedEngine,
    envelopes,
    lease,
    make_spec,
    publish,
    without_times,
    write_run,
)
from redis.asyncio.client import Pipeline
from rediskit import RedisServer

from keel.codec import fill, to_ndarray, xxh3
from keel.queue import demos_key, metrics_key, run_key, slot_of
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2
from keel_rollout.collector import produce
from keel_rollout.collector.flight import Flight
from keel_rollout.collector.follow import Follower
from keel_rollout.collector.holds import Holds
from keel_rollout.collector.main import connect
from keel_rollout.collector.redis_memory import MemoryLevel, RedisMemory
from keel_rollout.collector.room import DEFAULT_QUEUE, Packed, QueueSettings, Room
from keel_rollout.collector.streams import SlotStream
from keel_rollout.collector.verify import VerifierPool


@contextlib.asynccontextmanager
async def collector(url: str) -> AsyncIterator[asyncio.Task[None]]:
    """A collector in this process, from its start to its end."""
    connection, pool = connect(url), VerifierPool()
    following = asyncio.create_task(Follower(connection, pool).follow())
    try:
        yield following
    finally:
        following.cancel()
        await asyncio.wait({following})
        await pool.close()
        await connection.aclose()


async def until(holds: Callable[[], object], seconds: float = 15) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.02)


def make_stream(client: redis.asyncio.Redis, settings: QueueSettings = DEFAULT_QUEUE) -> SlotStream:
    """The stream of groups of run "r"."""
    room = Room(client, "r", settings, RedisMemory(client), Holds(client, "r", ""))
    return SlotStream(client, "groups", "r", room)


def error_of(client: redis.Redis) -> str:
    return (client.hget(run_key("r"), "collector_error") or b"").decode()


async def test_a_lap_gives_one_whole_envelope_a_slot(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    write_run(client, make_spec(), artifact, engine.address, policy_version=1)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
        await asyncio.sleep(0.2)
    found = envelopes(client)
    assert [(e.id.attempt, e.id.lap, e.id.slot) for e in found] == [(0, 1, s) for s in range(8)]
    request = engine.requests[0]
    assert request.cohort.id == "0/1/train/0"
    assert request.cohort.size == 8
    assert request.require_policy_version == 1
    assert request.with_routes
    assert list(request.sampling.stop_token_ids) == [1]
    assert len({r.seed for r in engine.requests}) == 8
    for envelope in found:
        assert envelope.group.engine == engine.address
        for sample, sequence in enumerate(envelope.group.sequences):
            tokens_T = to_ndarray(sequence.token_ids, "t", dtypes=("int32",), shape=(None,))
            end = len(tokens_T)
            assert tokens_T[-1] == 1
            assert (sequence.id.sample, sequence.id.slot.slot) == (sample, envelope.id.slot)
            assert [(s.begin, s.end) for s in sequence.trainable] == [(sequence.prompt_length, end)]
            assert list(sequence.rollout_logprobs.shape) == [end - sequence.prompt_length]
            assert list(sequence.routes.inline.shape) == [end - 1, 2, 2]
            assert sequence.routes_xxh3 == xxh3(sequence.routes.inline.data)
            assert sequence.policy_versions[0].policy_version == 1
            assert (sequence.reward, sequence.invalid_reason) == (1.0, "")
            assert {part.name: part.value for part in sequence.reward_parts} == {
                "multiplication": 1.0,
                "multiplication/formed": 1.0,
            }


async def test_prompts_and_seeds_depend_on_the_place_alone(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """Lap 1 sampled after lap 0 equals lap 1 sampled first; another attempt differs."""

    def asked(lap: int, attempt: int = 0) -> dict[int, tuple[bytes, int]]:
        return {
            r.id.slot: (r.prompt_token_ids.data, r.seed)
            for r in engine.requests
            if (r.id.lap, r.id.attempt) == (lap, attempt)
        }

    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
        publish(client, 1)
        await until(lambda: client.xlen("keel:groups:r") == 16)
    after, first = asked(1), asked(0)
    engine.requests.clear()
    client.xtrim("keel:groups:r", maxlen=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
        client.hset(run_key("r"), "attempt", 1)
        await until(lambda: client.xlen("keel:groups:r") == 16)
    assert asked(1) == after
    assert asked(1, attempt=1) != after
    assert first != after


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
    ],
)
async def test_engine_trouble_is_sent_again_as_a_whole_cohort(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    code: grpc.StatusCode,
) -> None:
    troubles = iter([code, code])
    engine.abort = lambda request: next(troubles, None) if request.id.slot == 5 else None
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
        await asyncio.sleep(0.1)
    assert [e.WhichOneof("payload") for e in envelopes(client)] == ["group"] * 8

    tries = Counter(request.cohort.try_number for request in engine.requests)
    assert len(tries) == 3
    assert tries[max(tries)] == 8
    assert list(tries) == sorted(tries)


async def test_an_aborted_response_is_engine_trouble(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    aborts = iter([True])

    def abort(request: pb.GenerateRequest, message: pb.GenerateResponse) -> None:
        if message.HasField("complete") and next(aborts, False):
            message.complete.finish_reason = sequence_pb2.FINISH_REASON_ABORTED

    engine.change = abort
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
    assert all(
        sequence.finish_reason == sequence_pb2.FINISH_REASON_STOP
        for envelope in envelopes(client)
        for sequence in envelope.group.sequences
    )


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED]
)
async def test_a_refusal_goes_into_the_record(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    code: grpc.StatusCode,
) -> None:
    engine.abort = lambda request: code
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: error_of(client))
        asked = len(engine.requests)
        await asyncio.sleep(0.3)
        assert len(engine.requests) == asked
    assert error_of(client) == f"engine {engine.address}: {code.name}: scripted"
    assert client.xlen("keel:groups:r") == 0


async def test_a_broken_contract_goes_into_the_record(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    def miscount(request: pb.GenerateRequest, message: pb.GenerateResponse) -> None:
        if message.HasField("complete"):
            message.complete.response_tokens += 1

    engine.change = miscount
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: error_of(client))
    assert "breaks the contract: complete.response_tokens" in error_of(client)


async def test_bad_numbers_cost_their_sequence_and_a_slot_without_two_valid_is_void(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """Slot 1 loses a log-prob, slot 2 a route, slot 3 three log-probs of four sequences."""

    def spoil(request: pb.GenerateRequest, message: pb.GenerateResponse) -> None:
        if not message.HasField("chunk"):
            return
        slot, chunk = request.id.slot, message.chunk
        if chunk.HasField("token_ids") and (slot, chunk.sample) in {(1, 2), (3, 0), (3, 1), (3, 3)}:
            bad = np.full(chunk.rollout_logprobs.shape, math.nan, np.float32)
            fill(chunk.rollout_logprobs, bad)
        if chunk.HasField("routes") and (slot, chunk.sample) == (2, 0):
            fill(chunk.routes, np.full(chunk.routes.shape, 200, np.uint8))

    engine.change = spoil
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
    found = envelopes(client)
    assert [s.invalid_reason for s in found[1].group.sequences] == [
        "",
        "",
        "a rollout log-prob is not finite",
        "",
    ]
    reasons = [s.invalid_reason for s in found[2].group.sequences]
    assert reasons == ["invalid routes: they differ from the engine's checksum", "", "", ""]
    assert not found[2].group.sequences[0].HasField("routes")
    assert found[3].void.reason == (
        "1 of 4 responses are valid, 2 needed; the first fault: a rollout log-prob is not finite"
    )


async def test_prompts_that_are_too_long_are_void_before_cohorts_are_formed(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    engine.max_sequence_tokens = 29  # "12*3=" and 24 more; "123*4=" is one too long
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
    kinds = Counter(e.WhichOneof("payload") for e in envelopes(client))
    assert kinds["void"] > 0 < kinds["group"]
    assert {request.cohort.size for request in engine.requests} == {kinds["group"]}
    reason = next(e.void.reason for e in envelopes(client) if e.HasField("void"))
    assert reason == "prompt of 6 tokens + max_tokens 24 = 30; the model takes 29"


async def test_a_collector_restarted_mid_lap_goes_on_from_redis(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """Killed with 3 of 8 slots out; the second adds the other 5, the same as an undisturbed one."""
    spec = make_spec()
    write_run(client, spec, artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
    undisturbed = [without_times(envelope) for envelope in envelopes(client)]
    client.xtrim("keel:groups:r", maxlen=0)
    forever = asyncio.Event()
    waits: set[int] = {0, 2, 4, 6, 7}
    answer = engine.Generate

    async def some(request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        if request.id.slot in waits:
            await forever.wait()
        await answer(request, context)

    engine.Generate = some  # type: ignore[method-assign]
    await engine.stop()
    engine.address = await engine.start()
    lease(client, engine.address)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 3)
    waits.clear()
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
        await asyncio.sleep(0.2)
    assert [without_times(envelope) for envelope in envelopes(client)] == undisturbed


async def test_redis_away_mid_lap_loses_and_repeats_nothing(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    engine.go.clear()
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: len(engine.requests) == 8)
        server.stop()
        engine.go.set()
        await until(lambda: engine.answered == 8)
        await asyncio.sleep(0.5)
        server.start()
        await until(lambda: client.xlen("keel:groups:r") == 8)
        await asyncio.sleep(0.2)
    assert [envelope.id.slot for envelope in envelopes(client)] == list(range(8))
    assert len(engine.requests) == 8


async def held_from_the_fourth_slot_on(engine: ScriptedEngine) -> asyncio.Event:
    """Slots 3 and later are answered once the event is set."""
    held = asyncio.Event()
    answer = engine.Generate

    async def slow(request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        if request.id.slot >= 3:
            await held.wait()
        await answer(request, context)

    engine.Generate = slow  # type: ignore[method-assign]
    await engine.stop()
    engine.address = await engine.start()
    return held


async def test_what_redis_has_lost_of_a_lap_that_was_out_is_added_again(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """Redis comes back as it was before the lap's last slots; the evaluation goes with them."""
    held = await held_from_the_fourth_slot_on(engine)
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 3)
        kept = server.kept()
        held.set()
        await until(lambda: client.xlen("keel:groups:r") == 8)
        whole = [without_times(envelope) for envelope in envelopes(client)]
        server.restart_with(kept)
        assert client.xlen("keel:groups:r") == 3
        await until(lambda: client.xlen("keel:groups:r") == 8)
        await asyncio.sleep(0.2)
        assert [without_times(envelope) for envelope in envelopes(client)] == whole
        assert len(client.hgetall("keel:groups:r:bytes")) == 8
        publish(client, 1)
        await until(lambda: client.xlen("keel:groups:r") == 16)


async def test_what_redis_has_lost_while_the_lap_is_under_way_is_added_again(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    held = await held_from_the_fourth_slot_on(engine)
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    kept = server.kept()
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 3)
        server.restart_with(kept)
        assert client.xlen("keel:groups:r") == 0
        held.set()
        await until(lambda: client.xlen("keel:groups:r") == 8)
        await asyncio.sleep(0.2)
    assert [envelope.id.slot for envelope in envelopes(client)] == list(range(8))


@pytest.mark.parametrize("steps", [9, 20])  # all are out; more wait for room
async def test_lost_demonstrations_are_added_again_and_none_that_were_trained_on(
    steps: int,
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(produce, "DEMONSTRATIONS_OUTSTANDING", 5)
    key = demos_key("r")
    spec = make_spec(cold_start={"steps": steps, "batch_size": 3})
    write_run(client, spec, artifact, engine.address, phase="COLD_START")

    async def train_on(count: int) -> None:
        for entry, _ in client.xrange(key, count=count):
            client.xdel(key, entry)
        await until(lambda: client.xlen(key) == 5)

    async with collector(server.url):
        await until(lambda: client.xlen(key) == 5)
        kept = server.kept()
        client.hset(run_key("r"), "cold_start_step", 4)
        await train_on(4)
        server.restart_with(kept)  # steps 0 to 4 are there, and 5 to 8 are lost
        client.hset(run_key("r"), "cold_start_step", 4)
        await asyncio.sleep(0.5)
        await train_on(4)
        await asyncio.sleep(0.2)
    assert [envelope.id.lap for envelope in envelopes(client, key=key)] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("kept", ["nothing", "three slots"])
async def test_a_stream_that_is_in_doubt_adds_what_is_not_there_and_nothing_else(
    server: RedisServer, client: redis.Redis, artifact: Path, kept: str
) -> None:
    write_run(client, make_spec(), artifact, "")
    connection = connect(server.url)
    stream = make_stream(connection)

    async def add_all() -> list[int]:
        for slot in range(6):
            place = sequence_pb2.SlotId(run="r", lap=0, slot=slot)
            void = sequence_pb2.VoidSlot(reason="x")
            await stream.add(Packed.of(sequence_pb2.Envelope(id=place, void=void)))
        return [slot_of(fields).slot for _, fields in client.xrange("keel:groups:r")]

    assert await add_all() == list(range(6))
    for entry, fields in client.xrange("keel:groups:r"):
        if kept == "nothing" or slot_of(fields).slot >= 3:
            client.xdel("keel:groups:r", entry)
    left = client.xlen("keel:groups:r")
    assert len(await add_all()) == left, "without a doubt it does not look"
    stream.doubt()
    assert await add_all() == list(range(6))
    await connection.aclose()


async def test_a_full_disk_is_waited_for(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Redis refuses writes with MISCONF while a snapshot has failed."""
    client.config_set("save", "3600 1")
    client.config_set("dbfilename", "no-such-folder.rdb")
    (Path(client.config_get("dir")["dir"]) / "no-such-folder.rdb").mkdir()
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    client.bgsave()
    await until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
    async with collector(server.url):
        await until(lambda: "MISCONF" in caplog.text)
        client.config_set("stop-writes-on-bgsave-error", "no")
        await until(lambda: client.xlen("keel:groups:r") == 8)
    assert not client.hexists(run_key("r"), "collector_error")


async def test_a_stream_dropped_by_the_trainer_is_not_made_again(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """The collector learns of a run's end later than the trainer drops its streams."""
    engine.go.clear()
    spec = make_spec(cold_start={"steps": 1000, "batch_size": 3})
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    write_run(client, spec, artifact, engine.address, run="cold", phase="COLD_START")
    async with collector(server.url):
        await until(lambda: len(engine.requests) == 8 and client.xlen(demos_key("cold")) == 256)
        client.delete("keel:groups:r", demos_key("cold"))
        engine.go.set()
        await until(lambda: engine.answered == 8)
        await asyncio.sleep(0.5)
    assert not client.exists("keel:groups:r", demos_key("cold"))


async def test_after_a_cut_the_stream_is_read_once_for_all_that_wait(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the cut is seen by the additions, not by what is read before them
    monkeypatch.setattr(Flight, "look", AsyncMock())
    monkeypatch.setattr(RedisMemory, "read", AsyncMock(return_value=MemoryLevel(0, 0)))
    engine.go.clear()
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: len(engine.requests) == 8)
        server.stop()
        engine.go.set()
        await until(lambda: engine.answered == 8)
        await asyncio.sleep(0.3)
        server.start()
        await until(lambda: client.xlen("keel:groups:r") == 8)
        calls = client.info("commandstats")["cmdstat_xrange"]["calls"]
    assert calls <= 4, "an empty page, or one page and an empty one, for each doubt"


async def test_an_engine_away_mid_lap_is_waited_for(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """The gateway leases another one: the same cohort goes there."""
    engine.go.clear()
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    other = ScriptedEngine()
    async with collector(server.url):
        await until(lambda: len(engine.requests) == 8)
        await engine.stop()
        await asyncio.sleep(0.3)
        lease(client, await other.start())
        await until(lambda: client.xlen("keel:groups:r") == 8)
    await other.stop()
    assert {r.cohort.id for r in other.requests} == {"0/0/train/0"}
    assert other.requests[0].cohort.try_number > engine.requests[0].cohort.try_number


async def test_a_new_engine_is_taken_while_other_cohorts_wait_at_the_old_one(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """Four cohorts of two groups of 128. The first moves; the second finds its channel closed."""
    other = ScriptedEngine()
    addresses = [engine.address, await other.start()]
    forever = asyncio.Event()

    async def stuck(request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        if request.cohort.id == "0/0/train/0":
            await until(lambda: len(engine.requests) == 2)
            lease(client, *addresses[1:])
            await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")
        engine.requests.append(request)
        await forever.wait()

    engine.Generate = stuck  # type: ignore[method-assign]
    await engine.stop()
    addresses[0] = await engine.start()
    spec = make_spec(rollout={"group_size": 128})
    write_run(client, spec, artifact, addresses[0], policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
    await other.stop()
    assert {request.cohort.id for request in engine.requests} == {"0/0/train/1"}
    assert {request.cohort.size for request in other.requests} == {2}


async def test_evaluation_comes_first_and_once(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    """300 held-out prompts in cohorts of 256 and 44; the engine errs on those of 2 digits."""
    wrong: set[bytes] = set()

    def err(request: pb.GenerateRequest, message: pb.GenerateResponse) -> None:
        short = request.prompt_token_ids.shape[0] == 5
        if short and message.HasField("chunk") and request.purpose == pb.PURPOSE_EVALUATION:
            wrong.add(request.id.SerializeToString())
            ids = np.array([2, *[3] * (message.chunk.token_ids.shape[0] - 1)], np.int32)
            fill(message.chunk.token_ids, ids)

    engine.change = err
    spec = make_spec(evaluation={"every": 2, "samples": 300})
    write_run(client, spec, artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
    row = json.loads(client.hget(metrics_key("r"), "0:0:evaluation"))
    assert 0 < len(wrong) < 300
    right = (300 - len(wrong)) / 300
    columns = ("accuracy/eval", "eval/held_out/avg@1", "eval/held_out/pass@1")
    assert row == {"step": 0} | dict.fromkeys(columns, pytest.approx(right))
    asked, trained = engine.requests[:300], engine.requests[300:]
    assert Counter(r.cohort.id for r in asked) == {"0/0/evaluation/0": 256, "0/0/evaluation/1": 44}
    assert {(r.sampling.temperature, r.num_samples, r.with_routes) for r in asked} == {
        (0, 1, False)
    }
    assert {r.purpose for r in trained} == {pb.PURPOSE_TRAINING}
    prompts = {r.prompt_token_ids.data for r in asked}
    assert not prompts & {r.prompt_token_ids.data for r in trained}
    engine.requests.clear()
    publish(client, 2)  # the last version: evaluated, nothing sampled
    async with collector(server.url):
        await until(lambda: client.hexists(metrics_key("r"), "0:4:evaluation"))
        await asyncio.sleep(0.2)
    assert {r.id.lap for r in engine.requests} == {2}
    assert {r.prompt_token_ids.data for r in engine.requests} == prompts


async def test_demonstrations_keep_ahead_of_the_trainer_by_a_bounded_number(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(produce, "DEMONSTRATIONS_OUTSTANDING", 5)
    key = demos_key("r")
    spec = make_spec(cold_start={"steps": 12, "batch_size": 3})
    write_run(client, spec, artifact, engine.address, phase="COLD_START")
    async with collector(server.url):
        await until(lambda: client.xlen(key) == 5)
        await asyncio.sleep(0.2)
        assert client.xlen(key) == 5
    first = envelopes(client, key=key)
    assert [envelope.id.lap for envelope in first] == [0, 1, 2, 3, 4]
    assert [len(envelope.demonstrations.demonstrations) for envelope in first] == [3] * 5
    # the trainer has taken all of them, and a new collector comes
    client.hset(run_key("r"), "cold_start_step", 5)
    client.xtrim(key, maxlen=0)
    async with collector(server.url):
        await until(lambda: client.xlen(key) == 5)
        # it takes two more, and a third collector comes
    client.hset(run_key("r"), "cold_start_step", 7)
    for entry, _ in client.xrange(key, count=2):
        client.xdel(key, entry)
    async with collector(server.url):
        await until(lambda: client.xlen(key) == 5)
        await asyncio.sleep(0.2)
    assert [envelope.id.lap for envelope in envelopes(client, key=key)] == [7, 8, 9, 10, 11]


async def test_a_cancelled_run_is_dropped_with_its_calls(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path
) -> None:
    engine.go.clear()
    write_run(client, make_spec(), artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: len(engine.requests) == 8)
        client.hset(run_key("r"), "desired", "CANCELLED")
        await until(lambda: engine.cancelled == 8)


async def test_runs_do_not_disturb_each_other(
    server: RedisServer, client: redis.Redis, engine: ScriptedEngine, artifact: Path, tmp_path: Path
) -> None:
    """One run's artifact is missing, one record is not readable: the third is served."""
    other = ScriptedEngine()
    other.run = "other"
    address = await other.start()
    client.hset(run_key("broken"), "spec", "{}")
    client.zadd("keel:runs", {"broken": 1})
    write_run(client, make_spec(), tmp_path / "nowhere", engine.address, policy_version=0)
    write_run(client, make_spec(), artifact, address, run="other", policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:other") == 8)
        await until(lambda: error_of(client))
    await other.stop()
    assert "tokenizer.json' is not a file" in error_of(client)


def write_rows(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count: int) -> list[dict[str, object]]:
    return [{"prompt": f"{i + 10}*2=", "answer": str(2 * (i + 10))} for i in range(count)]


async def test_a_file_of_prompts_two_verifiers_and_sets_of_several_responses(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    tmp_path: Path,
) -> None:
    """The engine answers "=20": `exact` never agrees, the pattern's answer always does."""
    task = {
        "dataset": write_rows(tmp_path / "d.jsonl", *sums(40)),
        "verifier": [
            {"name": "regex", "pattern": "=(?P<answer>[0-9]+)", "weight": 0.75},
            {"name": "exact", "weight": 0.25},
        ],
    }
    wrong = write_rows(tmp_path / "e.jsonl", {"prompt": "3*3=", "answer": "8"})
    sets = [{"name": "own"}, {"name": "wrong", "dataset": wrong, "verifier": "multiplication"}]
    evaluation = {
        "every": 2,
        "samples": 1,
        "k": 3,
        "temperature": 1.0,
        "top_p": 0.5,
        "max_tokens": 9,
        "pass_reward": 0.75,
        "sets": sets,
    }
    write_run(
        client,
        make_spec(task=task, evaluation=evaluation),
        artifact,
        engine.address,
        policy_version=0,
    )
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
    assert error_of(client) == ""
    row = json.loads(client.hget(metrics_key("r"), "0:0:evaluation"))
    assert row == {
        "step": 0,
        "accuracy/eval": 0.75,
        "eval/own/avg@3": 0.75,
        "eval/own/pass@3": 1.0,
        "eval/wrong/avg@3": 0.0,
        "eval/wrong/pass@3": 0.0,
    }
    evaluated = [r for r in engine.requests if r.purpose == pb.PURPOSE_EVALUATION]
    assert [(r.num_samples, r.cohort.id) for r in evaluated] == [
        (3, "0/0/evaluation/own/0"),
        (3, "0/0/evaluation/wrong/0"),
    ]
    sampling = evaluated[0].sampling
    assert (sampling.top_p, sampling.temperature, sampling.max_tokens) == (0.5, 1.0, 9)
    trained = [r for r in engine.requests if r.purpose == pb.PURPOSE_TRAINING]
    assert len(trained) == len({r.prompt_token_ids.data for r in trained}) == 8
    assert not {r.prompt_token_ids.data for r in trained} & {
        r.prompt_token_ids.data for r in evaluated
    }
    for envelope in envelopes(client):
        for sequence in envelope.group.sequences:
            assert sequence.reward == 0.75
            assert {part.name: part.value for part in sequence.reward_parts} == {
                "regex": 1.0,
                "regex/found": 1.0,
                "exact": 0.0,
            }


@pytest.mark.parametrize(
    ("rows", "verifier", "told"),
    [
        (
            [{"prompt": "1*2="}],
            "exact",
            "1 of 1 lines cannot be used: line 1, answer: missing is not valid; valid: text or a "
            "number, which verifier exact compares with",
        ),
        (
            [{"prompt": [{"role": "user", "content": "1*2="}], "answer": 2}] * 2
            + [{"prompt": "3*4=", "answer": 12}],
            "exact",
            "model.chat_template: missing, and task.dataset",
        ),
        ([{"prompt": "1*2=", "answer": 2}], "os:getcwd", "the operator allowed (none now)"),
        ([{"prompt": "1*2=", "answer": 2}], "exact", "leaves nothing to train on"),
    ],
)
async def test_bad_data_fails_the_run_before_anything_is_sampled(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    tmp_path: Path,
    rows: list[dict[str, object]],
    verifier: str,
    told: str,
) -> None:
    path = write_rows(tmp_path / "d.jsonl", *rows)
    spec = make_spec(task={"dataset": path, "verifier": verifier})
    write_run(client, spec, artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: error_of(client))
    assert told in error_of(client)
    assert not engine.requests


async def test_a_file_changed_between_start_and_resume_ends_the_run(
    server: RedisServer,
    client: redis.Redis,
    engine: ScriptedEngine,
    artifact: Path,
    tmp_path: Path,
) -> None:
    path = write_rows(tmp_path / "d.jsonl", *sums(40))
    spec = make_spec(task={"dataset": path, "verifier": "exact"})
    write_run(client, spec, artifact, engine.address, policy_version=0)
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 8)
    publish(client, 1)
    write_rows(tmp_path / "d.jsonl", *sums(41))
    async with collector(server.url):
        await until(lambda: error_of(client))
    assert error_of(client).startswith(f"task.dataset: {path}: it is not what the run began with")
    assert client.xlen("keel:groups:r") == 8
    write_rows(tmp_path / "d.jsonl", *sums(40))
    client.hdel(run_key("r"), "collector_error")
    async with collector(server.url):
        await until(lambda: client.xlen("keel:groups:r") == 16)


async def test_a_cancelled_add_leaves_the_stream_in_doubt(
    server: RedisServer, client: redis.Redis, artifact: Path
) -> None:
    """Its entry may be there: the next add of the slot looks before it adds."""
    write_run(client, make_spec(), artifact, "")
    connection = connect(server.url)
    stream = make_stream(connection)
    envelope = sequence_pb2.Envelope(
        id=sequence_pb2.SlotId(run="r", lap=0, slot=3), void=sequence_pb2.VoidSlot(reason="x")
    )
    await stream.added()
    execute = Pipeline.execute

    async def late(self: Pipeline, *arguments: object) -> object:
        adds = any(command[0] == "XADD" for command, _ in self.command_stack)
        replies = await execute(self, *arguments)  # type: ignore[arg-type]
        await asyncio.sleep(3600 if adds else 0)
        return replies

    with pytest.MonkeyPatch.context() as patch:
        cancelled = asyncio.create_task(stream.add(Packed.of(envelope)))
        patch.setattr(Pipeline, "execute", late)
        await until(lambda: client.xlen("keel:groups:r") == 1)
        cancelled.cancel()
        await asyncio.wait({cancelled})
    await stream.add(Packed.of(envelope))
    await connection.aclose()
    assert client.xlen("keel:groups:r") == 1
    assert client.hgetall("keel:groups:r:bytes") == {b"0/0/3": b"%d" % envelope.ByteSize()}
