"""vLLM behind the contract: log-probs, routes and versions against a plain transformers forward."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from architectures import forced
from enginekit import CONFIG, EngineClient, Sampled, checkpoint, forward, forward_routes

from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2, tensor_pb2

TOLERANCE = 2e-5
"""Nats, in float32. A wrong temperature, version or packing is off by 0.03 and more."""
EVALUATION = pb.PURPOSE_EVALUATION
LONG = {"num_samples": 32, "max_tokens": 400}


@pytest.fixture
async def serving(
    client: EngineClient, model_a: Any, next_version: Callable[[], int]
) -> EngineClient:
    """Serves model a in float32."""
    await client.load()
    await client.publish(next_version(), checkpoint(model_a))
    return client


def fits(
    model: Any, s: Sampled, begin: int = 0, end: int | None = None, temperature: float = 1.0
) -> None:
    """Tokens [begin, end) of a sequence and the rows beside them are the model's."""
    prompt = len(s.prompt)
    begin = begin or prompt
    expected_T = forward(model, s.everything, temperature)[begin - 1 : end and end - 1]
    got_T = s.logprobs[begin - prompt : end and end - prompt]
    np.testing.assert_allclose(got_T, expected_T, atol=TOLERANCE)
    if s.routes:
        rows = slice(begin - 1, end and end - 1)
        routes_TLK = np.sort(s.routes_TLK, -1)
        assert (routes_TLK[rows] == forward_routes(model, s.everything)[rows]).all()


