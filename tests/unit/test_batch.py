"""Decoding, the cut into micro-batches, and padding."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import tiny_moe
import torch
from hypothesis import given, settings

from keel import codec
from keel.errors import WireError
from keel.types.v1 import sequence_pb2, tensor_pb2
from keel_trainer.batch import collate, cut_micro_batches
from keel_trainer.sequences import RouteShape, decode_demonstration, decode_sequence

SHAPE = RouteShape(moe_layers=2, top_k=2, num_experts=16)


def message() -> sequence_pb2.Sequence:
    """Prompt [5, 6], response [7, 8, 9]; routes [4, 2, 2]."""
    routes = np.arange(16, dtype=np.uint8).reshape(4, 2, 2)
    return sequence_pb2.Sequence(
        id=sequence_pb2.SequenceId(slot=sequence_pb2.SlotId(run="r", lap=1, slot=3), sample=4),
        token_ids=codec.to_tensor(np.array([5, 6, 7, 8, 9], np.int32)),
        prompt_length=2,
        trainable=[sequence_pb2.Span(begin=2, end=5)],
        rollout_logprobs=codec.to_tensor(np.array([-1, -2, -3], np.float32)),
        routes=sequence_pb2.Routes(
            codec=sequence_pb2.ROUTE_CODEC_DENSE, inline=codec.to_tensor(routes)
        ),
        routes_valid=True,
        routes_xxh3=codec.xxh3(routes),
        policy_versions=[
            sequence_pb2.VersionSpan(span=sequence_pb2.Span(begin=2, end=4), policy_version=6),
            sequence_pb2.VersionSpan(span=sequence_pb2.Span(begin=4, end=5), policy_version=7),
        ],
        finish_reason=sequence_pb2.FINISH_REASON_LENGTH,
        reward=0.5,
    )


def decode(proto: sequence_pb2.Sequence, routes: RouteShape | None = SHAPE):
    return decode_sequence(proto, vocab_size=64, routes=routes)


def set_routes(proto: sequence_pb2.Sequence, routes: np.ndarray) -> None:
    proto.routes.inline.CopyFrom(codec.to_tensor(routes))
    proto.routes_xxh3 = codec.xxh3(routes)


def test_a_good_sequence_decodes_whole():
    decoded = decode(message())
    assert decoded.token_ids_T.tolist() == [5, 6, 7, 8, 9]
    assert (decoded.prompt_length, decoded.fed_length, decoded.response_length) == (2, 4, 3)
    assert decoded.rollout_logprobs_R.tolist() == [-1, -2, -3]
    assert decoded.routes_TLK.shape == (4, 2, 2)
    assert decoded.policy_versions_R.tolist() == [6, 6, 7]
    assert (decoded.reward, decoded.truncated) == (0.5, True)
    assert (decoded.valid, decoded.invalid_reason) == (True, "")
    assert (decoded.slot, decoded.sample) == (3, 4)


def test_a_dense_model_ignores_routes():
    assert decode(message(), routes=None).routes_TLK is None


def test_more_than_256_experts_come_as_uint16():
    proto = message()
    set_routes(proto, np.arange(300, 316, dtype=np.uint16).reshape(4, 2, 2))
    decoded = decode(proto, RouteShape(moe_layers=2, top_k=2, num_experts=512))
    assert decoded.valid
    assert decoded.routes_TLK.max() == 315
    assert collate([decoded]).engine_routes_NTLK.dtype == torch.int16


def spoil_logprob(proto, value=np.nan):
    proto.rollout_logprobs.CopyFrom(codec.to_tensor(np.array([-1, value, -3], np.float32)))


def repeat_expert(proto):
    set_routes(proto, np.zeros((4, 2, 2), np.uint8))


def exceed_experts(proto):
    set_routes(proto, np.arange(1, 17, dtype=np.uint8).reshape(4, 2, 2))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: setattr(p, "invalid_reason", "verifier crashed"), "verifier crashed"),
        (lambda p: setattr(p, "finish_reason", sequence_pb2.FINISH_REASON_ABORTED), "aborted"),
        (spoil_logprob, "log-prob"),
        (lambda p: spoil_logprob(p, np.inf), "log-prob"),
        (lambda p: spoil_logprob(p, 0.5), "log-prob"),
        (lambda p: setattr(p, "reward", float("nan")), "reward is nan"),
        (lambda p: setattr(p, "reward", 1e300), "reward is 1e+300"),
        (lambda p: setattr(p, "routes_valid", False), "vouch"),
        (lambda p: setattr(p, "routes_xxh3", 1), "checksum"),
        (lambda p: p.ClearField("routes"), "no routes"),
        (repeat_expert, "repeated"),
        (exceed_experts, "expert id is 16"),
    ],
)
def test_a_bad_rollout_is_data(spoil, reason):
    proto = message()
    spoil(proto)
    decoded = decode(proto)
    assert not decoded.valid
    assert reason in decoded.invalid_reason


def tokens(*ids):
    return codec.to_tensor(np.array(ids, np.int32))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda p: p.token_ids.CopyFrom(tokens(5, 6, 7, 8, 64)), "token_ids"),
        (lambda p: p.token_ids.CopyFrom(tokens(5, 6, 7, 8, -1)), "token_ids"),
        (lambda p: setattr(p.token_ids, "dtype", tensor_pb2.D_TYPE_INT64), "token_ids.dtype"),
        (lambda p: setattr(p.token_ids, "data", b"123"), "token_ids.data"),
        (lambda p: setattr(p, "prompt_length", 0), "prompt_length"),
        (lambda p: setattr(p, "prompt_length", 5), "prompt_length"),
        (lambda p: p.ClearField("trainable"), "trainable"),
        (lambda p: setattr(p.trainable[0], "begin", 1), "trainable"),
        (
            lambda p: p.rollout_logprobs.CopyFrom(codec.to_tensor(np.zeros(4, np.float32))),
            "rollout_logprobs.shape",
        ),
        (lambda p: set_routes(p, np.zeros((5, 2, 2), np.uint8)), "routes.inline.shape"),
        (lambda p: set_routes(p, np.zeros((4, 2, 2), np.uint16)), "routes.inline.dtype"),
        (lambda p: setattr(p.routes, "codec", 0), "routes.codec"),
        (lambda p: setattr(p.routes.blob, "uri", "x"), "routes.place"),
        (lambda p: p.ClearField("policy_versions"), "policy_versions"),
        (lambda p: setattr(p.policy_versions[1].span, "begin", 3), "policy_versions"),
        (lambda p: setattr(p.policy_versions[1].span, "end", 6), "policy_versions"),
    ],
)
def test_a_malformed_message_is_an_error_that_names_the_field(spoil, named):
    proto = message()
    spoil(proto)
    with pytest.raises(WireError, match=named.replace(".", r"\.")) as caught:
        decode(proto)
    assert "valid: " in str(caught.value)


def test_a_demonstration_decodes():
    proto = sequence_pb2.Demonstration(token_ids=tokens(1, 2, 3), prompt_length=1)
    decoded = decode_demonstration(proto, vocab_size=64)
    assert decoded.valid
    assert decoded.rollout_logprobs_R.tolist() == [0, 0]
    proto.prompt_length = 3
    with pytest.raises(WireError, match="prompt_length"):
        decode_demonstration(proto, vocab_size=64)


def test_the_cut_by_hand():
    ranges = cut_micro_batches([3, 3, 5, 9, 1], budget_tokens=10)
    assert ranges == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert cut_micro_batches([100, 1], budget_tokens=10) == [range(0, 1), range(1, 2)]
    assert cut_micro_batches([], budget_tokens=10) == []
    with pytest.raises(ValueError, match="budget_tokens"):
        cut_micro_batches([1], budget_tokens=0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120), st.integers(0, 40))
def test_the_cut_covers_all_in_order_within_budget_and_never_reconsiders(lengths, budget, seen):
    ranges = cut_micro_batches(lengths, budget)
    assert [index for part in ranges for index in part] == list(range(len(lengths)))
    for part in ranges:
        padded = len(part) * max(lengths[index] for index in part)
        assert padded <= budget or len(part) == 1
    prefix = cut_micro_batches(lengths[:seen], budget)
    assert prefix[:-1] == ranges[: max(len(prefix) - 1, 0)]


def test_collate_by_hand():
    routes = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    long = tiny_moe.sequence(
        [1, 2, 3, 4], 2, rollout_logprobs=np.array([-0.5, -0.25]), routes=routes
    )
    short = tiny_moe.sequence([5, 6], 1, rollout_logprobs=np.array([-2.0]), routes=routes[:1])
    micro = collate([long, short], [0.75, -1.0])
    assert micro.input_ids_NT.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert micro.targets_NT.tolist() == [[2, 3, 4], [6, 0, 0]]
    assert micro.fed_mask_NT.tolist() == [[True, True, True], [True, False, False]]
    assert micro.mask_NT.tolist() == [[False, True, True], [True, False, False]]
    assert micro.rollout_logprobs_NT.tolist() == [[0, -0.5, -0.25], [-2, 0, 0]]
    assert micro.advantages_NT.tolist() == [[0, 0.75, 0.75], [-1, 0, 0]]
    assert micro.length_weights_NT.tolist() == [[0, 0.5, 0.5], [1, 0, 0]]
    assert micro.routes_mask_NT.tolist() == micro.fed_mask_NT.tolist()
    assert micro.engine_routes_NTLK.shape == (2, 3, 2, 2)
    assert micro.engine_routes_NTLK[0].tolist() == routes.tolist()
    assert micro.tokens == 3


def test_an_invalid_sequence_is_fed_and_masked_everywhere():
    good = tiny_moe.sequence([1, 2, 3], 1)
    bad = tiny_moe.sequence([4, 5, 6], 1, rollout_logprobs=np.array([np.nan, -np.inf]), valid=False)
    micro = collate([good, bad], [1.0, float("nan")])
    assert micro.fed_mask_NT[1].all()
    assert not micro.mask_NT[1].any()
    assert not micro.routes_mask_NT[1].any()
    assert micro.rollout_logprobs_NT[1].tolist() == [0, 0]
    assert micro.advantages_NT[1].tolist() == [0, 0]
    assert micro.engine_routes_NTLK is None


def test_an_invalid_sequence_may_lack_routes_and_a_valid_one_may_not():
    routes = np.array([[[0, 1], [2, 3]]], np.uint8)
    good = tiny_moe.sequence([1, 2], 1, routes=routes)
    micro = collate([good, tiny_moe.sequence([3, 4], 1, valid=False)])
    assert micro.engine_routes_NTLK.shape == (2, 1, 2, 2)
    with pytest.raises(ValueError, match="sequence 1 has no routes"):
        collate([good, tiny_moe.sequence([3, 4], 1)])
