"""From responses and verdicts to the envelope of a slot: a group, or VOID with a reason."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keel import codec
from keel.queue import SlotKey
from keel.spec import VerifierSpec
from keel.types.v1 import sequence_pb2
from keel_rollout.collector.plan import Slot
from keel_rollout.collector.responses import Response
from keel_rollout.collector.room import Packed
from keel_rollout.collector.tasks.base import Case, Problem
from keel_rollout.collector.telemetry import (
    INVALID_RESPONSES,
    VERIFIER_FAULTS,
    VERIFIER_SECONDS,
)
from keel_rollout.collector.text import TextCodec
from keel_rollout.collector.verify import Judgement, VerifierPool

LEAST_VALID = 2
"""A group's mean needs two."""
_LENGTH_DELIMITED = 2
_GROUP_TAG = bytes([sequence_pb2.Envelope.GROUP_FIELD_NUMBER << 3 | _LENGTH_DELIMITED])


async def judge(
    pool: VerifierPool,
    verifiers: Sequence[VerifierSpec],
    problem: Problem,
    responses: Sequence[Response],
    text: TextCodec,
) -> list[Judgement]:
    """A judgement for each response; one with a fault of its own keeps that and is not verified."""
    cases = [
        Case(
            problem.prompt,
            text.clean_text(response.token_ids_R),
            answer=problem.answer,
            finished=text.finished(response.token_ids_R),
            raw=text.response_text(response.token_ids_R),
            fields=problem.fields,
        )
        for response in responses
        if not response.fault
    ]
    with VERIFIER_SECONDS.time():
        judgements = await pool.verify(verifiers, cases)
    VERIFIER_FAULTS.inc(sum(bool(judgement.fault) for judgement in judgements))
    INVALID_RESPONSES.inc(len(responses) - len(cases))
    verdicts = iter(judgements)
    return [
        Judgement(fault=response.fault) if response.fault else next(verdicts)
        for response in responses
    ]


def pack_group(
    slot: Slot,
    responses: list[Response],
    judgements: Sequence[Judgement],
    sampling: sequence_pb2.SamplingParams,
    *,
    generate_s: float,
    engine: str,
) -> Packed:
    """The slot's group, or VOID if fewer than two of its sequences are valid.

    Empties `responses`: each is let go of once its bytes are in the envelope. That has the bytes of
    the message's own serialization, but is made sequence by sequence: protobuf would hold a group
    four times meanwhile.
    """
    faults = [judgement.fault for judgement in judgements if judgement.fault]
    valid = len(responses) - len(faults)
    if valid < LEAST_VALID:
        reason = (
            f"{valid} of {len(responses)} responses are valid, {LEAST_VALID} needed; the first "
            f"fault: {faults[0]}"
        )
        responses.clear()
        return Packed.of(void_envelope(slot, reason))
    data = bytearray()
    for sample, judgement in enumerate(judgements):
        part = sequence_pb2.Group()
        sequence = part.sequences.add(sampling=sampling)
        sequence.id.slot.CopyFrom(slot.id)
        sequence.id.sample = sample
        _fill(sequence, slot, responses.pop(0), judgement)
        data += part.SerializeToString()
    assert not responses, "a judgement for each"
    data += sequence_pb2.Group(generate_s=generate_s, engine=engine).SerializeToString()
    head = sequence_pb2.Envelope(id=slot.id).SerializeToString()
    data[:0] = head + _GROUP_TAG + _varint(len(data))
    return Packed(SlotKey.of(slot.id), "group", data, len(data))


def void_envelope(slot: Slot, reason: str) -> sequence_pb2.Envelope:
    """The slot gives nothing to train on."""
    return sequence_pb2.Envelope(id=slot.id, void=sequence_pb2.VoidSlot(reason=reason))


def _fill(
    sequence: sequence_pb2.Sequence, slot: Slot, response: Response, judgement: Judgement
) -> None:
    token_ids_T = np.concatenate([slot.prompt_ids_P, response.token_ids_R])
    codec.fill(sequence.token_ids, token_ids_T)
    sequence.prompt_length = len(slot.prompt_ids_P)
    sequence.trainable.add(begin=sequence.prompt_length, end=len(token_ids_T))
    codec.fill(sequence.rollout_logprobs, response.rollout_logprobs_R)
    if response.routes_TLK is not None:
        sequence.routes.codec = sequence_pb2.ROUTE_CODEC_DENSE
        codec.fill(sequence.routes.inline, response.routes_TLK)
        sequence.routes_valid = True
        sequence.routes_xxh3 = response.routes_xxh3
    sequence.policy_versions.extend(response.policy_versions)
    sequence.finish_reason = response.finish_reason
    sequence.reward = judgement.reward
    for name, value in judgement.parts.items():
        sequence.reward_parts.add(name=name, value=value)
    sequence.invalid_reason = judgement.fault


def _varint(number: int) -> bytes:
    """As protobuf writes lengths: seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
