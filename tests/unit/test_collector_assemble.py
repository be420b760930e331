"""A group is packed sequence by sequence, to the bytes that its message has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.types.v1 import sequence_pb2
from keel_rollout.collector.assemble import pack_group
from keel_rollout.collector.plan import Slot
from keel_rollout.collector.responses import Response
from keel_rollout.collector.tasks.base import Problem
from keel_rollout.collector.verify import Judgement

SLOT = Slot(
    sequence_pb2.SlotId(run="r", attempt=1, lap=300, slot=2),
    Problem("6*7=", "42"),
    np.array([4, 5], np.int32),
    seed=3,
)
SAMPLING = sequence_pb2.SamplingParams(temperature=1.0, max_tokens=9, stop_token_ids=[1])


def response(tokens: int, *, routed: bool = True, fault: str = "") -> Response:
    return Response(
        token_ids_R=np.arange(tokens, dtype=np.int32),
        rollout_logprobs_R=np.full(tokens, -0.5, np.float32),
        routes_TLK=np.ones((tokens + 1, 2, 2), np.uint8) if routed else None,
        routes_xxh3=7,
        policy_versions=[sequence_pb2.VersionSpan(policy_version=300)],
        finish_reason=sequence_pb2.FINISH_REASON_STOP,
        fault=fault,
    )


@given(
    lengths=st.lists(st.integers(1, 5000), min_size=2, max_size=5),
    routed=st.booleans(),
    reward=st.floats(allow_nan=False),
)
def test_the_bytes_are_those_of_the_message(
    lengths: list[int], routed: bool, reward: float
) -> None:
    """Lengths of one to three bytes on the wire; every field comes back where it was put."""
    responses = [response(tokens, routed=routed) for tokens in lengths]
    judgements = [Judgement(reward=reward, parts={"exact": reward}) for _ in lengths]
    packed = pack_group(SLOT, responses, judgements, SAMPLING, generate_s=1.5, engine="e:1")
    assert not responses
    envelope = sequence_pb2.Envelope.FromString(bytes(packed.data))
    assert envelope.SerializeToString() == packed.data
    assert (packed.size, packed.kind) == (len(packed.data), "group")
    assert envelope.id == SLOT.id
    assert str(packed.slot) == "1/300/2"
    assert (envelope.group.generate_s, envelope.group.engine) == (1.5, "e:1")
    assert [s.id.sample for s in envelope.group.sequences] == list(range(len(lengths)))
    assert [s.token_ids.shape[0] - 2 for s in envelope.group.sequences] == lengths
    assert {s.HasField("routes") for s in envelope.group.sequences} == {routed}
    assert {s.reward for s in envelope.group.sequences} == {reward}


@pytest.mark.parametrize(("faults", "kind"), [(1, "group"), (2, "void"), (3, "void")])
def test_fewer_than_two_valid_responses_make_it_void(faults: int, kind: str) -> None:
    responses = [response(3, fault="bad routes" if i < faults else "") for i in range(3)]
    judgements = [Judgement(fault=r.fault) for r in responses]
    packed = pack_group(SLOT, responses, judgements, SAMPLING, generate_s=1.5, engine="e:1")
    envelope = sequence_pb2.Envelope.FromString(bytes(packed.data))
    assert envelope.WhichOneof("payload") == packed.kind == kind
    assert not responses
    if kind == "void":
        told = f"{3 - faults} of 3 responses are valid, 2 needed; the first fault: bad routes"
        assert envelope.void.reason == told
