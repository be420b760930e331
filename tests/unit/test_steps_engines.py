"""A mini-batch of several engines: who sampled what, and groups of an engine without routes."""

from __future__ import annotations

import numpy as np

from keel import codec
from keel.presets import PRESETS
from keel.spec import parse_spec
from keel.types.v1 import sequence_pb2
from keel_trainer import steps
from keel_trainer.sequences import RouteShape

SHAPE = RouteShape(moe_layers=2, top_k=2, num_experts=16)
PAIR_TOKENS, ALL_TOKENS = 9, 99
"""Micro-batches of two sequences of 4 fed tokens; of all."""


def group(slot: int, engine: str, *, routes: bool) -> sequence_pb2.Envelope:
    """Two sequences of 2 + 3 tokens, rewards 0 and 1."""
    place = sequence_pb2.SlotId(run="r", slot=slot)
    envelope = sequence_pb2.Envelope(id=place)
    envelope.group.engine = engine
    for sample in range(2):
        sequence = envelope.group.sequences.add(prompt_length=2, reward=sample)
        sequence.id.sample = sample
        sequence.sampling.temperature = 1.0
        codec.fill(sequence.token_ids, np.array([5, 6, 7, 8, 9], np.int32))
        codec.fill(sequence.rollout_logprobs, np.array([-1, -2, -3], np.float32))
        sequence.trainable.add(begin=2, end=5)
        sequence.policy_versions.add(span=sequence_pb2.Span(begin=2, end=5))
        sequence.finish_reason = sequence_pb2.FINISH_REASON_STOP
        if routes:
            rows = np.arange(16, dtype=np.uint8).reshape(4, 2, 2)
            sequence.routes.codec = sequence_pb2.ROUTE_CODEC_DENSE
            codec.fill(sequence.routes.inline, rows)
            sequence.routes_valid, sequence.routes_xxh3 = True, codec.xxh3(rows)
    return envelope


def void(slot: int) -> sequence_pb2.Envelope:
    place = sequence_pb2.SlotId(run="r", slot=slot)
    return sequence_pb2.Envelope(id=place, void=sequence_pb2.VoidSlot(reason="too long"))


def assemble(
    *envelopes: sequence_pb2.Envelope, routes_needed: bool = False, budget: int = PAIR_TOKENS
) -> steps.MiniBatch:
    spec = parse_spec(
        {
            "name": "mixed",
            "model": {"path": "preset:tiny-qwen3-moe"},
            "rollout": {"group_size": 2},
            "recipe": {"steps": 1, "groups_per_minibatch": len(envelopes)},
            "trainer": {"micro_batch_tokens": budget},
        }
    )
    groups = [
        steps.decode_group(
            envelope,
            spec,
            vocab_size=PRESETS["tiny-qwen3-moe"].config["vocab_size"],
            routes=SHAPE,
            routes_needed=routes_needed,
        )
        for envelope in envelopes
    ]
    return steps.MiniBatch.assemble(groups, spec, trainer_version=0, device="cpu")


def test_groups_are_counted_by_the_engine_that_sampled_them() -> None:
    made = assemble(group(0, "a:1", routes=True), void(1), group(2, "b:2", routes=True))
    counts = {key: value for key, value in made.row.items() if key.startswith("engine/")}
    assert counts == {"engine/groups/a:1": 1, "engine/groups/b:2": 1}
    assert made.engines == [["a:1", "a:1"], ["b:2", "b:2"]]


def test_groups_without_routes_are_trained_on_where_routes_are_not_replayed() -> None:
    made = assemble(group(0, "a:1", routes=True), group(1, "b:2", routes=False))
    assert [micro.tokens for micro in made.micros] == [6, 6]
    assert [micro.engine_routes_NTLK is not None for micro in made.micros] == [True, False]
    assert made.row["groups/void"] == 0


def test_a_micro_batch_of_both_kinds_is_compared_with_neither() -> None:
    both = group(0, "a:1", routes=True), group(1, "b:2", routes=False)
    made = assemble(*both, budget=ALL_TOKENS)
    assert [micro.tokens for micro in made.micros] == [12]
    assert made.micros[0].engine_routes_NTLK is None


def test_groups_without_routes_are_invalid_where_they_are_replayed() -> None:
    both = group(0, "a:1", routes=True), group(1, "b:2", routes=False)
    made = assemble(*both, routes_needed=True)
    assert [micro.tokens for micro in made.micros] == [6]
    assert made.row["groups/void"] == 1
    assert {key for key in made.row if key.startswith("engine/")} == {"engine/groups/a:1"}
