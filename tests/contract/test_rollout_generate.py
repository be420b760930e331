"""What Generate promises, over real gRPC against the engine's own process."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import numpy as np
import pytest
from enginekit import (
    CONFIG,
    DENSE_CONFIG,
    FP8,
    EngineClient,
    checkpoint,
    collect,
    forward,
    forward_routes,
    random_model,
    request,
)

from keel import codec
from keel.rollout.v1 import rollout_service_pb2 as pb
from keel.types.v1 import sequence_pb2, tensor_pb2

pytest_plugins = ["engine_fixtures"]

PROMPTS = [[5, 9, 2], [7], [3, 4, 5, 6, 7, 8, 9], [11, 12]]


async def serve(client: EngineClient, model: Any, **options: Any) -> None:
    await client.load(**options)
    await client.publish(0, checkpoint(model))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_and_routes_equal_a_plain_forward(
    client: EngineClient, model_a: Any, temperature: float
) -> None:
    """|d log p| <= 1e-5 and the same expert sets, prompt rows included; 1 to 7 prompt tokens."""
    await serve(client, model_a)
    groups = await asyncio.gather(
        *(
            client.generate(p, num_samples=3, temperature=temperature, slot=i)
            for i, p in enumerate(PROMPTS)
        )
    )
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sequence in group:
            assert len(sequence.tokens) == 16
            expected = forward(model_a, sequence.everything, temperature)[len(prompt) - 1 :]
            np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-5)
            routes_TLK = sequence.routes_TLK
            assert routes_TLK.dtype == np.uint8
            assert routes_TLK.shape == (len(prompt) + 16 - 1, 2, 2)
            assert (routes_TLK[..., 0] != routes_TLK[..., 1]).all()
            assert (np.sort(routes_TLK, -1) == forward_routes(model_a, sequence.everything)).all()


async def test_complete_tells_lengths_hash_versions_and_reason(
    client: EngineClient, model_a: Any
) -> None:
    """700 tokens cross two flushes; the hash is over all route bytes in order."""
    config = {**CONFIG, "max_position_embeddings": 1024}
    await serve(client, model_a, config=config)
    (sequence,) = await client.generate([5, 9, 2], max_tokens=700)
    complete = sequence.complete
    assert complete is not None
    assert sequence.chunks >= 2
    assert (complete.response_tokens, complete.route_rows) == (700, 702)
    assert complete.routes_valid
    assert complete.routes_xxh3 == codec.xxh3(sequence.routes_TLK)
    assert complete.finish_reason == sequence_pb2.FINISH_REASON_LENGTH
    assert sequence.spans == [(3, 703, 0)]
    stop = sequence.tokens[20]
    (shorter,) = await client.generate([5, 9, 2], max_tokens=700, stop=[stop])
    assert shorter.tokens == sequence.tokens[: sequence.tokens.index(stop) + 1]
    assert shorter.complete is not None
    assert shorter.complete.finish_reason == sequence_pb2.FINISH_REASON_STOP


async def run_cohort(
    client: EngineClient, name: str, *, shuffle: int, delay_s: float = 0.0, slots: int = 12
) -> list[tuple]:
    """Sends a cohort's groups in an order and with delays of its own; bits by slot and sample."""
    generator = random.Random(shuffle)

    async def one(slot: int) -> list[tuple]:
        await asyncio.sleep(generator.random() * delay_s)
        prompt = [2 + (slot * 7 + j) % 60 for j in range(1 + slot % 5)]
        group = await client.generate(
            prompt,
            num_samples=4,
            slot=slot,
            seed=100 + slot,
            max_tokens=24,
            stop=[1, 2, 3],
            cohort=(name, slots, 0),
        )
        return [sequence.bits() for sequence in group]

    order = list(range(slots))
    generator.shuffle(order)
    tasks = {slot: asyncio.ensure_future(one(slot)) for slot in order}
    await asyncio.gather(*tasks.values())
    return [bits for slot in range(slots) for bits in tasks[slot].result()]


async def test_a_cohort_gives_the_same_bits_whatever_arrives_when(
    client: EngineClient, model_a: Any
) -> None:
    """48 sequences of unequal length: three arrival orders, delays, and other work beside them."""
    await serve(client, model_a)
    first = await run_cohort(client, "a", shuffle=0)
    second = await run_cohort(client, "b", shuffle=1, delay_s=0.2)
    beside = asyncio.gather(*(client.generate([9, s], max_tokens=60, seed=s) for s in range(2, 12)))
    third = await run_cohort(client, "c", shuffle=2, delay_s=0.05)
    await beside
    assert first == second == third
    assert len({bits[0] for bits in first}) > 40, "sequences must differ from each other"


