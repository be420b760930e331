"""Pause in its three modes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2
from keel_rollout.conformance.client import Sampled
from keel_rollout.conformance.kit import TRIES, Batch, Kit, too_fast
from keel_rollout.conformance.rows_engine import expect
from keel_rollout.conformance.verdicts import Found, Row, Unmet

HELD_BACK_S = 0.3
"""How long a request is watched that must wait."""
LENGTH, ABORTED = sequence_pb2.FINISH_REASON_LENGTH, sequence_pb2.FINISH_REASON_ABORTED


@asynccontextmanager
async def holds_back(kit: Kit) -> AsyncIterator[None]:
    """Inside, the engine is paused: a new request waits, and is served after Resume."""
    late = asyncio.ensure_future(kit.client.generate(kit.prompt(3), max_tokens=2))
    try:
        state = (await kit.client.version()).state
        expect("state", pb.EngineState.Name(state), "ENGINE_STATE_PAUSED")
        done, _ = await asyncio.wait([late], timeout=HELD_BACK_S)
        if done:
            raise Unmet("a request was answered while paused", "it waits for Resume")
        yield
    finally:
        await kit.client.resume()
        await asyncio.gather(late, return_exceptions=True)
    await late


async def abort(kit: Kit) -> Found:
    """Caught half-way, everything ends with what there is, and that is valid."""
    await kit.serving()
    for attempt in range(TRIES):
        async with kit.half_way(0.4 / 2**attempt) as running:
            in_flight = await kit.client.pause(pb.PAUSE_MODE_ABORT)
            async with holds_back(kit):
                group = await running
        caught = [s for s in group if s.complete.finish_reason == ABORTED]
        if caught and any(s.tokens for s in caught):
            break
    else:
        raise too_fast()
    if in_flight != len(caught):
        raise Unmet(
            f"sequences_in_flight {in_flight}, {len(caught)} sequences ABORTED", "the same number"
        )
    begun = [s for s in caught if s.tokens]
    for sequence in begun:
        rows = len(sequence.everything) - 1
        if kit.routes and sequence.complete.routes_valid and len(sequence.routes_TLK) != rows:
            raise Unmet(f"{len(sequence.routes_TLK)} route rows of an aborted sequence", f"{rows}")
    tokens = sum(len(s.tokens) for s in begun)
    return [*_gap(kit, begun), f"{len(caught)} sequences ABORTED, with {tokens} tokens"]


async def wait(kit: Kit) -> Found:
    """What runs is finished first; what comes later waits."""
    await kit.serving()
    async with kit.half_way(0.2) as running:
        in_flight = await kit.client.pause(pb.PAUSE_MODE_WAIT)
        async with holds_back(kit):
            done, _ = await asyncio.wait([running], timeout=HELD_BACK_S)
            if not done:
                raise Unmet("Pause answered with sequences unfinished", "they are finished first")
    group = await running
    expect("sequences_in_flight", in_flight, 0)
    _whole(kit, group)
    return [*_gap(kit, group), f"{len(group)} sequences whole before Pause answered"]


async def keep(kit: Kit) -> Found:
    """Frozen and thawed, a sequence is what it would have been."""
    await kit.serving()
    for attempt in range(TRIES):
        async with kit.half_way(0.4 / 2**attempt) as running:
            in_flight = await kit.client.pause(pb.PAUSE_MODE_KEEP)
            async with holds_back(kit):
                if in_flight and running.done():
                    raise Unmet(f"{in_flight} in flight, and the stream ended while paused", "0")
            group = await running
        _whole(kit, group)
        if in_flight:
            return [*_gap(kit, group), f"{in_flight} sequences frozen and thawed"]
    raise too_fast()


def _whole(kit: Kit, group: list[Sampled]) -> None:
    number = kit.served.manifest.policy_version if kit.served else -1
    for s in group:
        reason = sequence_pb2.FinishReason.Name(s.complete.finish_reason)
        expect("finish_reason", reason, sequence_pb2.FinishReason.Name(LENGTH))
        expect("policy_versions", s.spans, [(len(s.prompt), len(s.everything), number)])


def _gap(kit: Kit, group: list[Sampled]) -> Found:
    return Batch(group, 1.0, kit.reference).numbers()


ABORT = Row(
    "ends",
    "what is in flight ends at once, ABORTED, with valid log-probs; what comes later waits",
    "PauseMode.PAUSE_MODE_ABORT: they end at once with FINISH_REASON_ABORTED",
    abort,
)
WAIT = Row(
    "finishes",
    "what is in flight is finished before Pause answers; what comes later waits",
    "PauseMode.PAUSE_MODE_WAIT: they are finished first; requests that have not started wait",
    wait,
)
KEEP = Row(
    "goes-on",
    "what is in flight freezes and goes on after Resume as if nothing had been",
    "PauseMode.PAUSE_MODE_KEEP: they freeze and go on after Resume",
    keep,
)
