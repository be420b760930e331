"""Pause in its three modes, and what an update in the middle of a generation leaves behind."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import grpc
import numpy as np
import pytest
from enginekit import (
    EngineClient,
    Sampled,
    checkpoint,
    engine_client,
    engine_process,
    forward,
    forward_routes,
)

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2

pytest_plugins = ["engine_fixtures"]

LONG = {"num_samples": 96, "max_tokens": 400}


@pytest.fixture
async def serving(client: EngineClient, model_a: Any) -> EngineClient:
    """Version 0 is model a."""
    await client.load()
    await client.publish(0, checkpoint(model_a))
    return client


def start(client: EngineClient, *, cohort: bool, **options: Any) -> asyncio.Task[list[Sampled]]:
    options = {**LONG, **options, "cohort": ("c", 1, 0) if cohort else None}
    return asyncio.ensure_future(client.generate([5, 9, 2], **options))


async def under_way(client: EngineClient) -> None:
    """Returns once sequences are in flight and have had time for some tokens, far from all."""
    while await client.pause(pb.PAUSE_MODE_KEEP) == 0:
        await client.resume()
        await asyncio.sleep(0.01)
    await client.resume()
    await asyncio.sleep(0.1)


def fits(model: Any, sequence: Sampled, begin: int, end: int) -> None:
    """Tokens [begin, end) and the rows beside them are `model`'s, the whole prefix taken as is."""
    expected_T = forward(model, sequence.everything)[begin - 1 : end - 1]
    got_T = sequence.logprobs[begin - 3 : end - 3]
    np.testing.assert_allclose(got_T, expected_T, atol=1e-5)
    routes_TLK = np.sort(sequence.routes_TLK, -1)[begin - 1 : end - 1]
    assert (routes_TLK == forward_routes(model, sequence.everything)[begin - 1 : end - 1]).all()


@pytest.mark.parametrize("cohort", [True, False])
@pytest.mark.parametrize("paused", [True, False])
async def test_an_update_in_the_middle_splits_versions_exactly(
    serving: EngineClient, model_a: Any, model_b: Any, cohort: bool, paused: bool
) -> None:
    """Before the update log-probs and rows are a's, after it b's, at every single position."""
    running = start(serving, cohort=cohort)
    await under_way(serving)
    if paused:
        assert await serving.pause(pb.PAUSE_MODE_KEEP) == 96
        assert await serving.state() == pb.ENGINE_STATE_PAUSED
    await serving.publish(1, checkpoint(model_b))
    if paused:
        await serving.resume()
    for sequence in (await running)[::24]:
        (begin, middle, old), (after, end, new) = sequence.spans
        assert (begin, old, new, after, end) == (3, 0, 1, middle, 403)
        assert 3 < middle < 403
        fits(model_a, sequence, 3, middle)
        fits(model_b, sequence, middle, 403)
        assert (
            np.sort(sequence.routes_TLK, -1)[:2] == forward_routes(model_a, sequence.everything)[:2]
        ).all()


async def test_keep_without_an_update_changes_no_bit(serving: EngineClient) -> None:
    """Frozen and thawed twice: the same bits as undisturbed, one version span."""
    undisturbed = await serving.generate([5, 9, 2], **LONG, cohort=("u", 1, 0))
    running = start(serving, cohort=True)
    for _ in range(2):
        await under_way(serving)
        assert await serving.pause(pb.PAUSE_MODE_KEEP) == 96
        await serving.resume()
    frozen = await running
    assert [s.bits() for s in frozen] == [s.bits() for s in undisturbed]
    assert frozen[0].spans == [(3, 403, 0)]


async def test_wait_finishes_what_runs_and_holds_back_what_does_not(
    serving: EngineClient, model_b: Any
) -> None:
    """The running group is whole, all of version 0; the one that came later starts after Resume."""
    running = start(serving, cohort=False)
    await under_way(serving)
    pausing = asyncio.ensure_future(serving.pause(pb.PAUSE_MODE_WAIT))
    await asyncio.sleep(0.05)
    late = asyncio.ensure_future(serving.generate([5, 9, 2], max_tokens=4))
    assert await pausing == 0
    assert all(s.spans == [(3, 403, 0)] for s in await running)
    await serving.publish(1, checkpoint(model_b))
    await asyncio.sleep(0.1)
    assert not late.done()
    await serving.resume()
    assert (await late)[0].spans == [(3, 7, 1)]


async def test_abort_ends_at_once_with_what_there_is(serving: EngineClient, model_a: Any) -> None:
    """ABORTED, fewer tokens than asked, log-probs and rows valid up to there."""
    running = start(serving, cohort=True)
    await under_way(serving)
    assert await serving.pause(pb.PAUSE_MODE_ABORT) == 96
    group = await running
    for s in group:
        assert s.complete is not None
        assert s.complete.finish_reason == sequence_pb2.FINISH_REASON_ABORTED
        assert 0 < len(s.tokens) < 400
        assert len(s.routes_TLK) == len(s.everything) - 1
    fits(model_a, group[0], 3, len(group[0].everything))
    await serving.resume()
    assert len((await serving.generate([5], max_tokens=3))[0].tokens) == 3


async def test_resume_calls_off_a_pause_that_waits(serving: EngineClient) -> None:
    """The waiting Pause is ABORTED and generation goes on."""
    running = start(serving, cohort=False)
    await under_way(serving)
    pausing = asyncio.ensure_future(serving.pause(pb.PAUSE_MODE_WAIT))
    await asyncio.sleep(0.05)
    await serving.resume()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await pausing
    assert failure.value.code() == grpc.StatusCode.ABORTED
    assert len((await running)[0].tokens) == 400
    assert await serving.state() == pb.ENGINE_STATE_READY


async def test_sigterm_ends_sequences_aborted_and_the_process_cleanly(model_a: Any) -> None:
    """Exit code 0 within seconds; the caller gets whole messages, not a broken stream."""
    with engine_process() as (address, process):
        async with engine_client(address, "r", 1) as client:
            await client.load()
            await client.publish(0, checkpoint(model_a))
            running = start(client, cohort=False, max_tokens=500)
            await under_way(client)
            process.send_signal(signal.SIGTERM)
            group = await running
            assert {s.complete.finish_reason for s in group if s.complete} == {
                sequence_pb2.FINISH_REASON_ABORTED
            }
        assert await asyncio.to_thread(process.wait, 10) == 0