async def test_a_token_depends_on_seed_and_sample_alone(client: EngineClient, model_a: Any) -> None:
    """Alone, among others, in a cohort: the same tokens. Another seed: others."""
    await serve(client, model_a)
    alone = await client.generate([5, 9, 2], num_samples=3, seed=5)
    others = asyncio.gather(*(client.generate([8, s], seed=s) for s in range(2, 9)))
    among = await client.generate([5, 9, 2], num_samples=3, seed=5)
    await others
    cohort = await client.generate([5, 9, 2], num_samples=2, seed=5, cohort=("x", 1, 0))
    other = await client.generate([5, 9, 2], num_samples=3, seed=6)
    assert [s.tokens for s in alone] == [s.tokens for s in among]
    assert [s.tokens for s in cohort] == [s.tokens for s in alone[:2]]
    assert not {tuple(s.tokens) for s in alone} & {tuple(s.tokens) for s in other}


async def test_samples_follow_the_distribution(client: EngineClient, model_a: Any) -> None:
    """First tokens of 2,000 samples against the model's own probabilities: total variation < 0.09.

    The expected value for 2,000 draws from 64 tokens is about 0.06.
    """
    await serve(client, model_a)
    groups = await asyncio.gather(
        *(client.generate([5, 9], num_samples=500, max_tokens=1, seed=s) for s in range(4))
    )
    tokens = [sequence.tokens[0] for group in groups for sequence in group]
    share_V = np.bincount(tokens, minlength=64) / len(tokens)
    probability_V = np.exp([forward(model_a, [5, 9, v])[1] for v in range(64)])
    assert np.abs(share_V - probability_V).sum() / 2 < 0.09


async def test_joining_rows_get_valid_logprobs(client: EngineClient, model_a: Any) -> None:
    """Continuous batching: a long prompt joins short ones half-way; all fit a plain forward."""
    await serve(client, model_a)

    async def late(delay_s: float, prompt: list[int]) -> Any:
        await asyncio.sleep(delay_s)
        return await client.generate(prompt, num_samples=2, max_tokens=100)

    long = [2 + i % 60 for i in range(150)]
    groups = await asyncio.gather(
        late(0, [5, 9]), late(0.03, long), late(0.08, [4]), late(0.1, long[:70])
    )
    for group in groups:
        for s in group:
            expected = forward(model_a, s.everything)[len(s.prompt) - 1 :]
            np.testing.assert_allclose(s.logprobs, expected, atol=1e-5)
            assert (np.sort(s.routes_TLK, -1) == forward_routes(model_a, s.everything)).all()


@pytest.mark.parametrize("quantize", [pb.QUANTIZATION_FP8, pb.QUANTIZATION_FP4])
@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("router", [True, False])
async def test_low_precision_changes_logprobs_and_routes_and_repeats_its_bits(
    client: EngineClient, model_a: Any, quantize: pb.Quantization, inputs: bool, router: bool
) -> None:
    """Mean |d log p|: e4m3 between 0.001 and 0.3 nats, e2m1 between 0.05 and 1, with more
    routes that differ.
    """
    precision = pb.EnginePrecision(
        dtype=tensor_pb2.D_TYPE_FLOAT32,
        quantize=quantize,
        quantize_inputs=inputs,
        quantize_router=router,
    )
    await serve(client, model_a, precision=precision)
    groups = [
        await client.generate([5, 9, 2], num_samples=8, max_tokens=40, cohort=(name, 1, 0))
        for name in ("a", "b")
    ]
    assert [s.bits() for s in groups[0]] == [s.bits() for s in groups[1]]
    gap, differing, cells = [], 0, 0
    for s in groups[0]:
        gap += np.abs(np.array(s.logprobs) - forward(model_a, s.everything)[2:]).tolist()
        natural = forward_routes(model_a, s.everything)
        differing += int((np.sort(s.routes_TLK, -1) != natural).any(-1).sum())
        cells += natural.shape[0] * 2
    if quantize == pb.QUANTIZATION_FP8:
        assert 0.001 < np.mean(gap) < 0.3
        assert 0.005 < differing / cells < 0.5
    else:
        assert 0.05 < np.mean(gap) < 1
        assert 0.05 < differing / cells < 0.9


async def test_bfloat16_and_dense_models(client: EngineClient) -> None:
    """A tied dense Qwen3 in float32 fits to 1e-5; in bfloat16 to 0.1. Neither has routes."""
    dense = random_model(DENSE_CONFIG, seed=4)
    bfloat16 = pb.EnginePrecision(dtype=tensor_pb2.D_TYPE_BFLOAT16)
    for precision, tolerance in ((None, 1e-5), (bfloat16, 0.1)):
        options = {} if precision is None else {"precision": precision}
        signature = await client.load(config=DENSE_CONFIG, **options)
        assert (list(signature.moe_layers), signature.num_experts) == ([], 0)
        await client.publish(0, checkpoint(dense))
        (s,) = await client.generate([5, 9, 2], with_routes=False)
        np.testing.assert_allclose(s.logprobs, forward(dense, s.everything)[2:], atol=tolerance)
        assert not s.routes
    with pytest.raises(grpc.aio.AioRpcError, match="with_routes"):
        await client.generate([5], with_routes=True)


