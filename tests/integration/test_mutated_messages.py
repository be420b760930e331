"""Mutated messages, to every method of a running engine and trainer and into the queue."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import fuzz
import numpy as np
import pytest
from mutations import decoded, encoded, mutated

from keel import codec
from keel.blobs import BlobStore
from keel.errors import KeelError, WireError
from keel.queue import (
    BLOB_FIELD,
    ENVELOPE_FIELD,
    SLOT_FIELD,
    SlotKey,
    pack,
    pack_blob,
    unpack,
)
from keel.spec import parse_spec
from keel.types.v1 import sequence_pb2
from keel_trainer.sequences import RouteShape
from keel_trainer.steps import MiniBatch, decode_demonstrations, decode_group

VOCABULARY = 16
SHAPE = RouteShape(moe_layers=2, top_k=2, num_experts=16)
SPEC = parse_spec(
    {
        "name": "mutated",
        "model": {"path": "preset:tiny-qwen3-moe"},
        "rollout": {"group_size": 2},
        "recipe": {"steps": 1, "groups_per_minibatch": 1},
    }
)
ENTRIES = 6_000
PLACE = sequence_pb2.SlotId(run="r", lap=3, slot=1)


async def test_no_mutated_message_stops_a_service(tmp_path: Path) -> None:
    """A part of `make fuzz`, which says what must not happen."""
    done = await fuzz.run(6_000, 1, tmp_path, logging.getLogger("fuzz").info)
    assert len(done.statuses) == 19, "every method of both services, health and reflection"
    for method, statuses in done.statuses.items():
        answered = statuses.keys() - {"messages"}
        assert answered & {"OK", "waited", "FAILED_PRECONDITION"}, f"{method}: nothing got through"
        assert "INVALID_ARGUMENT" in answered, f"{method}: nothing was refused"


def test_what_is_taken_apart_is_put_together_again() -> None:
    """And a mutation changes nearly every message."""
    data, rng = group().SerializeToString(), random.Random(0)
    fields = decoded(data)
    assert fields
    assert encoded(fields) == data
    changed = [mutated(data, [data], sequence_pb2.Envelope, rng) for _ in range(200)]
    assert len(set(changed)) > 150


@pytest.mark.parametrize("seed", range(2))
def test_no_mutated_entry_of_the_queue_does_more_than_raise_a_keel_error(
    seed: int, tmp_path: Path
) -> None:
    """Groups, VOID slots, demonstrations, inline and by reference: decoded as the trainer does."""
    rng, store = random.Random(seed), BlobStore(str(tmp_path))
    valid = [group(), void(), demonstrations()]
    serialized = [envelope.SerializeToString() for envelope in valid]
    blob = store.put("r", "groups", SlotKey.of(PLACE), serialized[0])
    came: Counter[str] = Counter()
    for _ in range(ENTRIES):
        envelope = rng.choice(valid)
        data = mutated(envelope.SerializeToString(), serialized, type(envelope), rng)
        entry: Mapping[bytes, bytes] = {**pack(envelope), ENVELOPE_FIELD: data}
        if rng.random() < 0.3:
            ref = mutated(blob.SerializeToString(), serialized, type(blob), rng)
            entry = {**pack_blob(SlotKey.of(PLACE), blob), BLOB_FIELD: ref}
        if rng.random() < 0.1:
            entry = {**entry, SLOT_FIELD: rng.choice((b"", b"0/3", b"0/3/x", b"9" * 99, b"-1/3/1"))}
        if rng.random() < 0.05:
            entry = dict(rng.sample(sorted(entry.items()), 1))
        try:
            decode(unpack(entry, run="r", read=lambda ref: store.get(ref, run="r")))
            came["decoded"] += 1
        except KeelError as error:
            came[type(error).__name__] += 1
    assert came["decoded"] > ENTRIES / 10
    assert came[WireError.__name__] > ENTRIES / 10


def decode(envelope: sequence_pb2.Envelope) -> None:
    """As the loop does."""
    if envelope.WhichOneof("payload") == "demonstrations":
        decode_demonstrations(envelope, VOCABULARY)
        return
    slot = decode_group(envelope, SPEC, vocab_size=VOCABULARY, routes=SHAPE, routes_needed=True)
    MiniBatch.assemble([slot], SPEC, trainer_version=3, device="cpu", show=True)


def group() -> sequence_pb2.Envelope:
    """Two sequences of 2 + 3 tokens with routes."""
    envelope = sequence_pb2.Envelope(id=PLACE)
    envelope.group.engine = "127.0.0.1:50051"
    for sample in range(2):
        sequence = envelope.group.sequences.add(prompt_length=2, reward=sample)
        sequence.id.slot.CopyFrom(PLACE)
        sequence.id.sample = sample
        sequence.sampling.temperature = 1.0
        codec.fill(sequence.token_ids, np.array([5, 6, 7, 8, 9], np.int32))
        codec.fill(sequence.rollout_logprobs, np.array([-1, -2, -3], np.float32))
        sequence.trainable.add(begin=2, end=5)
        sequence.policy_versions.add(span=sequence_pb2.Span(begin=2, end=5), policy_version=3)
        sequence.finish_reason = sequence_pb2.FINISH_REASON_STOP
        sequence.reward_parts.add(name="right", value=sample)
        rows = np.arange(16, dtype=np.uint8).reshape(4, 2, 2)
        sequence.routes.codec = sequence_pb2.ROUTE_CODEC_DENSE
        codec.fill(sequence.routes.inline, rows)
        sequence.routes_valid, sequence.routes_xxh3 = True, codec.xxh3(rows)
    return envelope


def void() -> sequence_pb2.Envelope:
    """A slot that came to nothing."""
    return sequence_pb2.Envelope(id=PLACE, void=sequence_pb2.VoidSlot(reason="too long"))


def demonstrations() -> sequence_pb2.Envelope:
    """A batch of two."""
    envelope = sequence_pb2.Envelope(id=PLACE)
    for _ in range(2):
        demonstration = envelope.demonstrations.demonstrations.add(prompt_length=2)
        codec.fill(demonstration.token_ids, np.array([5, 6, 7], np.int32))
    return envelope
