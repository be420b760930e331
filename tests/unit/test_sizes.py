"""Bytes at worst are what real messages at worst have; cohorts are cut by sequences and tokens."""

from __future__ import annotations

import numpy as np
import pytest
from collector_peers import make_spec
from hypothesis import example, given
from hypothesis import strategies as st

from keel.codec import fill, routes_dtype
from keel.errors import InvalidField
from keel.sizes import lap_bytes, parse_bytes, sequence_bytes, show_bytes
from keel.spec import COHORT_SEQUENCES, COHORT_TOKENS
from keel.types.v1 import sequence_pb2


def test_the_examples_are_right() -> None:
    assert sequence_bytes(32768, layers=48, top_k=8, experts=128) == 12_846_080
    assert lap_bytes(256, 16, 33_000, layers=48, top_k=8, experts=128) == 52_990_050_304
    assert sequence_bytes(10, layers=0, top_k=0, experts=0) == 10 * 8 + 1024


@given(
    prompt=st.integers(1, 40),
    response=st.integers(1, 400),
    layers=st.integers(0, 5),
    top_k=st.integers(1, 4),
    experts=st.sampled_from([8, 256, 257, 1000]),
    parts=st.integers(0, 8),
)
def test_no_sequence_is_larger_than_its_bound_and_long_ones_come_near(
    prompt: int, response: int, layers: int, top_k: int, experts: int, parts: int
) -> None:
    """The bound is kept by the message of a whole group with every field set, and is not idle."""
    tokens = prompt + response
    envelope = sequence_pb2.Envelope(id=_slot())
    envelope.group.generate_s, envelope.group.engine = 1e9, "engine.example.org:50051"
    for sample in range(2):
        sequence = envelope.group.sequences.add(
            prompt_length=prompt, routes_valid=True, routes_xxh3=2**64 - 1, reward=0.1
        )
        sequence.id.slot.CopyFrom(_slot())
        sequence.id.sample = sample
        sequence.sampling.temperature = 1.0
        sequence.sampling.stop_token_ids.extend(range(2**20, 2**20 + 8))
        fill(sequence.token_ids, np.zeros(tokens, np.int32))
        fill(sequence.rollout_logprobs, np.zeros(response, np.float32))
        if layers:
            shape = (tokens - 1, layers, top_k)
            fill(sequence.routes.inline, np.zeros(shape, routes_dtype(experts)))
        for part in range(parts):
            sequence.reward_parts.add(name=f"module.of.mine:verifier/part-{part}", value=0.5)
    size = envelope.ByteSize()
    shape = {"layers": layers, "top_k": top_k, "experts": experts}
    bound = lap_bytes(1, 2, tokens, **shape)
    assert size <= bound
    idle = 2 * (1024 + 4 * prompt + layers * top_k * 2)
    assert size >= bound - idle


def _slot() -> sequence_pb2.SlotId:
    return sequence_pb2.SlotId(run="2" * 60, attempt=9, lap=10**6, slot=10**4)


@given(
    group_size=st.integers(2, 1024), max_tokens=st.integers(1, 2**21), slots=st.integers(1, 2000)
)
@example(group_size=4, max_tokens=32768, slots=20)
def test_a_cohort_keeps_both_bounds_or_is_one_group(
    group_size: int, max_tokens: int, slots: int
) -> None:
    spec = make_spec(rollout={"group_size": group_size, "max_tokens": max_tokens})
    cut = spec.cohorts(slots)
    assert [slot for places in cut for slot in places] == list(range(slots))
    for places in cut:
        sequences = len(places) * group_size
        kept = sequences <= COHORT_SEQUENCES and sequences * max_tokens <= COHORT_TOKENS
        assert kept or len(places) == 1
    if max_tokens <= 4096:
        assert len(cut[0]) == min(slots, max(1, 256 // group_size)), "as cut by sequences alone"


def test_evaluation_is_cut_in_the_same_way_by_its_own_numbers() -> None:
    evaluation = {"every": 2, "samples": 10, "k": 8, "temperature": 1.0, "max_tokens": 2**16}
    spec = make_spec(evaluation=evaluation)
    assert [len(places) for places in spec.evaluation_cohorts(5)] == [2, 2, 1]
    assert [len(places) for places in make_spec().evaluation_cohorts(300)] == [256, 44]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1048576),
        ("0", 0),
        ("500MB", 500_000_000),
        ("2GiB", 2 * 2**30),
        (" 1.5 gib ", 3 * 2**29),
        ("64kB", 64_000),
        ("10b", 10),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text, "--queue-bytes") == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1 parsec", "1e9", "2GB!"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidField, match=r"--queue-bytes: .* valid: bytes, such as"):
        parse_bytes(text, "--queue-bytes")


def test_sizes_are_shown_with_three_digits() -> None:
    shown = [show_bytes(size) for size in (999, 8 * 2**30, 52_990_050_304, 411_041_792, 12_345)]
    assert [show_bytes(size) for size in (99_970, 999_600)] == ["100 kB", "1.00 MB"]
    assert shown == ["999 bytes", "8.59 GB", "53.0 GB", "411 MB", "12.3 kB"]