async def test_truncated_and_greedy_evaluation_report_full_logprobs(
    client: EngineClient, model_a: Any
) -> None:
    """top_k = 2 draws only the two likeliest; greedy the likeliest; log-probs stay untruncated."""
    await serve(client, model_a)
    evaluation = {"purpose": pb.PURPOSE_EVALUATION, "num_samples": 16}
    kept = await client.generate([5, 9], top_k=2, max_tokens=4, temperature=0.7, **evaluation)
    nucleus = await client.generate([5, 9], top_p=0.05, max_tokens=4, **evaluation)
    greedy = await client.generate([5, 9], temperature=0.0, max_tokens=8, **evaluation)
    assert len({tuple(s.tokens) for s in greedy}) == 1
    assert len({s.tokens[0] for s in kept}) == 2
    assert {s.tokens[0] for s in nucleus} == {greedy[0].tokens[0]}
    for s, temperature in ((kept[0], 0.7), (greedy[0], 1.0), (nucleus[0], 1.0)):
        expected = forward(model_a, s.everything, temperature)[1:]
        np.testing.assert_allclose(s.logprobs, expected, atol=1e-5)


async def test_a_newer_try_overtakes_an_older_one(client: EngineClient, model_a: Any) -> None:
    """The partial cohort is discarded (ABORTED), an older try refused, the new one served."""
    await serve(client, model_a)
    old = asyncio.ensure_future(client.generate([5, 9], slot=0, cohort=("x", 2, 3)))
    await asyncio.sleep(0.1)
    new = [client.generate([5, 9], slot=s, cohort=("x", 2, 4)) for s in (0, 1)]
    groups = await asyncio.gather(*new)
    assert all(len(group[0].tokens) == 16 for group in groups)
    with pytest.raises(grpc.aio.AioRpcError) as overtaken:
        await old
    assert overtaken.value.code() == grpc.StatusCode.ABORTED
    with pytest.raises(grpc.aio.AioRpcError) as older:
        await client.generate([5, 9], slot=0, cohort=("x", 2, 3))
    assert older.value.code() == grpc.StatusCode.ABORTED


async def test_a_newer_try_overtakes_a_running_one(client: EngineClient, model_a: Any) -> None:
    """The same bits come from the resend as from an undisturbed cohort."""
    await serve(client, model_a)
    calls = {"num_samples": 64, "max_tokens": 300}
    undisturbed = await client.generate([5, 9], cohort=("u", 1, 0), **calls)
    running = asyncio.ensure_future(client.generate([5, 9], cohort=("x", 1, 0), **calls))
    await asyncio.sleep(0.1)
    resent = await client.generate([5, 9], cohort=("x", 1, 1), **calls)
    assert [s.bits() for s in resent] == [s.bits() for s in undisturbed]
    with pytest.raises(grpc.aio.AioRpcError) as overtaken:
        await running
    assert overtaken.value.code() == grpc.StatusCode.ABORTED


async def test_cancel_frees_sequences_and_changes_no_others_bits(
    client: EngineClient, model_a: Any
) -> None:
    """A member that hangs up: the others get what they would have got. A lone request: dropped."""
    await serve(client, model_a)

    def member(name: str, slot: int) -> Any:
        call = request(
            client.run, [5, 9, slot], slot=slot, num_samples=8, max_tokens=400, cohort=(name, 2, 0)
        )
        return asyncio.ensure_future(collect(client.stub, call))

    whole = await asyncio.gather(member("whole", 2), member("whole", 3))
    leaver, stayer = member("cut", 2), member("cut", 3)
    await asyncio.sleep(0.15)
    leaver.cancel()
    assert [s.bits() for s in await stayer] == [s.bits() for s in whole[1]]

    lone = [
        asyncio.ensure_future(client.generate([5, 9], num_samples=256, max_tokens=500))
        for _ in range(3)
    ]
    await asyncio.sleep(0.2)
    for call in lone:
        call.cancel()
    await asyncio.sleep(0.2)
    assert await client.pause(pb.PAUSE_MODE_KEEP) == 0, "nothing is in flight any more"
    await client.resume()


async def test_capabilities_are_data(client: EngineClient, model_a: Any) -> None:
    """What it can, and what it has loaded."""
    await serve(client, model_a, precision=FP8)
    answer = await client.stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert answer.can.kind == "torch"
    assert answer.can.routes
    assert answer.can.deterministic
    assert "Qwen3MoeForCausalLM" in answer.can.architectures
    assert answer.can.max_cohort_sequences == 4096
    assert (answer.loaded.vocab_size, answer.loaded.max_sequence_tokens) == (64, 512)
    assert list(answer.loaded.moe_layers) == [0, 1]
    assert (answer.loaded.experts_per_token, answer.loaded.num_experts) == (2, 16)
    assert answer.precision == FP8
    assert (answer.state, answer.run) == (pb.ENGINE_STATE_READY, client.run)