async def test_it_says_what_it_is(serving: EngineClient) -> None:
    told = await serving.stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert (told.can.kind, told.can.deterministic, told.can.routes) == ("vllm", False, True)
    assert list(told.can.dtypes) == [tensor_pb2.D_TYPE_FLOAT32, tensor_pb2.D_TYPE_BFLOAT16]
    assert list(told.can.quantizations) == [pb.QUANTIZATION_NONE]
    assert list(told.loaded.moe_layers) == [0, 1]
    assert (told.loaded.num_experts, told.loaded.experts_per_token) == (16, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
async def test_logprobs_are_at_the_temperature_and_routes_are_live(
    serving: EngineClient, model_a: Any, temperature: float
) -> None:
    """Every log-prob is that of softmax(logits / temperature), every row the forward's top-k."""
    group = await serving.generate([5, 9, 2], num_samples=8, temperature=temperature)
    assert len({tuple(s.tokens) for s in group}) == 8
    for s in group:
        assert s.complete is not None
        assert s.complete.finish_reason == sequence_pb2.FINISH_REASON_LENGTH
        assert s.complete.routes_valid
        assert s.routes_TLK.shape == (18, 2, 2)
        assert s.routes_TLK.dtype == np.uint8
        fits(model_a, s, temperature=temperature)


async def test_greedy_takes_the_likeliest_and_tells_its_logprob_at_temperature_1(
    serving: EngineClient, model_a: Any
) -> None:
    """Alone and in a batch with sampled requests."""
    greedy, _ = await asyncio.gather(
        serving.generate([5, 9, 2], temperature=0, purpose=EVALUATION),
        serving.generate([5, 9, 2], temperature=0.5, num_samples=4),
    )
    (alone,) = await serving.generate([5, 9, 2], temperature=0, purpose=EVALUATION)
    for s in (*greedy, alone):
        with torch.no_grad():
            logits_TV = model_a(input_ids=torch.tensor([s.everything])).logits[0]
        assert s.tokens == logits_TV[2:-1].argmax(-1).tolist()
        fits(model_a, s)


@pytest.mark.parametrize("how", [{"top_p": 0.5}, {"top_k": 3}])
async def test_truncated_sampling_tells_logprobs_of_the_full_vocabulary(
    serving: EngineClient, model_a: Any, how: dict[str, Any]
) -> None:
    """vLLM's own would be those of the truncated distribution: higher by log 2 and more."""
    group = await serving.generate(
        [5, 9, 2], num_samples=4, temperature=0.7, purpose=EVALUATION, **how
    )
    for s in group:
        fits(model_a, s, temperature=0.7)


async def test_routes_are_the_ones_used(serving: EngineClient, model_a: Any) -> None:
    """A forward with these experts forced gives the log-probs; shifted by a row it does not."""
    (s,) = await serving.generate([5, 9, 2], max_tokens=60)
    rows_NTLK = torch.from_numpy(s.routes_TLK.astype(np.int64))[None]
    tokens = s.everything[:-1]

    def gap(rows_NTLK: torch.Tensor) -> float:
        model = forced(model_a, CONFIG, rows_NTLK)
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        logprobs_T = torch.log_softmax(logits_TV, -1)[2:].gather(
            -1, torch.tensor(s.tokens)[:, None]
        )
        return float(np.abs(logprobs_T[:, 0].numpy() - s.logprobs).mean())

    assert gap(rows_NTLK) < TOLERANCE
    assert gap(rows_NTLK.roll(1, dims=1)) > 0.1


async def test_a_stop_token_ends_a_sequence_and_is_in_it(
    serving: EngineClient, model_a: Any
) -> None:
    group = await serving.generate([5, 9, 2], num_samples=16, max_tokens=200, stop=[7])
    stopped = [s for s in group if s.tokens[-1] == 7]
    assert stopped
    for s in stopped:
        assert s.complete is not None
        assert s.complete.finish_reason == sequence_pb2.FINISH_REASON_STOP
        assert 7 not in s.tokens[:-1]
    fits(model_a, stopped[0])


async def test_long_sequences_leave_in_pieces(serving: EngineClient, model_a: Any) -> None:
    """Before the end, too; and the longest sequence that the model takes is served."""
    (s,) = await serving.generate([5, 9, 2], max_tokens=509)
    assert s.chunks >= 2
    assert len(s.everything) == 512
    fits(model_a, s)


async def test_a_prompt_from_the_prefix_cache_has_its_own_versions_routes(
    serving: EngineClient, model_a: Any, model_b: Any, next_version: Callable[[], int]
) -> None:
    """300 tokens are two whole cache blocks of 128. The second request finds them cached; after an
    update nobody does.
    """
    prompt = np.random.default_rng(0).integers(0, 64, 300).tolist()
    for _ in range(2):
        (s,) = await serving.generate(prompt, max_tokens=8)
        assert len(s.routes_TLK) == 307
        fits(model_a, s, begin=1 + 299)
        assert (np.sort(s.routes_TLK, -1) == forward_routes(model_a, s.everything)).all()
    await serving.publish(next_version(), checkpoint(model_b))
    (s,) = await serving.generate(prompt, max_tokens=8)
    fits(model_b, s)
    assert (np.sort(s.routes_TLK, -1) == forward_routes(model_b, s.everything)).all()


async def test_64_groups_at_once(serving: EngineClient, model_a: Any) -> None:
    """512 sequences, each whole; those looked at are right. Their prompts, 20,480 tokens, are more
    than vLLM computes in a step: cut in two, a prompt would end the engine.
    """
    prompts = np.random.default_rng(1).integers(0, 64, (64, 40)).tolist()
    groups = await asyncio.gather(
        *(
            serving.generate(prompt, num_samples=8, slot=slot, seed=slot, max_tokens=24)
            for slot, prompt in enumerate(prompts)
        )
    )
    assert {len(s.tokens) for group in groups for s in group} == {24}
    assert len({tuple(s.tokens) for group in groups for s in group}) == 512
    for group in groups[::16]:
        fits(model_a, group[0])


async def test_a_cancelled_request_is_freed(serving: EngineClient) -> None:
    running = asyncio.ensure_future(serving.generate([5, 9, 2], **LONG))
    await under_way(serving, 32)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    for _ in range(100):
        if await serving.pause(pb.PAUSE_MODE_KEEP) == 0:
            break
        await serving.resume()
        await asyncio.sleep(0.02)
    else:
        raise AssertionError("still in flight after 2 s")
    await serving.resume()


async def test_a_temperature_that_vllm_would_raise_is_refused(serving: EngineClient) -> None:
    """It takes 0.01 in place of 0.001, and tells log-probs at that."""
    with pytest.raises(grpc.aio.AioRpcError, match=r"sampling.temperature: 0.001.*0.01 and more"):
        await serving.generate([5], max_tokens=2, temperature=0.001)


async def under_way(client: EngineClient, sequences: int) -> None:
    """Returns once sequences are in flight and have had time for some tokens, far from all."""
    while await client.pause(pb.PAUSE_MODE_KEEP) != sequences:
        await client.resume()
        await asyncio.sleep(0.01)
    await client.resume()
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("paused", [True, False])
async def test_an_update_in_the_middle_splits_versions_exactly(
    serving: EngineClient,
    model_a: Any,
    model_b: Any,
    next_version: Callable[[], int],
    paused: bool,
) -> None:
    """Before the update log-probs and rows are a's, after it b's, at every single position; the
    probe is answered while everything is frozen.
    """
    running = asyncio.ensure_future(serving.generate([5, 9, 2], **LONG))
    await under_way(serving, 32)
    if paused:
        assert await serving.pause(pb.PAUSE_MODE_KEEP) == 32
        assert await serving.state() == pb.ENGINE_STATE_PAUSED
    version, probe = next_version(), [3, 4, 5, 6, 50, 51]
    told = await serving.publish(version, checkpoint(model_b), probe)
    np.testing.assert_allclose(told, forward(model_b, probe), atol=TOLERANCE)
    if paused:
        await asyncio.sleep(0.2)
        assert not running.done()
        await serving.resume()
    group = await running
    for s in group:
        (begin, middle, _), (after, end, new) = s.spans
        assert (begin, new, after, end) == (3, version, middle, 403)
        assert s.complete is not None
        assert s.complete.routes_valid
    for s in group[::8]:
        middle = s.spans[0][1]
        assert 3 < middle < 403
        fits(model_a, s, 3, middle)
        fits(model_b, s, middle, 403)
        rows_a = forward_routes(model_a, s.everything)[:2]
        assert (np.sort(s.routes_TLK, -1)[:2] == rows_a).all()


async def test_wait_finishes_what_runs_and_holds_back_what_does_not(
    serving: EngineClient, model_a: Any, model_b: Any, next_version: Callable[[], int]
) -> None:
    """The running group is whole and of one version; the one that came later starts after Resume,
    under the version that came meanwhile.
    """
    running = asyncio.ensure_future(serving.generate([5, 9, 2], **LONG))
    await under_way(serving, 32)
    pausing = asyncio.ensure_future(serving.pause(pb.PAUSE_MODE_WAIT))
    await asyncio.sleep(0.05)
    again = asyncio.ensure_future(serving.pause(pb.PAUSE_MODE_WAIT))  # a caller that came back
    await asyncio.sleep(0.05)
    assert not again.done()
    late = asyncio.ensure_future(serving.generate([5, 9, 2], max_tokens=4))
    assert [await pausing, await again] == [0, 0]
    assert {len(s.tokens) for s in await running} == {400}
    version = next_version()
    await serving.publish(version, checkpoint(model_b))
    await asyncio.sleep(0.1)
    assert not late.done()
    await serving.resume()
    assert (await late)[0].spans == [(3, 7, version)]
    fits(model_b, (await late)[0])


async def test_resume_calls_off_a_pause_that_waits(serving: EngineClient) -> None:
    running = asyncio.ensure_future(serving.generate([5, 9, 2], **LONG))
    await under_way(serving, 32)
    pausing = asyncio.ensure_future(serving.pause(pb.PAUSE_MODE_WAIT))
    await asyncio.sleep(0.05)
    await serving.resume()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await pausing
    assert failure.value.code() == grpc.StatusCode.ABORTED
    assert len((await running)[0].tokens) == 400


async def test_abort_ends_at_once_with_what_there_is(serving: EngineClient, model_a: Any) -> None:
    """ABORTED, fewer tokens than asked, log-probs and rows valid up to there."""
    running = asyncio.ensure_future(serving.generate([5, 9, 2], **LONG))
    await under_way(serving, 32)
    assert await serving.pause(pb.PAUSE_MODE_ABORT) == 32
    group = await running
    for s in group:
        assert s.complete is not None
        assert s.complete.finish_reason == sequence_pb2.FINISH_REASON_ABORTED
        assert 0 < len(s.tokens) < 400
        assert len(s.routes_TLK) == len(s.everything) - 1
    fits(model_a, group[0])
    await serving.resume()
    assert len((await serving.generate([5], max_tokens=3))[0].tokens) == 3


async def test_another_version_than_the_one_required_is_refused(serving: EngineClient) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="require_policy_version: 9999") as failure:
        await serving.generate([5, 9, 2], version=9999)
    assert failure.value.code() == grpc.StatusCode.FAILED_PRECONDITION
